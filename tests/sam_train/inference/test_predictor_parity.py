"""SamPredictor beside segment_anything's own, on the same weights: the same masks, scores and logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

MASK_LOGIT_ERROR = 1e-5
"""Pixels whose logit is this near the threshold may fall to either side."""
TOLERANCE = 1e-4


def prompts_of(kind: str, height: int, width: int) -> dict[str, Any]:
    """Arguments of `predict`, original frame."""
    points = np.array([[0.31 * width, 0.4 * height], [0.7 * width, 0.62 * height], [0, height - 1]])
    box = np.array([0.2 * width, 0.1 * height, 0.8 * width, 0.75 * height])
    mask = 4 * np.random.default_rng(0).standard_normal((1, 32, 32)).astype(np.float32)
    found: dict[str, Any] = {
        "point": {"point_coords": points[:1], "point_labels": np.array([1])},
        "points": {"point_coords": points, "point_labels": np.array([1, 0, 1])},
        "integer points": {"point_coords": points.astype(int), "point_labels": np.array([1, 1, 0])},
        "box": {"box": box},
        "box[None]": {"box": box[None]},
        "mask": {"mask_input": mask},
        "nothing": {},
    }
    found["padding"] = {"point_coords": points[:2], "point_labels": np.array([1, -1])}
    found["point+box"] = found["point"] | found["box"]
    found["points+mask"] = found["points"] | found["mask"]
    found["all"] = found["points"] | found["box"] | found["mask"]
    return found[kind]


KINDS = (
    "point",
    "points",
    "integer points",
    "box",
    "box[None]",
    "point+box",
    "mask",
    "points+mask",
    "all",
    "padding",
    "nothing",
)


def assert_same(got: Any, expected: Any, logits: Any = None) -> None:
    """Masks (or logits), scores and low-resolution logits of `predict` or `predict_torch`."""
    for ours, theirs in zip(got, expected, strict=True):
        assert type(ours) is type(theirs)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    masks, ious, low_res = (np.asarray(part) for part in got)
    masks_, ious_, low_res_ = (np.asarray(part) for part in expected)
    np.testing.assert_allclose(ious, ious_, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(low_res, low_res_, rtol=0, atol=TOLERANCE)
    if masks.dtype != bool:
        np.testing.assert_allclose(masks, masks_, rtol=0, atol=TOLERANCE)
        return
    assert 0.1 < masks_.mean() < 0.9 or masks_[0].size < 20, "all or nothing shows little"
    differs = masks != masks_
    assert np.abs(np.asarray(logits)[differs]).max(initial=0) < MASK_LOGIT_ERROR


def ask_both(pair: Any, prompts: dict[str, Any], **settings: Any) -> None:
    expected = pair.published.predict(**prompts, **settings)
    logits = pair.published.predict(**prompts, **settings, return_logits=True)
    assert_same(pair.ours.predict(**prompts, **settings), expected, logits[0])
    assert_same(pair.ours.predict(**prompts, **settings, return_logits=True), logits)


@pytest.mark.parametrize("kind", KINDS)
def test_every_prompt_is_answered_as_published(
    pair: Any, picture: Callable[..., np.ndarray], kind: str
) -> None:
    image = picture(96, 150)
    for predictor in pair:
        predictor.set_image(image)

    for multimask_output in (True, False):
        ask_both(pair, prompts_of(kind, 96, 150), multimask_output=multimask_output)


@pytest.mark.parametrize(
    "size",
    [(60, 1900), (1900, 60), (3, 4), (1, 1), (128, 128), (97, 128), (1500, 2100)],
    ids=["very wide", "very tall", "tiny", "a pixel", "as the input", "no resize", "large"],
)
def test_every_size_of_image_is_answered_as_published(
    pair: Any, picture: Callable[..., np.ndarray], size: tuple[int, int]
) -> None:
    image = picture(*size)
    for predictor in pair:
        predictor.set_image(image)

    assert pair.ours.input_size == pair.published.input_size
    assert pair.ours.original_size == pair.published.original_size
    torch.testing.assert_close(pair.ours.features, pair.published.features, rtol=0, atol=1e-4)
    for kind in ("point", "all"):
        ask_both(pair, prompts_of(kind, *size))


@pytest.mark.parametrize("name", ["nuclei", "balloon", "coco_panoptic"])
def test_real_images_are_answered_as_published(
    pair: Any, real_images: Callable[..., list[np.ndarray]], name: str
) -> None:
    for image in real_images(name, 2):
        for predictor in pair:
            predictor.set_image(image)
        for kind in ("point", "points", "box", "point+box"):
            ask_both(pair, prompts_of(kind, *image.shape[:2]))
        scores, logits = pair.published.predict(**prompts_of("point", *image.shape[:2]))[1:]
        refined = prompts_of("points", *image.shape[:2])
        refined["mask_input"] = logits[np.argmax(scores)][None]
        ask_both(pair, refined, multimask_output=False)


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_both_orders_of_channels_are_taken(
    pair: Any, picture: Callable[..., np.ndarray], image_format: str
) -> None:
    image = picture(70, 90)
    for predictor in pair:
        predictor.set_image(image, image_format)

    torch.testing.assert_close(pair.ours.features, pair.published.features, rtol=0, atol=1e-5)
    pair.published.set_image(image, "BGR" if image_format == "RGB" else "RGB")
    assert (pair.ours.features - pair.published.features).abs().max() > 0.1


@pytest.mark.parametrize("boxes_too", [False, True])
@pytest.mark.parametrize("masks_too", [False, True])
@pytest.mark.parametrize("num_prompts", [1, 5, 70])
def test_batches_of_torch_prompts_are_answered_as_published(
    pair: Any, boxes_too: bool, masks_too: bool, num_prompts: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    image = 255 * torch.rand(1, 3, 88, 128, generator=generator)
    size = (120, 175)
    points = 100 * torch.rand(num_prompts, 2, 2, generator=generator)
    labels = torch.randint(0, 2, (num_prompts, 2), generator=generator)
    boxes = 100 * torch.rand(num_prompts, 2, 2, generator=generator)
    boxes = boxes.sort(dim=1).values.flatten(1) if boxes_too else None
    masks = torch.randn(num_prompts, 1, 32, 32, generator=generator) if masks_too else None
    answers = []
    for predictor in pair:
        predictor.set_torch_image(image, size)
        transform = predictor.transform
        moved = transform.apply_coords_torch(points, size)
        boxes_moved = None if boxes is None else transform.apply_boxes_torch(boxes, size)
        arguments = (moved, labels, boxes_moved, masks)
        answers.append([predictor.predict_torch(*arguments, return_logits=x) for x in (0, 1)])

    (expected, logits), got = answers
    assert_same(got[0], expected, logits[0])
    assert_same(got[1], logits)


def test_boxes_alone_as_the_notebook_gives_them(
    pair: Any, picture: Callable[..., np.ndarray]
) -> None:
    image = picture(120, 90)
    boxes = torch.tensor([[5, 6, 70, 80], [10, 20, 30, 115], [0, 0, 90, 120]])
    answers = []
    for predictor in pair:
        predictor.set_image(image)
        moved = predictor.transform.apply_boxes_torch(boxes, image.shape[:2])
        answers.append(predictor.predict_torch(None, None, moved, multimask_output=False))

    logits = pair.published.predict_torch(None, None, moved, None, False, True)[0]
    assert_same(answers[1], answers[0], logits)


def test_the_transform_moves_images_and_prompts_as_published(
    pair: Any, picture: Callable[..., np.ndarray]
) -> None:
    theirs, ours = pair.published.transform, pair.ours.transform
    for size in ((37, 91), (300, 211), (64, 128)):
        image = picture(*size)
        np.testing.assert_array_equal(ours.apply_image(image), theirs.apply_image(image))
        coords = np.array([[[1, 2], [30, 17]]])
        for name, values in (("coords", coords), ("boxes", coords.reshape(1, 4))):
            got = getattr(ours, f"apply_{name}")(values, size)
            expected = getattr(theirs, f"apply_{name}")(values, size)
            assert got.dtype == expected.dtype
            np.testing.assert_allclose(got, expected, rtol=1e-15)
            tensor = torch.from_numpy(values)
            got = getattr(ours, f"apply_{name}_torch")(tensor, size)
            expected = getattr(theirs, f"apply_{name}_torch")(tensor, size)
            torch.testing.assert_close(got, expected, rtol=0, atol=0)
        assert ours.get_preprocess_shape(*size, 128) == theirs.get_preprocess_shape(*size, 128)


def test_a_resized_tensor_keeps_its_shape_unlike_published(
    pair: Any, picture: Callable[..., np.ndarray]
) -> None:
    image = picture(60, 120)
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].float()

    resized = pair.ours.transform.apply_image_torch(tensor)

    assert resized.shape == (1, 3, 64, 128)
    on_uint8 = torch.from_numpy(pair.ours.transform.apply_image(image)).permute(2, 0, 1)
    assert (resized[0] - on_uint8).abs().max() <= 2


def test_the_errors_are_of_the_published_kinds(
    pair: Any, picture: Callable[..., np.ndarray]
) -> None:
    point, label = np.array([[3, 4]]), np.array([1])
    for predictor in pair:
        with pytest.raises(RuntimeError, match="An image must be set"):
            predictor.predict(point, label)
        with pytest.raises(RuntimeError, match="An image must be set"):
            predictor.predict_torch(None, None)
        with pytest.raises(RuntimeError, match="An image must be set"):
            predictor.get_image_embedding()
        with pytest.raises(AssertionError, match="image_format must be in"):
            predictor.set_image(picture(9, 9), "HSV")
        with pytest.raises(AssertionError, match="BCHW with long side 128"):
            predictor.set_torch_image(torch.zeros(1, 3, 64, 64), (64, 64))
        predictor.set_image(picture(9, 9))
        assert predictor.get_image_embedding().shape == (1, 32, 8, 8)
        with pytest.raises(AssertionError, match="point_labels must be supplied"):
            predictor.predict(point)
        predictor.reset_image()
        assert not predictor.is_image_set and predictor.features is None
        with pytest.raises(RuntimeError, match="An image must be set"):
            predictor.predict(point, label)
