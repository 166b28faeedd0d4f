"""A box detector on a Sam's features: what it learns, and in which frame it answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from sam_train import config
from sam_train.models.box_detector import BoxDetector, EmbeddingPyramid, EncoderBoxDetector
from sam_train.models.sam import Sam
from sam_train.ops.resize import resize_longest_side

SMALL = [
    "model.image_encoder.img_size=64",
    "model.image_encoder.out_chans=16",
    "model.image_encoder.backbone.depths=[1,1,1,1]",
    "model.image_encoder.backbone.dims=[16,16,16,16]",
]
BOXES = {
    "square": [[6.0, 6.0, 22.0, 22.0], [34.0, 38.0, 54.0, 56.0], [40.0, 6.0, 52.0, 18.0]],
    "wide": [[10.0, 4.0, 30.0, 20.0], [40.0, 8.0, 60.0, 28.0]],
}


def picture(size: tuple[int, int], boxes: Sequence[Sequence[float]]) -> np.ndarray:
    """Bright rectangles on dark ground."""
    image = np.full((*size, 3), 30, np.uint8)
    for x0, y0, x1, y1 in np.asarray(boxes, int):
        image[y0:y1, x0:x1] = 210
    return image


IMAGES = {
    "square": picture((64, 64), BOXES["square"]),
    "wide": picture((32, 64), BOXES["wide"]),
}


def small_sam(*more: str) -> Sam:
    torch.manual_seed(0)
    sam = config.instantiate(config.compose("train", [*SMALL, *more]).model)
    assert isinstance(sam, Sam)
    return sam.eval()


def small_detector(sam: Sam | None = None) -> EncoderBoxDetector:
    torch.manual_seed(1)
    return EncoderBoxDetector(sam=sam or small_sam(), width=16, hidden_dim=32, num_levels=3)


def losses(detector: BoxDetector) -> dict[str, Tensor]:
    """Of a batch of both pictures."""
    images, sizes = detector._padded(list(IMAGES.values()))
    torch.manual_seed(2)
    return detector.losses(images, sizes, [torch.tensor(boxes) for boxes in BOXES.values()])


@pytest.fixture(scope="module")
def trained() -> EncoderBoxDetector:
    """A detector that knows both pictures."""
    detector = small_detector().train()
    weights = [p for p in detector.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        torch.stack(list(losses(detector).values())).sum().backward()
        optimizer.step()
    return detector.eval()


def nearest_ious(found: Tensor, boxes: Sequence[Sequence[float]], scale: float = 1.0) -> Tensor:
    return box_iou(scale * torch.tensor(boxes), found).max(dim=1).values


def test_it_learns_to_find_objects_in_images_of_their_own_size(
    trained: EncoderBoxDetector,
) -> None:
    found = trained.detect(list(IMAGES.values()), min_score=0.5)

    for own, boxes in zip(found, BOXES.values(), strict=True):
        assert (nearest_ious(own.boxes, boxes) > 0.6).all()
        assert len(own.boxes) <= 2 * len(boxes)
        assert (own.scores[:-1] >= own.scores[1:]).all()


def test_boxes_are_in_the_original_frame_and_inside_of_the_image(
    trained: EncoderBoxDetector,
) -> None:
    large = np.repeat(np.repeat(IMAGES["wide"], 3, axis=0), 3, axis=1)

    (found,) = trained.detect([large])

    is_sure = found.scores > 0.5
    assert (nearest_ious(found.boxes[is_sure], BOXES["wide"], scale=3.0) > 0.6).all()
    assert (found.boxes >= 0).all()
    assert (found.boxes[:, 2] <= large.shape[1]).all()
    assert (found.boxes[:, 3] <= large.shape[0]).all()  # below it is padding


def test_an_image_is_found_in_alike_alone_in_a_batch_and_from_its_embedding(
    trained: EncoderBoxDetector,
) -> None:
    together = trained.detect(list(IMAGES.values()))
    alone = [trained.detect([image])[0] for image in IMAGES.values()]
    images, sizes = trained._padded(list(IMAGES.values()))
    features = trained.encode(images, sizes)
    embedded = trained.detect_features(features, [(64, 64), (32, 64)])

    for other in (alone, embedded):
        for one, two in zip(together, other, strict=True):
            torch.testing.assert_close(one.boxes, two.boxes, atol=1e-3, rtol=0)
            torch.testing.assert_close(one.scores, two.scores, atol=1e-4, rtol=0)
    assert trained.detect([]) == []


def test_the_first_image_does_not_decide_how_later_ones_are_pooled() -> None:
    # torchvision keeps the strides that it guesses from the sizes of the first batch.
    wide_first, square_first = small_detector().eval(), small_detector().eval()

    wide_first.detect([IMAGES["wide"]])
    square_first.detect([IMAGES["square"]])

    for name, image in IMAGES.items():
        (one,), (two,) = wide_first.detect([image]), square_first.detect([image])
        torch.testing.assert_close(one.boxes, two.boxes, msg=name)


def test_training_leaves_the_encoder_alone_and_reaches_all_else() -> None:
    detector = small_detector().train()

    torch.stack(list(losses(detector).values())).sum().backward()

    assert not detector.image_encoder.training
    for name, parameter in detector.named_parameters():
        assert (parameter.grad is None) == name.startswith("image_encoder."), name


def test_the_same_seed_gives_the_same_losses_and_another_one_others() -> None:
    detector = small_detector().train()
    images, sizes = detector._padded(list(IMAGES.values()))
    boxes = [torch.tensor(boxes) for boxes in BOXES.values()]

    def total(seed: int) -> float:
        torch.manual_seed(seed)
        return sum(float(one.detach()) for one in detector.losses(images, sizes, boxes).values())

    assert total(3) == total(3)
    assert len({total(seed) for seed in range(6)}) > 1  # what counts is drawn


def test_the_heads_stay_in_float32_where_the_encoder_does_not() -> None:
    detector = small_detector().train()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = losses(detector)

    assert {one.dtype for one in found.values()} == {torch.float32}


def test_an_embedding_of_stride_16_is_upsampled_to_stride_4() -> None:
    pyramid = EmbeddingPyramid(embed_dim=8, high_res_dim=0, stride=16, width=4, num_levels=5)

    maps = pyramid(torch.randn(2, 8, 16, 16))

    assert [tuple(one.shape) for one in maps.values()] == [
        (2, 4, side, side) for side in (64, 32, 16, 8, 4)
    ]


def test_fine_features_join_at_their_stride() -> None:
    pyramid = EmbeddingPyramid(embed_dim=8, high_res_dim=2, stride=8, width=4, num_levels=3)
    embedding = torch.randn(1, 16, 8, 8)
    changed = embedding.clone()
    changed[:, 8:] += 1.0

    one, two = pyramid(embedding), pyramid(changed)

    assert not torch.equal(one["0"], two["0"])
    assert torch.equal(one["1"], two["1"])


def test_the_padded_batch_is_what_the_model_is_shown() -> None:
    detector = small_detector()
    image = np.random.default_rng(0).integers(0, 256, (50, 100, 3)).astype(np.uint8)

    padded, sizes = detector._padded([image])

    assert sizes.tolist() == [[32, 64]]
    resized = torch.from_numpy(resize_longest_side(image, 64)).permute(2, 0, 1)
    assert torch.equal(padded[0, :, :32], resized)
    assert not padded[0, :, 32:].any()


@pytest.mark.parametrize(
    "image", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3)), np.zeros((8, 8, 4), np.uint8)]
)
def test_what_is_no_picture_is_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="images are"):
        small_detector().eval().detect([image])
