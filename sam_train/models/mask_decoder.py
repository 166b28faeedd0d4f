"""From image and prompt embeddings to masks and their predicted IoU (SAM, appendix A)."""

from __future__ import annotations

from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam_train.models.common import MLP, DenseCells, can_look_at
from sam_train.models.first_guess import SOFT_LOGIT, FirstGuess, PromptFrame
from sam_train.models.first_looks import FirstImages
from sam_train.models.products import Linear, runs_now
from sam_train.models.shared_image import PositionSights, SharedImage, SharedLinear
from sam_train.models.two_way_transformer import TwoWayTransformer
from sam_train.models.upscaling import Upscaling, upscale_by_call
from sam_train.structures import MaskPrediction

MIN_SHARING = 4
MIN_SHARED_TOKENS = 16384
MIN_IMAGE_TOKENS = 1024
"""Prompts an image, image tokens of all of these, and of one, from which on sharing the image through all layers
saves time over sharing it before the first alone."""
CHUNK_TOKENS = 16384
"""Image tokens of the prompts that are answered at a time."""


class Start(NamedTuple):
    """What the transformer sees, and what its answer is added to.

    Attributes:
        image_embeddings: (N, C, h, w).
        sparse, dense: prompt embeddings; with a first guess, it is read into the dense one.
        high_res: (N, h, w, 4, C / 4) finer features of the image, for the upscaling; None, as are the
            next two, where there is no first guess.
        masks: (P, M or 1, 4h, 4w) logits.
        ious: (P, M or 1).
    """

    image_embeddings: Tensor
    sparse: Tensor
    dense: Tensor
    high_res: Tensor | None = None
    masks: Tensor | None = None
    ious: Tensor | None = None


