"""Masks for prompts on an image that is encoded once, under segment_anything's names; and on many images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sam_train.inference import embedding_file
from sam_train.inference.inputs import (
    InputError,
    check_image_format,
    check_together,
    checked_box,
    checked_mask,
    checked_points,
    read_pixels,
    split_batch,
)
from sam_train.inference.longest_side import ResizeLongestSide
from sam_train.inference.prompt_groups import decode_in_passes, decode_mixed, full_size, no_answers
from sam_train.models.sam import Sam
from sam_train.structures import ImageFeatures, Prompts

IMAGES_PER_PASS = 4
"""Images of a batch that are encoded together."""

Size = tuple[int, int]
Arrays = tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]


class SamPredictor:
    """Encodes an image, then answers any number of prompts about it.

    Takes the arguments and gives the values of `segment_anything.SamPredictor`; any `Sam` works, whatever
    its encoder and input size. `set_image_batch` and `predict_batch` do the same for many images at once.

    Args:
        sam_model: the model; predictions are made in the mode, precision and place it is in.

    Attributes:
        model: the model.
        transform: images and prompts to the model input frame.
        is_image_set: whether `predict` can answer.
        features: (N, C, h, w) embeddings of what is set, None before.
        original_size: (H, W) of the image as it came, None where none or a batch is set.
        input_size: (H, W) of it in the model input frame, likewise.
        batch_sizes: the same two of each image of a batch, None where there is no batch.
    """

    def __init__(self, sam_model: Sam) -> None:
        self.model = sam_model
        self.transform = ResizeLongestSide(sam_model.image_encoder.img_size)
        self.reset_image()

    @property
    def device(self) -> torch.device:
        return self.model.device

    def reset_image(self) -> None:
        """Forgets the image, or the batch, that is set."""
        self.is_image_set = False
        self.features: Tensor | None = None
        self.original_size: Size | None = None
        self.input_size: Size | None = None
        self.batch_sizes: list[tuple[Size, Size]] | None = None

    def set_image(self, image: Any, image_format: str = "RGB") -> None:
        """Encodes an image for `predict`.

        Args:
            image: (H, W, 3) uint8, or what else `inputs.read_pixels` takes by its rules.
            image_format: the order of its channels, "RGB" or "BGR".

        Raises:
            InputError: the image or its format cannot be taken.
        """
        pixels, original_size = self._resized(image, image_format)
        self.set_torch_image(pixels[None], original_size)

    @torch.no_grad()
    def set_torch_image(
        self, transformed_image: Tensor, original_image_size: tuple[int, ...]
    ) -> None:
        """Encodes an image that is resized already.

        Args:
            transformed_image: (1, 3, H, W), 0 to 255, its longest side that of the model input.
            original_image_size: (H, W) before it was resized.

        Raises:
            InputError: it has another shape.
        """
        shape, side = tuple(transformed_image.shape), self.model.image_encoder.img_size
        in_chans = self.model.image_encoder.in_chans
        if len(shape) != 4 or shape[1] != in_chans or max(shape[2:]) != side:
            raise InputError(
                f"set_torch_image input must be BCHW with long side {side} and {in_chans} channels, got "
                f"shape {shape}"
            )
        self.reset_image()
        height, width = original_image_size
        self.original_size, self.input_size = (int(height), int(width)), (shape[2], shape[3])
        inputs = self.model.preprocess(transformed_image.to(self.device))
        # As a file of embeddings holds them, so that kept ones answer bit for bit.
        self.features = self.model.image_encoder(inputs).contiguous()
        self.is_image_set = True

    def predict(
        self,
        point_coords: np.ndarray | None = None,
        point_labels: np.ndarray | None = None,
        box: np.ndarray | None = None,
        mask_input: np.ndarray | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Answers one prompt about the image that is set; M masks, 3 or 1.

        Args:
            point_coords: (N, 2), (x, y) pixels of the original image.
            point_labels: (N,), 1 for the object, 0 for what is not.
            box: (4,) xyxy, original image.
            mask_input: (1, h, w) low-resolution logits of an earlier answer.
            multimask_output: three candidates, for a single click or box; else the one mask that is
                meant for several prompts.
            return_logits: leave the masks as logits, to be cut at `model.mask_threshold`.

        Returns:
            masks (M, H, W) bool (float32 logits if asked for), their predicted IoU (M,) float32, and
            low-resolution logits (M, h, w) float32, any of which [None] is the next call's mask_input.

        Raises:
            RuntimeError: no image is set.
            InputError: a prompt has another shape or value.
        """
        self._check_is_set()
        prompts = self.to_prompts(point_coords, point_labels, box, mask_input)
        masks, ious, low_res = self._answer(prompts, multimask_output, return_logits)
        return _numpy(masks[0]), _numpy(ious[0]), _numpy(low_res[0])

    @torch.no_grad()
    def predict_torch(
        self,
        point_coords: Tensor | None,
        point_labels: Tensor | None,
        boxes: Tensor | None = None,
        mask_input: Tensor | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Answers P prompts of one kind about the image that is set.

        Args:
            point_coords: (P, N, 2), (x, y) in the model input frame, as `transform` gives them.
            point_labels: (P, N).
            boxes: (P, 4) xyxy, model input frame.
            mask_input: (P, 1, h, w) logits, or (1, 1, h, w) for all prompts.
            multimask_output: three candidates a prompt, else one.
            return_logits: leave the masks as logits.

        Returns:
            masks (P, M, H, W) bool, predicted IoUs (P, M) and low-resolution logits (P, M, h, w).

        Raises:
            RuntimeError: no image is set.
            InputError: points come without labels, a prompt has another shape or value, or there are not
                as many of one kind as of another.
        """
        self._check_is_set()
        side = self.model.low_res_size
        check_together(point_coords, point_labels, boxes, mask_input, side)
        points = (
            None if point_coords is None or point_labels is None else (point_coords, point_labels)
        )
        prompts = self.model.prompt_encoder.to_prompts(points, boxes, mask_input)
        if mask_input is not None and len(mask_input) == 1:
            masks = mask_input.expand(len(prompts.point_coords), -1, -1, -1)
            prompts = prompts._replace(mask_inputs=masks)
        return self._answer(prompts, multimask_output, return_logits)

    def set_image_batch(self, images: Sequence[Any], image_format: str = "RGB") -> None:
        """Encodes several images, of any sizes, for `predict_batch`.

        Args:
            images: as `set_image` takes them.
            image_format: of all of them.

        Raises:
            InputError: there is none, or one cannot be taken.
        """
        if not len(images):
            raise InputError("expected images to set, got none")
        resized = [self._resized(image, image_format) for image in images]
        self.reset_image()
        self.features = torch.cat(
            [
                self._encode([pixels for pixels, _ in resized[start : start + IMAGES_PER_PASS]])
                for start in range(0, len(resized), IMAGES_PER_PASS)
            ]
        ).contiguous()
        self.batch_sizes = [(size, (pixels.shape[1], pixels.shape[2])) for pixels, size in resized]

    @torch.no_grad()
    def predict_batch(
        self,
        point_coords_batch: Sequence[Any] | None = None,
        point_labels_batch: Sequence[Any] | None = None,
        box_batch: Sequence[Any] | None = None,
        mask_input_batch: Sequence[Any] | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> Arrays:
        """Answers any number of prompts about each of the images that are set, in few passes.

        Every argument is a list with an item an image, None for an image without it. An item is either
        what `predict` takes, for one prompt, or that with a dimension more for P prompts, or a list of P
        of them: these may have different numbers of points, and None where a prompt has none of the kind.

        Args:
            point_coords_batch: items (N, 2), or (P, N, 2), or P times (N, 2) in a list.
            point_labels_batch: items (N,), or (P, N), or P times (N,).
            box_batch: items (4,) or (P, 4).
            mask_input_batch: items (1, h, w) or (P, 1, h, w).
            multimask_output: three candidates a prompt, else one.
            return_logits: leave the masks as logits.

        Returns:
            Three lists with an item an image: masks (P, M, H, W), predicted IoUs (P, M) and
            low-resolution logits (P, M, h, w), without the first dimension where the image's prompt came
            without it. The values are those of `predict`.

        Raises:
            RuntimeError: nothing is set.
            InputError: a prompt has another shape or value, or there are not as many as images.
        """
        sizes = self._sizes()
        kinds = (point_coords_batch, point_labels_batch, box_batch, mask_input_batch)
        asked = split_batch(kinds, len(sizes))
        prompts = [
            self.to_prompts(*row, index=i) for i, (rows, _) in enumerate(asked) for row in rows
        ]
        image_index = [i for i, (rows, _) in enumerate(asked) for _ in rows]
        assert self.features is not None
        answers = decode_mixed(
            self.model,
            ImageFeatures(self.features),
            prompts,
            image_index,
            multimask_output=multimask_output,
        )
        found: Arrays = ([], [], [])
        for index, (original_size, input_size) in enumerate(sizes):
            own = [answer for answer, i in zip(answers, image_index, strict=True) if i == index]
            own = own or [no_answers(self.model, multimask_output)]
            low_res, ious = map(torch.cat, zip(*own, strict=True))
            masks = full_size(
                self.model, low_res, input_size, original_size, return_logits=return_logits
            )
            for results, part in zip(found, (masks, ious, low_res), strict=True):
                results.append(_numpy(part if asked[index].has_axis else part[0]))
        return found

    def to_prompts(
        self, point_coords: Any, point_labels: Any, box: Any, mask_input: Any, *, index: int = 0
    ) -> Prompts:
        """One prompt, as `predict` takes it, as tensors in the model input frame.

        Args:
            point_coords, point_labels, box, mask_input: see `predict`.
            index: of the image it is about, where a batch is set.

        Raises:
            RuntimeError: nothing is set.
            InputError: it has another shape or value.
        """
        original_size = self._sizes()[index][0]
        points = boxes = masks = None
        if point_coords is not None:
            coords, labels = checked_points(point_coords, point_labels)
            coords = self.transform.apply_coords(coords, original_size)
            points = self._tensor(coords)[None], torch.from_numpy(labels).to(self.device)[None]
        if box is not None:
            boxes = self._tensor(self.transform.apply_boxes(checked_box(box), original_size))
        if mask_input is not None:
            masks = self._tensor(checked_mask(mask_input, self.model.low_res_size))[None]
        return self.model.prompt_encoder.to_prompts(points, boxes, masks)

    def get_image_embedding(self) -> Tensor:
        """The embedding of what is set: (1, C, h, w), (N, C, h, w) for a batch.

        Raises:
            RuntimeError: nothing is set.
        """
        if self.features is None:
            raise RuntimeError(
                "An image must be set with .set_image(...) to generate an embedding."
            )
        return self.features

    def save_embedding(self, path: str | Path) -> None:
        """Keeps the embeddings of what is set in a safetensors file, to go on with `load_embedding`.

        Raises:
            RuntimeError: nothing is set.
        """
        is_batch = self.batch_sizes is not None
        features = self.get_image_embedding()
        embedding_file.save(Path(path), self.model, features, self._sizes(), is_batch=is_batch)

    def load_embedding(self, path: str | Path) -> None:
        """Sets the image, or the batch, whose embeddings `save_embedding` kept; nothing is encoded.

        Raises:
            FileNotFoundError: there is no such file.
            EmbeddingError: it is damaged, or another encoder made it.
        """
        features, sizes, is_batch = embedding_file.load(Path(path), self.model)
        self.reset_image()
        self.features = features
        if is_batch:
            self.batch_sizes = sizes
        else:
            (self.original_size, self.input_size), self.is_image_set = sizes[0], True

    def _resized(self, image: Any, image_format: str) -> tuple[Tensor, Size]:
        """Pixels (C, h, w) uint8 resized to the model input, and the original (H, W)."""
        check_image_format(image_format)
        pixels = read_pixels(image, in_chans=self.model.image_encoder.in_chans)
        if image_format != self.model.image_format:
            pixels = pixels[..., ::-1]
        resized = torch.from_numpy(self.transform.apply_image(pixels))
        return resized.permute(2, 0, 1).contiguous(), (pixels.shape[0], pixels.shape[1])

    @torch.no_grad()
    def _encode(self, images: Sequence[Tensor]) -> Tensor:
        inputs = [self.model.preprocess(image.to(self.device)) for image in images]
        return self.model.image_encoder(torch.stack(inputs))

    def _check_is_set(self) -> None:
        if self.batch_sizes is not None:
            raise RuntimeError("A batch of images is set: ask predict_batch, or set one image.")
        if not self.is_image_set:
            raise RuntimeError("An image must be set with .set_image(...) before mask prediction.")

    def _sizes(self) -> list[tuple[Size, Size]]:
        if self.batch_sizes is not None:
            return self.batch_sizes
        self._check_is_set()
        assert self.original_size is not None and self.input_size is not None
        return [(self.original_size, self.input_size)]

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float, device=self.device)

    @torch.no_grad()
    def _answer(
        self, prompts: Prompts, multimask_output: bool, return_logits: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert self.features is not None
        assert self.original_size is not None and self.input_size is not None
        low_res, ious = decode_in_passes(
            self.model,
            ImageFeatures(self.features),
            prompts,
            multimask_output=multimask_output,
        )
        masks = full_size(
            self.model, low_res, self.input_size, self.original_size, return_logits=return_logits
        )
        return masks, ious, low_res


def _numpy(values: Tensor) -> np.ndarray:
    # NumPy has no bfloat16, which autocast may answer in.
    values = values if values.dtype == torch.bool else values.float()
    return values.detach().cpu().numpy()
