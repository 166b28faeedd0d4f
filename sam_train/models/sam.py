"""The image model: encoder, prompt encoder and decoder, called as in `segment_anything` and in batches."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam_train.models.first_guess import PromptFrame
from sam_train.models.mask_decoder import MaskDecoder
from sam_train.models.prompt_encoder import PromptEncoder
from sam_train.structures import ImageFeatures, MaskPrediction, Prompts

SAM_PIXEL_MEAN = (123.675, 116.28, 103.53)
SAM_PIXEL_STD = (58.395, 57.12, 57.375)


class Sam(nn.Module):
    """Segments what prompts point at.

    Args:
        image_encoder: images to embeddings; has `img_size`, `stride`, `in_chans` and `out_chans`.
        prompt_encoder: prompts to embeddings.
        mask_decoder: both to masks.
        pixel_mean: of each input channel, on the scale of 0 to 255.
        pixel_std: likewise.
        compile_encoder: run the image encoder through `torch.compile`.
    """

    mask_threshold: float = 0.0
    image_format: str = "RGB"
    # Any module with the encoders' attributes: SAM's ViT, TinyViT, a timm backbone, a user's own.
    image_encoder: Any
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        *,
        image_encoder: Any,
        prompt_encoder: PromptEncoder,
        mask_decoder: MaskDecoder,
        pixel_mean: Sequence[float] = SAM_PIXEL_MEAN,
        pixel_std: Sequence[float] = SAM_PIXEL_STD,
        compile_encoder: bool = False,
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder
        given = getattr(image_encoder, "high_res_chans", 0)
        wanted = mask_decoder.first_guess.high_res_dim if mask_decoder.first_guess else 0
        if given != wanted:
            raise ValueError(
                f"image_encoder.high_res_chans is {given}, but mask_decoder.first_guess takes {wanted} "
                "(0 where there is none)"
            )
        prompt_encoder.feeds_guess = mask_decoder.first_guess is not None
        self.set_img_size(image_encoder.img_size)
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            if len(values) != image_encoder.in_chans:
                raise ValueError(
                    f"{name} has a value for each of the image encoder's {image_encoder.in_chans} "
                    f"channels, got {len(values)}"
                )
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)
        if compile_encoder:
            # In place, so that the weights keep their names.
            self.image_encoder.compile()

    def set_img_size(self, img_size: int) -> None:
        """Takes square inputs of this side from now on, pixels; the weights stay as they are."""
        stride = self.image_encoder.stride
        if img_size % stride:
            raise ValueError(f"img_size must be a multiple of the stride {stride}, got {img_size}")
        self.image_encoder.img_size = img_size
        tokens = img_size // stride
        self.prompt_encoder.set_image_size((img_size, img_size), (tokens, tokens))

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    @property
    def low_res_size(self) -> int:
        """Side of the square low-resolution masks, pixels."""
        return self.prompt_encoder.mask_input_size[0]

    def preprocess(self, x: Tensor) -> Tensor:
        """Normalises (..., 3, H, W) pixels of 0 to 255 and pads them to the square input."""
        x = (x - self.pixel_mean) / self.pixel_std
        side = self.image_encoder.img_size
        return F.pad(x, (0, side - x.shape[-1], 0, side - x.shape[-2]))

    def encode(self, images: Tensor, input_sizes: Tensor) -> ImageFeatures:
        """Encodes a padded batch.

        Args:
            images: (N, 3, S, S), 0 to 255, of any dtype; padded at the bottom and right.
            input_sizes: (N, 2) the (H, W) that is not padding.
        """
        x = normalised(images, input_sizes, self.pixel_mean, self.pixel_std)
        return ImageFeatures(self.image_encoder(x))

    def decode(
        self,
        features: ImageFeatures,
        prompts: Prompts,
        *,
        image_index: Tensor | None = None,
        multimask_output: bool,
    ) -> MaskPrediction:
        """Answers P prompts.

        Args:
            features: of N images; of one where `image_index` is None.
            prompts: model input frame.
            image_index: (P,) the image each prompt belongs to.
            multimask_output: three candidates a prompt, else one.

        Where no gradient is wanted, the CPU answers in float32, also under autocast.
        """
        features, precision = self._for_decoder(features)
        with precision:
            sparse, dense = self.prompt_encoder.embed_unread(prompts)
            low_res_masks, iou_predictions = self.mask_decoder(
                image_embeddings=features.image_embeddings,
                image_pe=self.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=multimask_output,
                image_index=image_index,
            )
        return MaskPrediction(low_res_masks, iou_predictions)

    def guess(
        self, features: ImageFeatures, prompts: Prompts, *, image_index: Tensor | None = None
    ) -> MaskPrediction:
        """The decoder's first guess at P prompts, without its transformer: far cheaper than `decode`.

        Args:
            features: of N images; of one where `image_index` is None.
            prompts: model input frame; see `PromptFrame.of_prompts` for which of them counts.
            image_index: (P,) the image each prompt belongs to.

        Returns:
            Masks at half the resolution of `decode`'s.
        """
        frame = PromptFrame.of_prompts(
            prompts.point_coords,
            prompts.point_labels,
            self.prompt_encoder.input_image_size,
            corrects=prompts.mask_inputs is not None,
        )
        features, precision = self._for_decoder(features)
        with precision:
            return self.mask_decoder.guess(features.image_embeddings, frame, image_index)

    def _for_decoder(
        self, features: ImageFeatures
    ) -> tuple[ImageFeatures, AbstractContextManager[object]]:
        """The features, and what they are to be decoded within.

        On the CPU, where no gradient is wanted, that is float32: half precision costs the decoder up to 2.5
        times the time there, also where the processor is made for it, as its products are small and images
        cannot be shared among prompts. With gradients autocast still halves what the backward pass needs.
        """
        images = features.image_embeddings
        parts = (self.prompt_encoder, self.mask_decoder)
        if (
            images.device.type == "cpu"
            and torch.is_autocast_enabled("cpu")
            and not torch.is_grad_enabled()
            and all(p.dtype == torch.float32 for part in parts for p in part.parameters())
        ):
            return ImageFeatures(images.float()), torch.autocast("cpu", enabled=False)
        return features, nullcontext()

    def postprocess_masks(
        self, masks: Tensor, input_size: tuple[int, int], original_size: tuple[int, int]
    ) -> Tensor:
        """Takes low-resolution logits (P, M, h, w) to the original (H, W): still logits."""
        side = self.image_encoder.img_size
        masks = F.interpolate(masks, (side, side), mode="bilinear", align_corners=False)
        masks = masks[..., : input_size[0], : input_size[1]]
        return F.interpolate(masks, original_size, mode="bilinear", align_corners=False)

    def forward(
        self, batched_input: Sequence[dict[str, Any]], multimask_output: bool
    ) -> list[dict[str, Tensor]]:
        """Segments images with their prompts, as `segment_anything` does, gradients where they are on.

        Args:
            batched_input: a dict an image: `image` (3, H, W) resized, `original_size`, and any of
                `point_coords` (P, N, 2) with `point_labels` (P, N), `boxes` (P, 4) and `mask_inputs`
                (P, 1, h, w), in the model input frame.
            multimask_output: three candidates a prompt, else one.

        Returns:
            A dict an image: `masks` (P, M, H, W) bool at the original size, `iou_predictions` (P, M)
            and `low_res_logits` (P, M, h, w).
        """
        images = torch.stack([self.preprocess(entry["image"]) for entry in batched_input])
        image_embeddings = self.image_encoder(images)
        return [
            self._answer(entry, embedding[None], multimask_output)
            for entry, embedding in zip(batched_input, image_embeddings, strict=True)
        ]

    def _answer(
        self, entry: dict[str, Any], image_embedding: Tensor, multimask_output: bool
    ) -> dict[str, Tensor]:
        has_points = "point_coords" in entry
        prompts = self.prompt_encoder.to_prompts(
            points=(entry["point_coords"], entry["point_labels"]) if has_points else None,
            boxes=entry.get("boxes"),
            masks=entry.get("mask_inputs"),
        )
        low_res_masks, iou_predictions = self.decode(
            ImageFeatures(image_embedding), prompts, multimask_output=multimask_output
        )
        masks = self.postprocess_masks(
            low_res_masks, tuple(entry["image"].shape[-2:]), entry["original_size"]
        )
        return {
            "masks": masks > self.mask_threshold,
            "iou_predictions": iou_predictions,
            "low_res_logits": low_res_masks,
        }


def normalised(
    images: Tensor, input_sizes: Tensor, pixel_mean: Tensor, pixel_std: Tensor
) -> Tensor:
    """A padded batch as an encoder is shown it: (N, 3, S, S) of 0 to 255, with (N, 2) sizes."""
    x = (images - pixel_mean) / pixel_std
    rows = torch.arange(x.shape[-2], device=x.device) < input_sizes[:, :1]
    columns = torch.arange(x.shape[-1], device=x.device) < input_sizes[:, 1:]
    # The padding is zero after normalisation, as in `preprocess`.
    return x * (rows[:, :, None] & columns[:, None, :])[:, None]
