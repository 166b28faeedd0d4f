import pickle

import cv2
import numpy as np
import pytest

from sam_train.data.synthetic import MAX_MASKS, SyntheticSource, make_scene
from sam_train.data.synthetic_canvas import Canvas
from sam_train.data.synthetic_layouts import LAYOUTS, radiograph
from sam_train.data.synthetic_objects import Part
from sam_train.data.synthetic_shapes import affine, box, rasterise
from sam_train.data.synthetic_textures import random_material
from sam_train.metrics.flood_fill import score_flood_fill
from sam_train.ops import rle

SIZE = 96


def scenes(count, size=SIZE):
    return [make_scene(np.random.default_rng([3, i]), size) for i in range(count)]


def all_records(source, num_readers=1, epoch=0, shuffle=True):
    return [
        list(source.records(epoch=epoch, reader=r, num_readers=num_readers, shuffle=shuffle))
        for r in range(num_readers)
    ]


def test_a_scene_follows_from_its_generator_alone():
    (image, masks), (again, masks_again) = (
        make_scene(np.random.default_rng(5), SIZE) for _ in range(2)
    )

    assert np.array_equal(image, again)
    assert np.array_equal(masks, masks_again)
    assert not np.array_equal(image, make_scene(np.random.default_rng(6), SIZE)[0])


@pytest.mark.parametrize("size", [(64, 160), (150, 70), 64])
def test_a_scene_has_the_asked_size_and_visible_masks(size):
    for image, masks in scenes(12, size):
        shape = (size, size) if isinstance(size, int) else size
        smallest = 40 * shape[0] * shape[1] / 256**2
        assert image.shape == (*shape, 3)
        assert image.dtype == np.uint8
        assert image.std() > 3
        assert 2 <= len(masks) <= MAX_MASKS
        for mask in masks:
            assert mask.shape == shape
            assert mask.dtype == bool
            assert smallest <= mask.sum() <= 0.9 * mask.size


@pytest.mark.parametrize("layout", [layout for layout, _ in LAYOUTS if layout is not radiograph])
def test_masks_are_apart_or_one_includes_the_other(layout, monkeypatch):
    monkeypatch.setattr("sam_train.data.synthetic.LAYOUTS", ((layout, 1.0),))

    nested = 0
    for _, masks in scenes(8):
        for i, first in enumerate(masks):
            for second in masks[:i]:
                shared = np.count_nonzero(first & second)
                assert shared in (0, first.sum(), second.sum())
                nested += shared > 0
    if layout.__name__ == "closeup":
        assert nested > 0


def test_a_mask_left_as_its_only_part_comes_once():
    rng = np.random.default_rng(0)
    canvas = Canvas(rng, (64, 64))
    material = random_material(rng, 8)
    halves = [Part(outline=box(x, -1, x + 1, 1), material=material) for x in (-1, 0)]
    canvas.place(rng, halves, affine((32, 32), (20, 20)), parts=True)
    assert len(canvas.visible_masks(1, 0.1)) == 3

    canvas.paint(rng, rasterise(box(32, 0, 64, 64), (64, 64)), material)

    (left,) = canvas.visible_masks(1, 0.1)
    assert left[20:40, 15:30].all()
    assert not left[:, 33:].any()


def test_no_mask_comes_twice():
    for _, masks in scenes(40):
        assert len({mask.tobytes() for mask in masks}) == len(masks)


@pytest.mark.parametrize("num_readers", [2, 3])
def test_readers_share_an_epoch_without_loss_or_repeat(num_readers):
    source = SyntheticSource(num_scenes=7, size=SIZE)
    (alone,) = all_records(source)
    shared = all_records(source, num_readers)

    in_turn = [shared[i % num_readers][i // num_readers] for i in range(7)]
    assert [r.key for r in in_turn] == [r.key for r in alone]
    assert len({r.key for r in alone}) == 7
    for one, other in zip(alone, in_turn, strict=True):
        assert np.array_equal(one.image, other.image)
        assert one.annotations == other.annotations


def test_epochs_differ_in_order_only_and_unshuffled_ones_not_at_all():
    source = SyntheticSource(num_scenes=9, size=64)
    ((first,), (second,)) = (all_records(source, epoch=e) for e in range(2))
    (plain,) = all_records(source, shuffle=False)

    assert [r.key for r in first] != [r.key for r in second]
    assert sorted(r.key for r in first) == sorted(r.key for r in second)
    assert [r.key for r in plain] == [f"scene-train-{i:06d}" for i in range(9)]


def test_splits_and_seeds_hold_other_scenes():
    sources = [
        SyntheticSource(num_scenes=2, size=64, seed=seed, split=split)
        for seed in (0, 1)
        for split in ("train", "val")
    ]
    images = {s.record(i).image.tobytes() for s in sources for i in range(2)}

    assert len(images) == 8


def test_annotations_describe_their_masks():
    source = SyntheticSource(num_scenes=3, size=(64, 96))
    ids = []
    for record in source.records(epoch=0, reader=0, num_readers=1, shuffle=False):
        assert record.size == record.image.shape[:2] == (64, 96)
        for annotation in record.annotations:
            mask = rle.decode(annotation.rle)
            assert mask.shape == record.size
            assert annotation.area == mask.sum()
            assert annotation.bbox == rle.bbox(annotation.rle)
            assert annotation.predicted_iou is None
            ids.append(annotation.id)
    assert len(set(ids)) == len(ids)


def test_cached_scenes_are_the_same_and_are_made_once(monkeypatch):
    source = SyntheticSource(num_scenes=4, size=64, cache_mb=1)
    ((first,),) = (all_records(source),)
    monkeypatch.setattr("sam_train.data.synthetic.make_scene", lambda *_: pytest.fail("made anew"))
    (second,) = all_records(source, epoch=1)

    images = {r.key: r.image for r in first}
    assert all(np.array_equal(images[r.key], r.image) for r in second)


def test_the_cache_is_left_behind_when_a_source_is_sent_to_another_process():
    source = SyntheticSource(num_scenes=3, size=64, cache_mb=1)
    all_records(source)
    sent = pickle.loads(pickle.dumps(source))

    assert sent == source
    assert source._cache and not sent._cache


def test_the_cache_stays_within_its_bound():
    source = SyntheticSource(num_scenes=6, size=64, cache_mb=3 * 64 * 64 * 3 / 2**20)
    all_records(source)

    assert len(source._cache) == 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seed": -1}, "seed"),
        ({"split": "test"}, "train, val"),
        ({"num_scenes": 0}, "at least 1"),
        ({"size": 8}, "32"),
    ],
)
def test_a_wrong_argument_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        SyntheticSource(**{"num_scenes": 3, **wrong})


def test_a_flood_fill_does_not_solve_the_scenes():
    source = SyntheticSource(num_scenes=40, split="val")
    threads = cv2.getNumThreads()
    score = score_flood_fill(
        source.records(epoch=0, reader=0, num_readers=1, shuffle=False),
        tolerances=(8, 16, 32, 40, 48, 56, 64),
    )

    assert cv2.getNumThreads() == threads
    assert score.num_masks > 200
    assert 0.1 < score.mean_iou < 0.35
