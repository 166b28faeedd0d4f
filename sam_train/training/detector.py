"""Trains a box detector on the boxes of any masks; a Sam's image encoder below it stays as it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sam_train.checkpoints.detector import detector_encoder, detector_payload, start_detector
from sam_train.data.source import DamagedSampleError
from sam_train.metrics.box_recall import CONFIDENT, BoxRecall
from sam_train.models.box_detector import BoxDetector
from sam_train.structures import ImageBatch, ImageRecord
from sam_train.training import figures
from sam_train.training.module import TrainingModule
from sam_train.training.non_finite import NonFiniteGuard
from sam_train.training.optim import AdamW


class DetectorTraining(TrainingModule):
    """One optimiser step: the four losses of Faster R-CNN on a batch of images with all their boxes.

    What a view shows and no box is for counts as background, so a sample should have all of an image's
    masks: `data.train_transform.max_masks` at least as many as any image has.

    Args:
        model: what is trained.
        optim: builds the optimiser and knows the schedule.
        non_finite: what happens to a loss or a gradient that is not finite; stops the run by default.
        seed: of the anchors and boxes drawn in each step.
    """

    protocol = "detection"
    headline = ("box_average_recall@100", "box_recall_50@100", "confident_precision")
    panels = (
        ("loss", ("train/loss",)),
        (
            "losses",
            (
                "train/loss_objectness",
                "train/loss_rpn_box_reg",
                "train/loss_classifier",
                "train/loss_box_reg",
            ),
        ),
        (
            "boxes in validation",
            ("val/box_average_recall@100", "val/box_recall_50@100", "val/confident_precision"),
        ),
        (
            "gradient norm, unclipped",
            ("grad_norm/backbone", "grad_norm/rpn", "grad_norm/roi_heads"),
        ),
    )
    model: BoxDetector
    val_metrics: BoxRecall

    def __init__(
        self,
        *,
        model: BoxDetector,
        optim: AdamW,
        non_finite: NonFiniteGuard | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(model=model, optim=optim, non_finite=non_finite, seed=seed)
        self._encoder: str | None = None
        self.val_metrics = BoxRecall()

    def start_from(self, checkpoint: str) -> None:
        """Takes a Sam's encoder, or the weights of another detector, or torchvision's."""
        start_detector(self.model, checkpoint)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Returns the sum of the losses, each a mean over what was drawn of the images."""
        self._seed_batch()
        boxes = [batch.boxes[batch.image_index == i] for i in range(len(batch.images))]
        losses = self.model.losses(batch.images, batch.input_sizes, boxes)
        loss = sum(losses.values(), start=batch.boxes.new_zeros(()))
        self.log_dict({f"train/{name}": one.detach() for name, one in losses.items()})
        self._note_loss(loss, batch.keys)
        return loss

    def validation_step(self, record: ImageRecord, batch_idx: int) -> None:
        """Looks for the objects of one image."""
        try:
            (found,) = self.model.detect([record.image])
        except DamagedSampleError:  # counted and logged already
            return
        objects = [own for own in record.annotations if own.area > 0]
        self.num_val_images += 1
        self.val_source = record.source
        self.val_metrics.update(objects, found, record.source)

    def _new_metrics(self) -> BoxRecall:
        return BoxRecall(self.val_sources)

    def draw_examples(
        self, folder: Path, step: int, records: Iterable[ImageRecord], number: int
    ) -> None:
        path = folder / f"boxes_step{step:06d}.png"
        figures.draw_boxes(path, self.model, records, number, min_score=CONFIDENT)

    def _record(self, model_config: Mapping[str, Any]) -> dict[str, Any]:
        if self._encoder is None:  # once, as it stays what it is
            self._encoder = detector_encoder(self.model)
        return detector_payload(model_config, self._encoder)
