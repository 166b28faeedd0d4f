"""The two halves of a SAM as ONNX takes them: the encoder over raw pixels, the decoder over one prompt."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from timm.models.vision_transformer_sam import Block
from torch import Tensor, nn

from sam_train.checkpoints.save import at_running_size
from sam_train.models.image_encoder import SamVitEncoder
from sam_train.models.mask_decoder import Start, best_candidate
from sam_train.models.sam import Sam
from sam_train.structures import Prompts

MOST_POINTS_FOR_CANDIDATES = 2
"""A click and its padding, or a box: what may be ambiguous. More points are answered by the single mask."""


def traceable(model: Sam) -> Sam:
    """The model as the exporter takes it: a copy, where SAM's ViT is in it.

    Positions are stored for the size that it runs at, so that no graph interpolates them, and blocks are
    timm's plain ones: what ours do to save time fills windows in place, which the exporter cannot follow.
    """
    if not isinstance(model.image_encoder, SamVitEncoder):
        return model
    tensors = at_running_size(model)
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        parameter.data = tensors[name].detach().clone()
    for block in model.image_encoder.backbone.blocks:
        block.__class__ = Block
    return model


class OnnxEncoder(nn.Module):
    """Pixels to the image embedding, with `Sam.preprocess` in front.

    Shapes: image (1, 3, H, W) float RGB of 0 to 255, its longest side `img_size`, not padded;
    image_embeddings (1, C, h, w).
    """

    INPUTS = ("image",)
    OUTPUTS = ("image_embeddings",)

    def __init__(self, model: Sam) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, image: Tensor) -> Tensor:
        side = self.model.image_encoder.img_size
        padded = self.model.preprocess(image)
        # Says the size, which padding by a number that depends on the image leaves open.
        return self.model.image_encoder(padded.reshape(1, image.shape[1], side, side))


class OnnxDecoder(nn.Module):
    """Points, a box and an earlier mask of one object to its mask, in the published ONNX signature.

    Args:
        model: the whole model.
        return_single_mask: the mask of highest predicted IoU of the candidates, where there are at most two
            points, a click and its padding or a box; with more points the single mask. Else all masks, the
            single one first.

    Shapes, N points, M masks:
        image_embeddings: (1, C, h, w).
        point_coords: (1, N, 2) float, (x, y) in the model input frame; without a box, a padding point last.
        point_labels: (1, N) float: 1 foreground, 0 background, 2 and 3 a box's corners, -1 padding.
        mask_input: (1, 1, 4h, 4w) logits of an earlier answer; looked at if has_mask_input, (1,), is 1.
        orig_im_size: (2,) float, (H, W) of the image.
        returns: masks (1, M, H, W), logits; iou_predictions (1, M); low_res_masks (1, M, 4h, 4w), logits.
    """

    INPUTS = (
        "image_embeddings",
        "point_coords",
        "point_labels",
        "mask_input",
        "has_mask_input",
        "orig_im_size",
    )
    OUTPUTS = ("masks", "iou_predictions", "low_res_masks")

    def __init__(self, model: Sam, *, return_single_mask: bool = True) -> None:
        super().__init__()
        self.img_size = model.image_encoder.img_size
        self.prompt_encoder, self.mask_decoder = model.prompt_encoder, model.mask_decoder
        self.return_single_mask = return_single_mask
        self.eval()

    def forward(
        self,
        image_embeddings: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
        orig_im_size: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        labels = point_labels.long()
        without = self._start(image_embeddings, Prompts(point_coords, labels))
        with_mask = self._start(image_embeddings, Prompts(point_coords, labels, mask_input))
        start = _choose(has_mask_input > 0.5, with_mask, without)
        # Taken in the graph, for the runtime to fold when it opens the file: as a constant it is stored
        # once a layer, 4 MB each for SAM at 1024 px.
        image_pe = self.prompt_encoder.get_dense_pe()
        masks, ious = self.mask_decoder.answer(start, image_pe, None, slice(None))
        if self.return_single_mask:
            masks, ious = best_candidate(masks, ious, self._scores(ious, point_coords.shape[1]))
        return self._at_original_size(masks, orig_im_size), ious, masks

    def _start(self, image_embeddings: Tensor, prompts: Prompts) -> Start:
        sparse, dense = self.prompt_encoder.embed(prompts)
        return self.mask_decoder.start(image_embeddings, sparse, dense, None)

    def _scores(self, ious: Tensor, num_points: int) -> Tensor:
        is_single = torch.arange(ious.shape[1], device=ious.device) == 0
        # No branch: a graph has none. Predicted IoUs are far below 1,000 in size.
        bonus = 1000 * (num_points - MOST_POINTS_FOR_CANDIDATES - 0.5)
        return ious + bonus * is_single

    def _at_original_size(self, masks: Tensor, orig_im_size: Tensor) -> Tensor:
        side = self.img_size
        masks = F.interpolate(masks, (side, side), mode="bilinear", align_corners=False)
        height, width = torch.floor(side / orig_im_size.max() * orig_im_size + 0.5).long()
        masks = masks[..., :height, :width]
        height, width = orig_im_size.long()
        return F.interpolate(masks, (height, width), mode="bilinear", align_corners=False)


def _choose(condition: Tensor, yes: Start, no: Start) -> Start:
    """One of two starts, tensor by tensor; the same graph for both."""
    start = no._replace(dense=torch.where(condition, yes.dense, no.dense))
    if yes.masks is None or no.masks is None or yes.ious is None or no.ious is None:
        return start
    return start._replace(
        masks=torch.where(condition, yes.masks, no.masks),
        ious=torch.where(condition, yes.ious, no.ious),
    )
