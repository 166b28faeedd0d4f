"""What every training of the project shares: optimiser, progress, restarts, ranks, validation scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import lightning
import torch
from torch import Tensor, nn

from sam_train.checkpoints.formats import RECORD_KEY, checkpoint_payload
from sam_train.checkpoints.load import load_weights
from sam_train.data.source import sample_seed
from sam_train.structures import ImageRecord
from sam_train.training.non_finite import NonFiniteGuard
from sam_train.training.optim import AdamW


class Scores(Protocol):
    """Validation scores as one tensor of sums, which ranks add up."""

    totals: Tensor

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def num_masks(self) -> int: ...

    def compute(self) -> dict[str, float]: ...


class TrainingModule(lightning.LightningModule):
    """The frame of a training; what a step and a validation are is left to the tasks.

    A task gives `training_step`, which begins with `_seed_batch` and ends with `_note_loss`,
    `validation_step`, `_new_metrics` and `draw_examples`.

    Args:
        model: what is trained.
        optim: builds the optimiser and knows the schedule.
        non_finite: what happens to a loss or a gradient that is not finite; stops the run by default.
        seed: of all that is random in a step.
    """

    protocol: ClassVar[str] = "clicks"
    """What `metrics.json` calls the validation."""
    headline: ClassVar[tuple[str, ...]] = (
        "mean_iou@1",
        "mean_iou@3",
        "oracle_mean_iou@1",
        "box_mean_iou",
    )
    """The scores that are told in the log, at the start and at the end; the bar shows the first."""
    panels: ClassVar[tuple[tuple[str, tuple[str, ...]], ...]]
    """The plots of the run's curves: a title and the columns of `metrics.csv`."""
    model: Any
    val_metrics: Scores

    def __init__(
        self,
        *,
        model: nn.Module,
        optim: AdamW,
        non_finite: NonFiniteGuard | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.optim = optim
        self.non_finite = NonFiniteGuard() if non_finite is None else non_finite
        self.seed = seed
        self.model_config: dict[str, Any] | None = None
        """The model's config node, kept in checkpoints so that they can be loaded by themselves."""
        self._num_accumulated = 0  # batches since the last optimiser step
        self.num_val_images = 0
        self.val_source = ""
        self.val_sources: tuple[str, ...] = ()
        """The data sets whose validation scores are told apart."""

    def start_from(self, checkpoint: str) -> None:
        """Puts the weights of `checkpoint=PATH` into the model."""
        load_weights(self.model, checkpoint)

    def draw_examples(
        self, folder: Path, step: int, records: Iterable[ImageRecord], number: int
    ) -> None:
        """Draws what the model makes of `number` validation images."""
        raise NotImplementedError

    def _new_metrics(self) -> Scores:
        """What collects the scores of one validation."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Learns which data sets validation tells apart.

        Raises:
            ValueError: the precision would round coordinates.
        """
        if (precision := str(self.trainer.precision)) in ("bf16-true", "16-true"):
            raise ValueError(
                f"trainer.precision={precision} rounds the boxes of a batch (at 1,000 px by up to "
                "2 px in bfloat16), the predicted IoUs and the steps of the optimiser: train in "
                f"trainer.precision={precision.replace('true', 'mixed')}"
            )
        self.val_sources = getattr(self.trainer.datamodule, "val_sources", ())  # type: ignore[attr-defined]

    def _note_loss(self, loss: Tensor, keys: Iterable[str]) -> None:
        """Logs a batch's loss and the rate, and looks whether the loss is finite."""
        self._num_accumulated += 1
        alone = self._trainer is None or self.trainer.world_size == 1
        self.non_finite.look_at_loss(loss.detach(), keys, self.global_step, alone=alone)
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log("lr", max(group["lr"] for group in self.trainer.optimizers[0].param_groups))

    def on_validation_epoch_start(self) -> None:
        self.val_metrics = self._new_metrics()
        self.num_val_images = 0

    def on_validation_epoch_end(self) -> None:
        for name, value in self.validation_scores().items():
            # Every rank logs the same: early stopping looks at it on every rank.
            self.log(f"val/{name}", value, prog_bar=name == self.headline[0], sync_dist=True)

    def validation_scores(self) -> dict[str, float]:
        """The scores of what was validated since the last start, of all ranks together."""
        totals = self.val_metrics.totals.to(self.device, torch.float32)
        self.val_metrics.totals = self._over_ranks(totals, "sum").double().cpu()
        num_images = torch.tensor(self.num_val_images, device=self.device)
        self.num_val_images = int(self._over_ranks(num_images, "sum"))
        return self.val_metrics.compute()

    def _over_ranks(self, values: Tensor, how: str) -> Tensor:
        """The `sum` or `max` of a tensor over all ranks."""
        if self._trainer is None or self.trainer.world_size == 1:
            return values
        return self.trainer.strategy.reduce(values, reduce_op=how)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.optim.build(self.model)

        def scale(step: int) -> float:
            return self.optim.schedule.scale(step, self._progress_of_all())

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def progress(self) -> float:
        """How much of the run is done, in [0, 1]: by steps or by time, whichever is further."""
        shares = [0.0]
        if self.trainer.max_steps > 0:
            shares.append(self.trainer.global_step / self.trainer.max_steps)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, lightning.pytorch.callbacks.Timer):
                spent, left = callback.time_elapsed(), callback.time_remaining()
                if left is not None:
                    shares.append(spent / max(spent + left, 1e-9))
        return min(1.0, max(shares))

    def _progress_of_all(self) -> float:
        """`progress`, the same on all ranks: by their own clocks, their rates would drift apart."""
        if self.trainer.world_size == 1:
            return self.progress()
        progress = torch.tensor(self.progress(), dtype=torch.float64, device=self.device)
        return float(self._over_ranks(progress, "max"))

    def _record(self, model_config: Mapping[str, Any]) -> dict[str, Any]:
        """What says in a checkpoint which model it holds."""
        return checkpoint_payload(model_config)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["non_finite"] = self.non_finite.state_dict()
        if self.model_config is not None:
            checkpoint[RECORD_KEY] = self._record(self.model_config)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.non_finite.load_state_dict(checkpoint["non_finite"])

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Leaves the step out, or stops, where a gradient is not finite."""
        self._num_accumulated = 0
        is_scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        met = torch.tensor(float(self.non_finite.met_bad_loss), device=self.device)
        self.non_finite.passes(
            self.model.parameters(),
            self.global_step,
            scaled=is_scaled,
            elsewhere=bool(self._over_ranks(met, "max")),
        )

    def _batch_number(self) -> int:
        """Of this batch in the whole run; the same on all ranks, and after a restart."""
        if self._trainer is None:
            return 0
        return self.global_step * self.trainer.accumulate_grad_batches + self._num_accumulated

    def _seed_batch(self) -> None:
        """Makes what a step draws (drop path, dropout, samples) a function of its number and the rank.

        So a run that goes on draws what it would have drawn, with no generator's state to keep.
        """
        rank = 0 if self._trainer is None else self.global_rank
        torch.manual_seed(sample_seed(self.seed, self._batch_number(), f"model/{rank}"))

    def _mean_over_ranks(self, count: int) -> float:
        """The mean of a count over all ranks, 1 at least: gradients are averaged over them afterwards."""
        if self._trainer is None or self.trainer.world_size == 1:
            return float(max(1, count))
        counts = torch.tensor(float(count), device=self.device)
        return max(1.0, float(self._over_ranks(counts, "sum")) / self.trainer.world_size)
