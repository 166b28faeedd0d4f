"""What SamPredictor does beyond the published one: our own models, batches, images of other kinds."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sam_train.inference import prompt_groups
from sam_train.inference.embedding_file import EmbeddingError
from sam_train.inference.inputs import InputError
from sam_train.inference.predictor import SamPredictor
from sam_train.metrics.click_rollout import EncodedImage
from sam_train.models.fingerprint import encoder_id
from sam_train.models.sam import Sam
from sam_train.structures import Prompts

Picture = Callable[[int, int], np.ndarray]
POINTS = np.array([[30.0, 20.0], [70, 50], [12, 44]])
BOX = np.array([10.0, 5, 80, 60])


@pytest.fixture
def predictor(tiny_sam: Sam) -> SamPredictor:
    """Our own kind of model: another encoder, at 64 px, whose decoder starts from a first guess."""
    tiny_sam.set_img_size(64)
    return SamPredictor(tiny_sam)


def masks_like(predictor: SamPredictor, seed: int) -> np.ndarray:
    side = predictor.model.low_res_size
    return 3 * np.random.default_rng(seed).standard_normal((1, side, side)).astype(np.float32)


def test_our_own_models_answer_as_in_evaluation(predictor: SamPredictor, picture: Picture) -> None:
    image = picture(70, 100)
    predictor.set_image(image)

    masks, ious, low_res = predictor.predict(POINTS[:1], np.array([1]))

    assert masks.shape == (3, 70, 100) and low_res.shape == (3, 32, 32)
    prompts = Prompts(
        torch.tensor([[[30.0, 20.0], [0, 0]]]), torch.tensor([[1, -1]])
    )  # a point and its padding
    with torch.no_grad():
        encoded = EncodedImage.encode(predictor.model, image)
        expected = encoded.decode(prompts, multimask_output=True)
        assert (encoded.masks(expected.low_res_masks[0]).numpy() == masks).mean() > 0.9999
    np.testing.assert_allclose(low_res, expected.low_res_masks[0], atol=1e-5)
    np.testing.assert_allclose(ious, expected.iou_predictions[0], atol=1e-5)
    for box, mask in ((BOX, None), (None, low_res[:1]), (BOX, low_res[:1])):
        refined = predictor.predict(POINTS, np.array([1, 0, 1]), box, mask, multimask_output=False)
        assert refined[0].shape == (1, 70, 100)


def test_a_batch_of_images_and_mixed_prompts_answers_each_as_it_is_answered_alone(
    predictor: SamPredictor, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [picture(70, 100), picture(100, 61), picture(64, 64), picture(9, 90), picture(33, 35)]
    masks = [masks_like(predictor, seed) for seed in (0, 1)]
    coords = [
        [POINTS[:1], POINTS, POINTS[1:], None],
        POINTS,
        np.stack([POINTS[:2], POINTS[1:]]),
        None,
        None,
    ]
    labels = [[[1], [1, 0, 1], [0, 1], None], [1, 1, 0], [[1, 0], [1, 1]], None, None]
    boxes = [[None, None, BOX, BOX], None, None, np.stack([BOX, BOX / 2, BOX / 3]), BOX]
    mask_inputs = [[None, masks[0], None, None], None, masks, None, None]
    monkeypatch.setattr(prompt_groups, "PROMPTS_PER_PASS", 2)
    predictor.set_image_batch(images)

    got = predictor.predict_batch(coords, labels, boxes, mask_inputs)
    logits = predictor.predict_batch(coords, labels, boxes, mask_inputs, return_logits=True)[0]

    assert [part.shape for part in got[0]] == [
        (4, 3, 70, 100),
        (3, 100, 61),
        (2, 3, 64, 64),
        (3, 3, 9, 90),
        (3, 33, 35),
    ]
    monkeypatch.undo()
    for index, image in enumerate(images):
        predictor.set_image(image)
        several = got[0][index].ndim == 4
        columns = (coords, labels, boxes, mask_inputs)
        for row in range(len(got[0][index]) if several else 1):
            asked = [kind[index] for kind in columns]
            if several:
                asked = [None if kind is None else kind[row] for kind in asked]
            expected = predictor.predict(*asked)
            alone = [part[index][row] if several else part[index] for part in got]
            for ours, theirs in zip(alone[1:], expected[1:], strict=True):
                np.testing.assert_allclose(ours, theirs, atol=1e-5)
            near = np.abs(logits[index][row] if several else logits[index]) < 1e-5
            assert (alone[0] == expected[0])[~near].all()


def test_a_batch_is_no_single_image(predictor: SamPredictor, picture: Picture) -> None:
    predictor.set_image_batch([picture(20, 30)])

    with pytest.raises(RuntimeError, match="ask predict_batch"):
        predictor.predict(POINTS[:1], np.array([1]))
    assert predictor.predict_batch(box_batch=[BOX], multimask_output=False)[0][0].shape == (
        1,
        20,
        30,
    )
    predictor.set_image(picture(20, 30))
    assert predictor.predict_batch(box_batch=[BOX])[0][0].shape == (3, 20, 30)
    with pytest.raises(InputError, match="none"):
        predictor.set_image_batch([])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"box_batch": [BOX]}, "each of the 2 images"),
        ({"box_batch": [BOX, None]}, "image 1 of the batch has no prompt"),
        ({"point_coords_batch": [POINTS, POINTS]}, "point_labels must be supplied"),
        (
            {"box_batch": [[BOX, BOX], BOX], "mask_input_batch": [[None], None]},
            "image 0 of the batch has .* different numbers",
        ),
        ({"box_batch": [np.zeros((1, 1, 4)), BOX]}, "expected 1 dimensions for one prompt"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(
    predictor: SamPredictor, picture: Picture, arguments: dict[str, Any], message: str
) -> None:
    predictor.set_image_batch([picture(20, 30), picture(30, 20)])
    with pytest.raises(InputError, match=message):
        predictor.predict_batch(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"point_coords": [3, 4], "point_labels": [1]}, r"point_coords \(N, 2\)"),
        ({"point_coords": [[3, 4]], "point_labels": [1, 0]}, r"shapes \(1, 2\) and \(2,\)"),
        ({"point_coords": [[3, np.nan]], "point_labels": [1]}, "NaN"),
        ({"point_coords": [[3, 4]], "point_labels": [7]}, "1 for the object"),
        ({"box": np.zeros((2, 4))}, "for many use predict_torch"),
        ({"mask_input": np.zeros((3, 32, 32))}, r"expected mask_input \(1, 32, 32\)"),
        ({"mask_input": np.zeros((1, 70, 100))}, "low-resolution logits"),
    ],
)
def test_a_prompt_of_another_shape_is_refused_with_what_was_expected(
    predictor: SamPredictor, picture: Picture, arguments: dict[str, Any], message: str
) -> None:
    predictor.set_image(picture(70, 100))
    with pytest.raises(InputError, match=message):
        predictor.predict(**arguments)


def test_one_mask_prompt_serves_many_boxes(predictor: SamPredictor, picture: Picture) -> None:
    predictor.set_image(picture(64, 64))
    mask = torch.from_numpy(masks_like(predictor, 0))[None]
    boxes = torch.tensor([[1.0, 2, 30, 40], [20, 20, 60, 60]])

    together = predictor.predict_torch(None, None, boxes, mask)
    alone = predictor.predict_torch(None, None, boxes[1:], mask)

    torch.testing.assert_close(together[2][1:], alone[2], rtol=0, atol=1e-5)


def test_masks_are_the_same_whether_made_at_once_or_one_at_a_time(
    predictor: SamPredictor, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor.set_image(picture(50, 64))
    boxes = torch.tensor([[1.0, 2, 30, 40], [20, 20, 60, 60]])
    together = predictor.predict_torch(None, None, boxes, return_logits=True)[0]
    monkeypatch.setattr(prompt_groups, "MAX_LOGITS", 1)

    apart = predictor.predict_torch(None, None, boxes, return_logits=True)[0]

    torch.testing.assert_close(apart, together, rtol=0, atol=1e-6)


@pytest.mark.parametrize("decodes_in_half", [False, True], ids=["CPU", "as on a GPU"])
def test_answers_are_arrays_under_autocast_too(
    decodes_in_half: bool,
    predictor: SamPredictor,
    picture: Picture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if decodes_in_half:
        monkeypatch.setattr(predictor.model, "_for_decoder", lambda x: (x, nullcontext()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        predictor.set_image(picture(50, 64))
        masks, ious, low_res = predictor.predict(POINTS[:1], [1])
    assert (masks.dtype, ious.dtype, low_res.dtype) == (bool, np.float32, np.float32)


def test_no_prompts_give_no_masks(predictor: SamPredictor, picture: Picture) -> None:
    predictor.set_image(picture(50, 64))
    masks, ious, low_res = predictor.predict_torch(None, None, torch.zeros(0, 4))
    assert (masks.shape, ious.shape, low_res.shape) == ((0, 3, 50, 64), (0, 3), (0, 3, 32, 32))

    predictor.set_image_batch([picture(50, 64), picture(20, 30)])
    masks_batch = predictor.predict_batch(box_batch=[np.zeros((0, 4)), [BOX]])[0]
    assert [masks.shape for masks in masks_batch] == [(0, 3, 50, 64), (1, 3, 20, 30)]


def test_kept_embeddings_answer_as_before(
    tmp_path: Path, predictor: SamPredictor, picture: Picture
) -> None:
    predictor.set_image(picture(40, 90))
    expected = predictor.predict(POINTS[:1], [1])
    predictor.save_embedding(tmp_path / "one.safetensors")
    predictor.set_image_batch([picture(40, 90), picture(50, 20)])
    in_batch = predictor.predict_batch(box_batch=[BOX, BOX])
    predictor.save_embedding(tmp_path / "two.safetensors")
    another = SamPredictor(predictor.model)

    another.load_embedding(tmp_path / "one.safetensors")
    for got, wanted in zip(another.predict(POINTS[:1], [1]), expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-6)
    another.load_embedding(tmp_path / "two.safetensors")
    for got, wanted in zip(
        another.predict_batch(box_batch=[BOX, BOX])[2], in_batch[2], strict=True
    ):
        np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_embeddings_of_another_encoder_or_damaged_are_refused(
    tmp_path: Path, predictor: SamPredictor, picture: Picture
) -> None:
    path = tmp_path / "one.safetensors"
    with pytest.raises(RuntimeError, match="An image must be set"):
        predictor.save_embedding(path)
    with pytest.raises(FileNotFoundError, match="no such file of embeddings"):
        predictor.load_embedding(path)
    predictor.set_image(picture(40, 90))
    predictor.save_embedding(path)
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    with pytest.raises(EmbeddingError, match="damaged or cut short"):
        predictor.load_embedding(path)
    tensors = {"features": predictor.get_image_embedding().contiguous()}
    for sizes in ("[[[1, 2]", '{"a": 1}', "[[1, 2]]", "[]"):
        metadata = {"format": "1", "encoder": encoder_id(predictor.model), "sizes": sizes}
        save_file(tensors, path, metadata | {"is_batch": "false"})
        with pytest.raises(EmbeddingError, match="damaged"):
            predictor.load_embedding(path)
    save_file(tensors, path)
    with pytest.raises(EmbeddingError, match="holds no embeddings saved by a predictor"):
        predictor.load_embedding(path)
    path.write_bytes(data)
    with torch.no_grad():
        next(predictor.model.mask_decoder.parameters()).add_(1)
        predictor.load_embedding(path)  # the decoder has no part in it
        next(predictor.model.image_encoder.parameters()).add_(1)
    with pytest.raises(EmbeddingError, match="another encoder .*load the model that made them"):
        predictor.load_embedding(path)
