"""The data recipes a user fills in: what the command line makes of them."""

import pytest

from sam_train import config
from sam_train.data.coco import CocoItems, PanopticItems
from sam_train.data.folder import FolderItems
from sam_train.data.indexed import IndexedSource
from sam_train.data.mixture import MixtureSource
from sam_train.data.sa1b import ShardSource

COCO = ["data=coco", "data.images=/i", "data.annotations=/a"]
FOLDER = ["data=folder", "data.images=/i", "data.masks=/m"]
PANOPTIC = ["data=panoptic", "data.images=/i", "data.masks=/m", "data.annotations=/a"]
SHARDS = ["data=shards", "data.path=/p"]
MINE = ["data=mixture", "+data@data.sets.mine=coco", "+data.weights.mine=4"] + [
    "data.sets.mine.images=/i",
    "data.sets.mine.annotations=/a",
]


def build(*overrides):
    return config.instantiate(config.compose("train", overrides).data)


@pytest.mark.parametrize(
    ("overrides", "items"),
    [
        (COCO, CocoItems(images="/i", annotations="/a")),
        (FOLDER, FolderItems(images="/i", masks="/m", background=[0])),
        (PANOPTIC, PanopticItems(images="/i", masks="/m", annotations="/a")),
    ],
)
def test_without_others_the_same_images_are_validated_on(overrides, items):
    data = build(*overrides)
    assert data.train == data.val == IndexedSource(items=items)


@pytest.mark.parametrize("overrides", [COCO, FOLDER, PANOPTIC, SHARDS])
def test_others_are_named_by_val(overrides):
    name = overrides[-1].removeprefix("data.").partition("=")[0]
    data = build(*overrides, f"data.val_{name}=/other")
    assert data.train != data.val
    assert "/other" in str(data.val) and "/other" not in str(data.train)


@pytest.mark.parametrize(
    ("overrides", "name", "value"),
    [
        (COCO, "include_crowds", True),
        (PANOPTIC, "include_crowds", True),
        (FOLDER, "kind", "colour"),
        (FOLDER, "threshold", 0.25),
        (FOLDER, "components", True),
    ],
)
def test_both_splits_are_read_alike(overrides, name, value):
    data = build(*overrides, f"data.train.items.{name}={value}")
    assert getattr(data.train.items, name) == getattr(data.val.items, name) == value


def test_the_example_of_a_mixture_has_weights_and_a_transform_of_its_own():
    data = build("data=mixture", "data.weights.nuclei=3", "data.train_transform.max_masks=20")
    assert isinstance(data.train, MixtureSource)
    assert data.train.weights == {"nuclei": 3, "coco_panoptic": 1}
    assert all(isinstance(source, ShardSource) for source in data.train.sources.values())
    assert data.val_sources == ("nuclei", "coco_panoptic")
    own = data.train_transform.sources["nuclei"]
    assert own.max_masks == 32 and own.crop is not None
    assert data.train_transform.default.max_masks == 20


def test_any_recipe_can_be_added_to_a_mixture():
    data = build(*MINE)
    assert data.train.sources["mine"].items == CocoItems(images="/i", annotations="/a")
    assert data.train.weights["mine"] == 4
    assert data.val_sources == ("nuclei", "coco_panoptic", "mine")


@pytest.mark.parametrize("overrides", [COCO, FOLDER, PANOPTIC, SHARDS, MINE])
def test_evaluation_and_conversion_read_them_without_a_model(overrides):
    data = build(*overrides)
    for root in ("eval", "convert"):
        cfg = config.compose(root, overrides)
        assert config.instantiate(cfg.data.val) == data.val
        assert config.instantiate(cfg.data.train) == data.train


def test_a_transform_for_a_set_that_is_not_there_is_refused():
    with pytest.raises(Exception, match="data.transforms names mien"):
        build("data=mixture", "+data.transforms.mien.max_masks=3")
