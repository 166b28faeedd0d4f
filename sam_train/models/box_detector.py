"""Finds objects of any kind as boxes: torchvision's Faster R-CNN with one class, on a Sam's image encoder.

SAM's data engine has such a detector propose objects in its semi-automatic stage (SAM, section 4: "a bounding
box detector trained on all first stage masks using a generic object category"). Here it reads the features that
the current model's image encoder computes anyhow, and only a small pyramid and the two heads are trained.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, fasterrcnn_resnet50_fpn_v2
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign

from sam_train.models.common import LayerNorm2d
from sam_train.models.sam import SAM_PIXEL_MEAN, SAM_PIXEL_STD, Sam, normalised
from sam_train.ops.coords import preprocess_shape, to_original_frame
from sam_train.ops.resize import resize_longest_side
from sam_train.structures import DetectedBoxes, ImageFeatures

OBJECT = 1
"""The one class; 0 is the background."""


class BoxDetector(nn.Module):
    """A region proposal network and a box head over the levels of a backbone, in the model input frame.

    Args:
        rcnn: whose backbone, rpn and roi_heads are taken; its own resizing is not.
        img_size: side S of the padded square input, pixels.
        pixel_mean: of each channel, on the scale of 0 to 255.
        pixel_std: likewise.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        *,
        rcnn: FasterRCNN,
        img_size: int,
        pixel_mean: Sequence[float] = SAM_PIXEL_MEAN,
        pixel_std: Sequence[float] = SAM_PIXEL_STD,
    ) -> None:
        super().__init__()
        self.img_size = img_size
        self.backbone, self.rpn, self.roi_heads = rcnn.backbone, rcnn.rpn, rcnn.roi_heads
        self.roi_heads.box_roi_pool = _SquareRoIAlign(self.roi_heads.box_roi_pool, img_size)
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def encode(self, images: Tensor, input_sizes: Tensor) -> Any:
        """What the backbone reads: here the normalised images themselves.

        Args:
            images: (N, 3, S, S), 0 to 255, padded at the bottom and right.
            input_sizes: (N, 2) the (H, W) that is not padding.
        """
        return normalised(images, input_sizes, self.pixel_mean, self.pixel_std)

    def levels(self, encoded: Any) -> OrderedDict[str, Tensor]:
        """What `encode` returned, as maps (N, C, h, w) from fine to coarse."""
        return OrderedDict(self.backbone(encoded))

    def losses(
        self, images: Tensor, input_sizes: Tensor, boxes: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """The four losses of Faster R-CNN (Ren et al. 2015), in float32; in training mode only.

        Which anchors and boxes count is drawn from torch's global generator.

        Args:
            images: as for `encode`.
            input_sizes: likewise.
            boxes: N of (M, 4) xyxy, model input frame: all objects of each image, as the rest of it
                counts as background.
        """
        levels = self.levels(self.encode(images, input_sizes))
        targets = [
            {"boxes": own.float(), "labels": own.new_full((len(own),), OBJECT, dtype=torch.int64)}
            for own in boxes
        ]
        with torch.autocast(self.device.type, enabled=False):
            _, losses = self._heads(levels, input_sizes, targets)
        return losses

    def detect(
        self, images: Sequence[np.ndarray], *, min_score: float = 0.0
    ) -> list[DetectedBoxes]:
        """Finds the objects of a batch of images of any sizes, computed at once; in eval mode only.

        Args:
            images: (H, W, 3) uint8 RGB each.
            min_score: in [0, 1]; boxes of lower score are left out.

        Returns:
            An entry an image, original frame, best first.
        """
        if not images:
            return []
        padded, input_sizes = self._padded(images)
        original_sizes = [(image.shape[0], image.shape[1]) for image in images]
        with torch.no_grad():
            levels = self.levels(self.encode(padded, input_sizes))
        return self._detected(levels, original_sizes, min_score)

    def _padded(self, images: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """(N, 3, S, S) uint8 and (N, 2), on the model's device."""
        padded = np.zeros((len(images), 3, self.img_size, self.img_size), np.uint8)
        sizes = []
        for own, image in zip(padded, images, strict=True):
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
                raise ValueError(
                    f"images are (H, W, 3) uint8 RGB, got {image.shape} {image.dtype}: convert them"
                )
            resized = resize_longest_side(image, self.img_size)
            own[:, : resized.shape[0], : resized.shape[1]] = resized.transpose(2, 0, 1)
            sizes.append(resized.shape[:2])
        return torch.from_numpy(padded).to(self.device), torch.tensor(sizes, device=self.device)

    @torch.no_grad()
    def _detected(
        self,
        levels: OrderedDict[str, Tensor],
        original_sizes: Sequence[tuple[int, int]],
        min_score: float,
    ) -> list[DetectedBoxes]:
        sizes = [preprocess_shape(height, width, self.img_size) for height, width in original_sizes]
        with torch.autocast(self.device.type, enabled=False):
            found, _ = self._heads(levels, torch.tensor(sizes), None)
        detected = []
        for one, original, size in zip(found, original_sizes, sizes, strict=True):
            is_kept = one["scores"] >= min_score
            boxes = to_original_frame(one["boxes"][is_kept], original, size)
            detected.append(DetectedBoxes(boxes, one["scores"][is_kept]))
        return detected

    def _heads(
        self,
        levels: OrderedDict[str, Tensor],
        input_sizes: Tensor,
        targets: list[dict[str, Tensor]] | None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        levels = OrderedDict((name, level.float()) for name, level in levels.items())
        sizes = [(int(height), int(width)) for height, width in input_sizes.tolist()]
        # Anchors are laid by the square, boxes clipped to what is image in it. No pixel is looked at.
        square = next(iter(levels.values())).new_empty(0, 3, self.img_size, self.img_size)
        image_list = ImageList(square, sizes)
        proposals, rpn_losses = self.rpn(image_list, levels, targets)
        found, losses = self.roi_heads(levels, proposals, sizes, targets)
        return found, {**rpn_losses, **losses}


class EncoderBoxDetector(BoxDetector):
    """On the image embeddings of a Sam, whose encoder stays as it is.

    Args:
        sam: whose image encoder and normalisation are taken.
        width: channels of the pyramid's levels.
        hidden_dim: width of the box head.
        num_levels: levels, from stride 4 on, each twice as coarse as the one before.
        anchor_cells: sides of the anchors, in cells of their level.
        aspect_ratios: height over width of the anchors, each at every side.
        max_boxes: found in an image at most.
    """

    image_encoder: Any

    def __init__(
        self,
        *,
        sam: Sam,
        width: int = 64,
        hidden_dim: int = 256,
        num_levels: int = 5,
        anchor_cells: Sequence[float] = (2.0, 3.0),
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        max_boxes: int = 500,
    ) -> None:
        image_encoder = sam.image_encoder
        pyramid = EmbeddingPyramid(
            embed_dim=image_encoder.out_chans,
            high_res_dim=getattr(image_encoder, "high_res_chans", 0),
            stride=image_encoder.stride,
            width=width,
            num_levels=num_levels,
        )
        names = [str(i) for i in range(num_levels)]
        sides = [tuple(cells * stride for cells in anchor_cells) for stride in pyramid.strides]
        rcnn = FasterRCNN(
            pyramid,
            rpn_anchor_generator=AnchorGenerator(
                tuple(sides), (tuple(aspect_ratios),) * num_levels
            ),
            rpn_pre_nms_top_n_train=1000,
            rpn_post_nms_top_n_train=1000,
            rpn_pre_nms_top_n_test=1000,
            rpn_post_nms_top_n_test=1000,
            # A box of this side is seven cells at stride 16, which is what the box head looks at.
            box_roi_pool=MultiScaleRoIAlign(names, 7, 2, canonical_scale=112, canonical_level=4),
            box_head=TwoMLPHead(7 * 7 * width, hidden_dim),
            box_predictor=FastRCNNPredictor(hidden_dim, OBJECT + 1),
            box_batch_size_per_image=128,
            box_score_thresh=0.01,
            box_detections_per_img=max_boxes,
        )
        super().__init__(
            rcnn=rcnn,
            img_size=image_encoder.img_size,
            pixel_mean=sam.pixel_mean.flatten().tolist(),
            pixel_std=sam.pixel_std.flatten().tolist(),
        )
        self.image_encoder = image_encoder.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> EncoderBoxDetector:
        """The encoder has no part in it."""
        super().train(mode)
        self.image_encoder.eval()
        return self

    @torch.no_grad()
    def encode(self, images: Tensor, input_sizes: Tensor) -> ImageFeatures:
        """The embeddings of a padded batch, as `Sam.encode`."""
        images = super().encode(images, input_sizes)
        return ImageFeatures(self.image_encoder(images))

    def levels(self, encoded: ImageFeatures) -> OrderedDict[str, Tensor]:
        return OrderedDict(self.backbone(encoded.image_embeddings))

    @torch.no_grad()
    def detect_features(
        self,
        features: ImageFeatures,
        original_sizes: Sequence[tuple[int, int]],
        *,
        min_score: float = 0.0,
    ) -> list[DetectedBoxes]:
        """`detect` for images that the same encoder has embedded already.

        Args:
            features: of N images.
            original_sizes: (H, W) of each.
            min_score: as for `detect`.
        """
        embeddings = features.image_embeddings.to(self.device)
        if len(embeddings) != len(original_sizes):
            raise ValueError(
                f"expected a size for each of {len(embeddings)} images, got {len(original_sizes)}"
            )
        return self._detected(self.levels(ImageFeatures(embeddings)), original_sizes, min_score)


class ResNetBoxDetector(BoxDetector):
    """torchvision's `fasterrcnn_resnet50_fpn_v2` (Li et al. 2021), all of it trained, for a GPU.

    Its weights have torchvision's names, so that published ones can be put in.

    Args:
        img_size: side S of the padded square input, pixels.
        max_boxes: found in an image at most.
    """

    def __init__(self, *, img_size: int = 1024, max_boxes: int = 500) -> None:
        rcnn = fasterrcnn_resnet50_fpn_v2(
            weights=None,
            weights_backbone=None,
            num_classes=OBJECT + 1,
            box_score_thresh=0.01,
            box_detections_per_img=max_boxes,
        )
        super().__init__(rcnn=rcnn, img_size=img_size)


class EmbeddingPyramid(nn.Module):
    """Maps of stride 4, 8, 16 ... from one image embedding, for objects from 8 px on.

    Finer maps than the embedding are upsampled from it by transposed convolutions; where the embedding
    carries fine features (`high_res_chans`), these join at their stride. Coarser ones are strided
    convolutions.

    Args:
        embed_dim: channels of the embedding without its fine features.
        high_res_dim: channels of those, which lie behind the embedding, folded 2 x 2; 0 for none.
        stride: of the embedding, a power of two.
        width: channels of each map.
        num_levels: maps.
    """

    def __init__(
        self, *, embed_dim: int, high_res_dim: int, stride: int, width: int, num_levels: int
    ) -> None:
        super().__init__()
        self.out_channels = width
        self.strides = tuple(4 * 2**i for i in range(num_levels))
        if stride not in self.strides:
            raise ValueError(
                f"a pyramid of the strides {self.strides} has no place for an embedding of stride {stride}"
            )
        self.embed_dim, self.start = embed_dim, self.strides.index(stride)
        self.lateral = nn.Sequential(nn.Conv2d(embed_dim, width, 1), LayerNorm2d(width))
        self.high_res_lateral = (
            nn.Sequential(nn.Conv2d(high_res_dim, width, 1), LayerNorm2d(width))
            if high_res_dim and self.start > 0
            else None
        )
        self.ups = nn.ModuleList(_up(width) for _ in range(self.start))
        self.downs = nn.ModuleList(_down(width) for _ in range(num_levels - 1 - self.start))
        self.mix = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in self.strides)

    def forward(self, embeddings: Tensor) -> dict[str, Tensor]:
        """(N, C, h, w) to maps (N, width, h', w') by name, "0" the finest."""
        embeddings = embeddings.float()  # of a cache in half precision
        own, fine = embeddings[:, : self.embed_dim], embeddings[:, self.embed_dim :]
        maps = [self.lateral(own)]
        for i, up in enumerate(self.ups):
            finer = up(maps[0])
            if i == 0 and self.high_res_lateral is not None:
                finer = finer + self.high_res_lateral(F.pixel_shuffle(fine, 2))
            maps.insert(0, finer)
        for down in self.downs:
            maps.append(down(maps[-1]))
        mixed = [mix(F.gelu(one)) for mix, one in zip(self.mix, maps, strict=True)]
        return OrderedDict((str(i), one) for i, one in enumerate(mixed))


def _up(width: int) -> nn.Sequential:
    return nn.Sequential(nn.GELU(), nn.ConvTranspose2d(width, width, 2, 2), LayerNorm2d(width))


def _down(width: int) -> nn.Sequential:
    conv = nn.Conv2d(width, width, 3, stride=2, padding=1)
    return nn.Sequential(nn.GELU(), conv, LayerNorm2d(width))


class _SquareRoIAlign(nn.Module):
    """Pools by the strides of the padded square input.

    torchvision guesses the strides from the images' own sizes at the first call and keeps them: of wide
    images alone it would guess half of them.
    """

    def __init__(self, pool: MultiScaleRoIAlign, img_size: int) -> None:
        super().__init__()
        self.pool, self.square = pool, (img_size, img_size)

    def forward(
        self, levels: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        return self.pool(levels, boxes, [self.square] * len(image_shapes))
