"""How far a student is from its teacher: in its image embeddings and in its answers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sam_train.losses.mask import MaskLoss
from sam_train.structures import MaskPrediction


def embedding_errors(student: Tensor, teacher: Tensor, inside: Tensor, *, out_chans: int) -> Tensor:
    """Squared error of image embeddings in units of the teacher's mean square, image by image.

    0 for equal embeddings, 1 for a student that answers with zeros. The neck of SAM's encoders ends in
    a layer norm, whose mean square is all but constant: there it is MobileSAM's mean squared error up
    to a factor. Fine features that travel behind the embedding are of another scale; they count as an
    embedding of their own, and the result is the mean of the two.

    Args:
        student: (N, C, h, w).
        teacher: (N, C, h, w).
        inside: (N, h, w) bool, tokens of the image and not of its padding.
        out_chans: channels of the embedding proper; those behind it are fine features.

    Returns:
        (N,) float32.
    """
    kept = inside[:, None]
    with torch.autocast(student.device.type, enabled=False):
        squares = [
            ((part - target) ** 2 * kept, target**2 * kept)
            for part, target in zip(
                student.float().tensor_split([out_chans], dim=1),
                teacher.float().tensor_split([out_chans], dim=1),
                strict=True,
            )
            if target.shape[1]
        ]
        errors = [
            error.flatten(1).sum(dim=1) / size.flatten(1).sum(dim=1).clamp(min=1e-6)
            for error, size in squares
        ]
    return torch.stack(errors).mean(dim=0)


@dataclass(frozen=True, kw_only=True)
class TeacherLoss:
    """Mask loss against the teacher's answers, cell by cell as sure as the teacher is.

    Candidates are compared one by one, in order: a student begins with its teacher's decoder, so the
    third of the one is the third of the other.

    Attributes:
        mask: compares logits with the teacher's probabilities.
        iou_weight: of the squared difference of the predicted IoUs.
    """

    mask: MaskLoss = field(default_factory=MaskLoss)
    iou_weight: float = 1.0

    def __call__(self, prediction: MaskPrediction, teacher: MaskPrediction) -> Tensor:
        """Scores P answers of M candidates against the teacher's to the same prompts: (P,)."""
        logits = prediction.low_res_masks.flatten(0, 1)[:, None]
        targets = teacher.low_res_masks.detach().float().flatten(0, 1).sigmoid()
        masks = self.mask(logits, targets).view(prediction.iou_predictions.shape)
        ious = prediction.iou_predictions.float() - teacher.iou_predictions.detach().float()
        return (masks + self.iou_weight * ious**2).mean(dim=1)