def best_candidate(masks: Tensor, ious: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Of (P, M, h, w) masks and their (P, M) IoUs the ones of highest score (P, M): (P, 1, h, w), (P, 1)."""
    best = scores.argmax(dim=1)
    rows = torch.arange(len(best), device=best.device)
    return masks[rows, best][:, None], ious[rows, best][:, None]


class MaskDecoder(nn.Module):
    """One mask for a prompt that is clear, three candidates for one that may be ambiguous.

    Args:
        transformer_dim: C.
        transformer: the two-way transformer.
        num_multimask_outputs: candidates for a single prompt (whole, part, subpart).
        iou_head_depth: layers of the head that predicts each mask's IoU.
        iou_head_hidden_dim: its inner width.
        first_guess: if set, answers start from its guess or from the mask prompt, and the transformer
            mends them; the published model has no such part.
    """

    def __init__(
        self,
        *,
        transformer_dim: int,
        transformer: TwoWayTransformer,
        num_multimask_outputs: int = 3,
        iou_head_depth: int = 3,
        iou_head_hidden_dim: int = 256,
        first_guess: FirstGuess | None = None,
    ) -> None:
        super().__init__()
        self.transformer_dim = transformer_dim
        self.transformer = transformer
        self.num_multimask_outputs = num_multimask_outputs
        self.num_mask_tokens = num_multimask_outputs + 1
        self.iou_token = nn.Embedding(1, transformer_dim)
        self.mask_tokens = nn.Embedding(self.num_mask_tokens, transformer_dim)
        self.output_upscaling = Upscaling(transformer_dim)
        # One MLP a token, as in the released weights: a shared one could not load them.
        self.output_hypernetworks_mlps = nn.ModuleList(
            MLP(transformer_dim, transformer_dim, transformer_dim // 8, num_layers=3)
            for _ in range(self.num_mask_tokens)
        )
        self.iou_prediction_head = MLP(
            transformer_dim, iou_head_hidden_dim, self.num_mask_tokens, num_layers=iou_head_depth
        )
        self.first_guess = first_guess
        if first_guess is not None:
            if first_guess.num_candidates != num_multimask_outputs:
                raise ValueError(
                    f"the first guess has {first_guess.num_candidates} candidates, the decoder "
                    f"{num_multimask_outputs}"
                )
            self.high_res_proj = Linear(first_guess.high_res_dim, transformer_dim // 4, bias=False)
            for mlp in (*self.output_hypernetworks_mlps, self.iou_prediction_head):
                # Next to nothing is mended at the start.
                last = mlp.layers[-1]
                nn.init.normal_(last.weight, std=0.1 * last.in_features**-0.5)
                nn.init.zeros_(last.bias)

    def forward(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor | DenseCells,
        multimask_output: bool,
        image_index: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Predicts masks.

        Args:
            image_embeddings: (N, C, h, w). Without `image_index`, N is 1, one image for all prompts.
            image_pe: (1, C, h, w) position code of the image tokens.
            sparse_prompt_embeddings: (P, T, C) of points and boxes.
            dense_prompt_embeddings: (P or 1, C, h, w) of masks, or what they are made of. With a first guess,
                all three embeddings hold what the model's own encoders add for it
                (`PromptEncoder.feeds_guess`, `TimmEncoder.high_res_chans`).
            multimask_output: the candidates, else the single mask's token.
            image_index: (P,) the image that each prompt belongs to.

        Returns:
            low_res_masks (P, M, 4h, 4w), logits, and iou_predictions (P, M); M is
            `num_multimask_outputs` or 1.

        Raises:
            ValueError: there are not as many dense embeddings or indices as prompts, or one is of no image.
        """
        num_prompts = len(sparse_prompt_embeddings)
        if image_index is None and len(image_embeddings) != 1:
            raise ValueError(
                f"expected one image embedding for all prompts, got {len(image_embeddings)}: "
                "say which image each prompt belongs to with image_index"
            )
        if image_index is not None:
            _check_index(image_index, num_prompts, len(image_embeddings))
        wanted = slice(1, None) if multimask_output else slice(0, 1)
        sparse, dense = sparse_prompt_embeddings, _for_each(dense_prompt_embeddings, num_prompts)
        if num_prompts == 0:
            return self._no_answers(image_embeddings, wanted)
        if self._shares_images(image_embeddings, sparse, dense):
            tokens = self._tokens(sparse)
            return self._decode_shared(
                image_embeddings, image_pe, tokens, dense, wanted, image_index
            )
        first = self._first_images(image_embeddings, dense, image_index, num_prompts)
        tokens = self._tokens(sparse)
        if first is not None and self.transformer.shares_first_layer(first.images, tokens):
            tokens, image_tokens = self.transformer.forward_shared(first, image_pe, tokens)
            image_tokens = image_tokens.unflatten(1, image_embeddings.shape[-2:])
            return self._masks(tokens, image_tokens, None, wanted)
        if isinstance(dense, DenseCells):
            dense = dense.embeddings()
        start = self.start(image_embeddings, sparse, dense, image_index)
        return self.answer(start, image_pe, image_index, wanted)

    def answer(
        self, start: Start, image_pe: Tensor, image_index: Tensor | None, wanted: slice
    ) -> tuple[Tensor, Tensor]:
        """The masks of the wanted mask tokens: the first is the single mask's, the others the candidates'.

        Args:
            start: of `MaskDecoder.start`.
            image_pe, image_index: as for `forward`.
            wanted: `slice(0, 1)`, `slice(1, None)`, or all tokens.
        """
        image_embeddings, sparse, dense, high_res, start_masks, start_ious = start
        if image_index is not None:
            image_embeddings = image_embeddings[image_index]
            high_res = None if high_res is None else high_res[image_index]
        src = image_embeddings + dense
        tokens, image_tokens = self.transformer(src, image_pe, self._tokens(sparse))
        image_tokens = image_tokens.unflatten(1, src.shape[-2:])
        masks, ious = self._masks(tokens, image_tokens, high_res, wanted)
        if start_masks is None or start_ious is None:
            return masks, ious
        if wanted.start != 1 and start_masks.shape[1] > 1:
            best_masks, best_ious = best_candidate(start_masks, start_ious, start_ious)
            is_one = wanted.stop == 1
            start_masks = best_masks if is_one else torch.cat([best_masks, start_masks], dim=1)
            start_ious = best_ious if is_one else torch.cat([best_ious, start_ious], dim=1)
        return start_masks + masks, start_ious + ious

    def _first_images(
        self,
        image_embeddings: Tensor,
        dense: Tensor | DenseCells,
        image_index: Tensor | None,
        num_prompts: int,
    ) -> FirstImages | None:
        """What prompts share before the first layer; None where each has image tokens of its own."""
        if self.first_guess is not None or type(self.transformer) is not TwoWayTransformer:
            return None
        if isinstance(dense, Tensor) and dense.stride(0) != 0:
            return None
        # However they lay: those read from a file answer bit for bit as those of the encoder.
        images = image_embeddings.flatten(2).transpose(1, 2).contiguous()
        if image_index is None:
            image_index = torch.zeros(num_prompts, dtype=torch.long, device=images.device)
        if isinstance(dense, Tensor):
            return FirstImages(images + dense[0].flatten(1).T, image_index)
        cells = dense.cells.flatten(1, 2).mT
        return FirstImages(images + dense.bias, image_index, cells, dense.weight.T)

    def _masks(
        self, tokens: Tensor, image_tokens: Tensor, high_res: Tensor | None, wanted: slice
    ) -> tuple[Tensor, Tensor]:
        """Logits and predicted IoUs of what the transformer leaves, (P, T, C) and (P, h, w, C)."""
        upscaling, filters = self.output_upscaling, self._filters(tokens, wanted)
        if self._upscales_by_weights():
            upscaled, bias = upscaling.first(image_tokens)
            upscaled = upscaled if high_res is None else upscaled + high_res
            masks = upscaling.masks(upscaled, filters, bias)
        else:
            upscaled = upscale_by_call(upscaling, image_tokens.permute(0, 3, 1, 2), high_res)
            masks = (filters @ upscaled.flatten(2)).unflatten(2, upscaled.shape[-2:])
        return masks, self.iou_prediction_head(tokens[:, 0])[:, wanted]

    def guess(
        self, image_embeddings: Tensor, frame: PromptFrame, image_index: Tensor | None
    ) -> MaskPrediction:
        """The first guess by itself, at half the resolution of the answers.

        Args:
            image_embeddings: (N, C + 4F, h, w), as the encoder gives them.
            frame: of P prompts.
            image_index: (P,) the image each prompt belongs to; None where there is one image.
        """
        assert self.first_guess is not None
        embeddings, high_res = self._unfold(image_embeddings, self.first_guess)
        cells = high_res.unflatten(3, (2, 2)).permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)
        if image_index is None:
            image_index = torch.zeros(len(frame.sign), dtype=torch.long, device=cells.device)
        return self.first_guess(embeddings, cells, frame, image_index)

    def _unfold(self, image_embeddings: Tensor, part: FirstGuess) -> tuple[Tensor, Tensor]:
        """(N, C + 4F, h, w) to the embedding (N, C, h, w) and fine features (N, h, w, 4, F)."""
        expected = part.embed_dim + 4 * part.high_res_dim
        if image_embeddings.shape[1] != expected:
            raise ValueError(
                f"the first guess needs embeddings of {expected} channels, got "
                f"{image_embeddings.shape[1]}: those of its own image encoder, fine features included"
            )
        embeddings, folded = image_embeddings.split([part.embed_dim, 4 * part.high_res_dim], dim=1)
        return embeddings, folded.unflatten(1, (-1, 4)).permute(0, 3, 4, 2, 1)

    def start(
        self, image_embeddings: Tensor, sparse: Tensor, dense: Tensor, image_index: Tensor | None
    ) -> Start:
        """Guesses, and takes the numbers that came with the prompt embeddings off them again.

        Without a first guess it only packs the arguments, which are those of `forward`.
        """
        part = self.first_guess
        if part is None:
            return Start(image_embeddings, sparse, dense)
        frame = PromptFrame.from_token(sparse[:, :1])
        guess = self.guess(image_embeddings, frame, image_index)
        embeddings, high_res = self._unfold(image_embeddings, part)
        dense, folded = dense[:, : part.embed_dim], dense[:, part.embed_dim :]
        if folded.shape[1]:
            logits = F.pixel_shuffle(folded, int(folded.shape[1] ** 0.5))
            # Softly bounded, so that what was sure before can be taken back.
            masks = SOFT_LOGIT * torch.tanh(logits / SOFT_LOGIT)
            ious = masks.new_zeros(len(masks), 1)
        else:
            masks = F.interpolate(
                guess.low_res_masks, scale_factor=2, mode="bilinear", align_corners=False
            )
            # What is not the object is no place to start from.
            masks = masks * (frame.sign > 0)[:, :, None, None].to(masks.dtype)
            ious = guess.iou_predictions
        return Start(
            embeddings,
            sparse[:, 1:],
            dense + part.as_dense(guess, frame.sign),
            self.high_res_proj(high_res),
            masks,
            ious,
        )

    def _tokens(self, sparse_prompt_embeddings: Tensor) -> Tensor:
        output_tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        output_tokens = output_tokens.expand(len(sparse_prompt_embeddings), -1, -1)
        return torch.cat([output_tokens, sparse_prompt_embeddings], dim=1)

    def _shares_images(self, images: Tensor, sparse: Tensor, dense: Tensor | DenseCells) -> bool:
        """Whether many prompts look at the same image tokens, but for a few rows of their own."""
        # Which prompts are of which image is no part of a graph.
        if self.first_guess is not None or not runs_now():
            return False
        num_image_tokens = images[0, 0].numel()
        least = max(MIN_SHARING, MIN_SHARED_TOKENS / num_image_tokens)
        if num_image_tokens < MIN_IMAGE_TOKENS or len(sparse) < least * len(images):
            return False
        if not self._upscales_by_weights():
            return False
        # Another transformer is asked nothing that only this one knows.
        if type(self.transformer) is not TwoWayTransformer:
            return False
        if isinstance(dense, Tensor) and dense.stride(0) != 0:
            return False
        num_cells = 0 if isinstance(dense, Tensor) else dense.weight.shape[1]
        num_tokens = 1 + self.num_mask_tokens + sparse.shape[1]
        return self.transformer.keeps_rows(num_tokens, num_cells) and _is_precise(sparse)

    def _decode_shared(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        tokens: Tensor,
        dense: Tensor | DenseCells,
        wanted: slice,
        image_index: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The answers without a copy of an image for each prompt: see `SharedImage`."""
        positions = PositionSights(self.transformer, image_pe[0].flatten(1).T)
        upscaling = self.output_upscaling
        weight, bias = upscaling.first_as_linear()
        size = image_embeddings.shape[-2:]
        cells = dense if isinstance(dense, DenseCells) else None
        common = dense[0].flatten(1).T if isinstance(dense, Tensor) else dense.bias
        if image_index is None:
            image_index = torch.zeros(len(tokens), dtype=torch.long)
        # What a few prompts need at a time stays in the cache.
        chunk = max(1, CHUNK_TOKENS // (size[0] * size[1]))
        order, runs = _runs(image_index, chunk)
        masks, ious = [], []
        for number, of_image in groupby(runs, key=itemgetter(0)):
            image = image_embeddings[number].flatten(1).T + common
            shared = SharedImage(
                self.transformer, image, positions, None if cells is None else cells.weight.T
            )
            upscale = SharedLinear(shared, weight, bias)
            for _, run in of_image:
                rows = run if order is None else order[run]
                own_cells = None if cells is None else cells.cells[rows].flatten(1, 2).mT
                answered, own = shared(tokens[rows], own_cells)
                upscaled = upscale(own).unflatten(2, (4, -1)).unflatten(1, size)
                masks.append(upscaling.masks(upscaled, self._filters(answered, wanted)))
                ious.append(self.iou_prediction_head(answered[:, 0])[:, wanted])
        if order is None:
            return torch.cat(masks), torch.cat(ious)
        back = order.argsort()
        return torch.cat(masks)[back], torch.cat(ious)[back]

    def _filters(self, tokens: Tensor, wanted: slice) -> Tensor:
        """What the wanted masks are of the upscaled features: (P, M, C / 8)."""
        mask_tokens = tokens[:, 1 : 1 + self.num_mask_tokens]
        mlps = list(zip(self.output_hypernetworks_mlps, mask_tokens.unbind(1), strict=True))
        # In training every parameter takes part in every backward pass: ranks wait for each other's.
        asked = slice(None) if torch.is_grad_enabled() else wanted
        filters = torch.stack([mlp(token) for mlp, token in mlps[asked]], dim=1)
        return filters[:, wanted] if torch.is_grad_enabled() else filters

    def _upscales_by_weights(self) -> bool:
        upscaling = self.output_upscaling
        return isinstance(upscaling, Upscaling) and upscaling.reads_weights()

    def _no_answers(self, image_embeddings: Tensor, wanted: slice) -> tuple[Tensor, Tensor]:
        num_masks = len(range(self.num_mask_tokens)[wanted])
        h, w = image_embeddings.shape[-2:]
        masks = image_embeddings.new_zeros(0, num_masks, 4 * h, 4 * w)
        return masks, image_embeddings.new_zeros(0, num_masks)


def _for_each(dense: Tensor | DenseCells, num_prompts: int) -> Tensor | DenseCells:
    """Dense embeddings of P prompts, of which one given stands for all."""
    num_given = len(dense if isinstance(dense, Tensor) else dense.cells)
    if num_given == num_prompts:
        return dense
    if num_given != 1:
        raise ValueError(
            f"dense_prompt_embeddings are of one or of all {num_prompts} prompts, got {num_given}"
        )
    if isinstance(dense, Tensor):
        return dense.expand(num_prompts, -1, -1, -1)
    return dense.expand(num_prompts)


def _check_index(image_index: Tensor, num_prompts: int, num_images: int) -> None:
    if image_index.shape != (num_prompts,):
        raise ValueError(
            f"image_index says the image of each of the {num_prompts} prompts, got the shape "
            f"{tuple(image_index.shape)}"
        )
    # On a GPU a look at the values would wait for it.
    if can_look_at(image_index) and num_prompts:
        low, high = int(image_index.min()), int(image_index.max())
        if low < 0 or high >= num_images:
            raise ValueError(
                f"image_index is from 0 to {num_images - 1}, a place among the image embeddings, got "
                f"{low if low < 0 else high}"
            )


def _is_precise(x: Tensor) -> bool:
    """Whether a variance may be made of sums of products: not in half precision, nor in what passes for
    float32 by `torch.set_float32_matmul_precision` or `allow_tf32`."""
    if torch.is_autocast_enabled(x.device.type):
        return False
    if x.dtype == torch.float32:
        return _multiplies_exactly(x.device.type)
    return x.dtype == torch.float64


def _multiplies_exactly(device_type: str) -> bool:
    backends: Any = torch.backends
    matmul = backends.cuda.matmul if device_type == "cuda" else backends.mkldnn.matmul
    # "none" leaves it to the settings above it.
    return all(
        getattr(setting, "fp32_precision", "none") in ("none", "ieee")
        for setting in (matmul, backends)
    )


def _runs(image_index: Tensor, chunk: int) -> tuple[Tensor | None, list[tuple[int, slice]]]:
    """The prompts image by image.

    Args:
        image_index: (P,).
        chunk: prompts of a run, at most.

    Returns:
        The order that brings the prompts of an image together, None where they are so already, and the
        image and the places in that order of each run.
    """
    order, numbers = None, image_index.tolist()
    if numbers != sorted(numbers):
        order = image_index.argsort(stable=True)
        numbers.sort()
    runs, start = [], 0
    for number, of_image in groupby(numbers):
        end = start + len(list(of_image))
        runs += [(number, slice(i, min(i + chunk, end))) for i in range(start, end, chunk)]
        start = end
    return order, runs
