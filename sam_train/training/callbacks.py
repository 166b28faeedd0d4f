"""What goes on around the steps: figures of speed and gradients, pictures, the final report."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import lightning
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities import rank_zero_only

from sam_train.structures import ImageBatch, ImageRecord
from sam_train.training import figures, run_folder
from sam_train.training.module import TrainingModule
from sam_train.training.optim import parameter_table
from sam_train.training.saving import BestCheckpoint, validation_is_due
from sam_train.training.weight_average import WeightAverage

log = logging.getLogger(__name__)

Callback = TypeVar("Callback", bound=lightning.Callback)


class GradientNorms(lightning.Callback):
    """Logs the gradient's norm by part before it is clipped.

    Clipping by norm hides a part whose gradient drowns all others; this shows it.
    """

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: Any, optimizer: Any
    ) -> None:
        if not _is_log_step(trainer, trainer.global_step + 1):
            return
        squares = {}
        for name, part in pl_module.model.named_children():
            grads = [p.grad for p in part.parameters() if p.grad is not None]
            if grads:
                squares[name] = torch.stack(torch._foreach_norm(grads)).square().sum()
        if squares:
            norms = {f"grad_norm/{name}": square.sqrt() for name, square in squares.items()}
            total = torch.stack(list(squares.values())).sum().sqrt()
            pl_module.log_dict({"grad_norm/all": total, **norms})


class Speed(lightning.Callback):
    """Counts images, masks and seconds of training, over restarts too, and logs them per second.

    Validation and pictures are not counted.
    """

    def __init__(self) -> None:
        self.num_images = 0
        self.num_masks = 0
        self.seconds = 0.0
        self._since: float | None = None
        self._logged = (0, 0, 0, 0.0)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._since = None
        self._logged = (trainer.global_step, self.num_images, self.num_masks, self.seconds)

    def on_train_batch_start(self, *_: Any) -> None:
        self._since = time.monotonic() if self._since is None else self._since

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: ImageBatch,
        batch_idx: int,
    ) -> None:
        self.num_images += trainer.world_size * len(batch.images)
        self.num_masks += trainer.world_size * len(batch.masks)
        now = time.monotonic()
        assert self._since is not None
        self.seconds, self._since = self.seconds + now - self._since, now
        step, images, masks, seconds = self._logged
        if _is_log_step(trainer, trainer.global_step) and trainer.global_step != step:
            spent = max(self.seconds - seconds, 1e-9)
            pl_module.log("train/images_per_second", (self.num_images - images) / spent)
            rate = (self.num_masks - masks) / spent
            pl_module.log("train/masks_per_second", rate, prog_bar=True)
            self._logged = (trainer.global_step, self.num_images, self.num_masks, self.seconds)

    def on_validation_start(self, *_: Any) -> None:
        self._since = None

    def state_dict(self) -> dict[str, Any]:
        return {
            "num_images": self.num_images,
            "num_masks": self.num_masks,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_images = state_dict["num_images"]
        self.num_masks = state_dict["num_masks"]
        self.seconds = state_dict["seconds"]

    def figures(self, steps: int) -> dict[str, float]:
        """What `metrics.json` says of the training itself."""
        seconds = max(self.seconds, 1e-9)
        return {
            "train_seconds": self.seconds,
            "steps": steps,
            "images_per_second": self.num_images / seconds,
            "masks_per_second": self.num_masks / seconds,
        }


class Report(lightning.Callback):
    """Measures the start, shows what is trained, draws, and writes `metrics.json` at the end.

    Args:
        run_dir: the run folder.
        num_pictures: objects of the validation images drawn click by click at each validation.
    """

    def __init__(self, *, run_dir: str, num_pictures: int = 6) -> None:
        self.run_dir = Path(run_dir)
        self.num_pictures = num_pictures
        self.start: dict[str, float] = {}
        self.latest: dict[str, float] = {}
        self._latest_step = -1

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            log.info("parameters\n%s", parameter_table(pl_module.model))

    def on_train_start(self, trainer: lightning.Trainer, pl_module: TrainingModule) -> None:
        if not trainer.enable_validation:
            return
        if not self.start:
            with _averaged(trainer, pl_module):
                self.start = _validate(trainer, pl_module)
            self._log(trainer, self.start)
            self._note("at the start", self._headline(pl_module, self.start))
        elif validation_is_due(trainer) and self._latest_step != trainer.global_step:
            # The run was told to stop before it, and Lightning takes it for done.
            self._catch_up(trainer, pl_module)
            for stopping in _callbacks(trainer, EarlyStopping):
                trainer.callback_metrics.update(
                    {f"val/{name}": torch.tensor(score) for name, score in self.latest.items()}
                )
                stopping.on_validation_end(trainer, pl_module)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: TrainingModule) -> None:
        if trainer.sanity_checking:
            return
        self.latest = pl_module.val_metrics.compute()
        self._latest_step = trainer.global_step
        self._draw(trainer, pl_module)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: TrainingModule) -> None:
        # Not earlier: the last checkpoint is then on disk, and a run that was stopped between it and its
        # report has no step left to train, so that Lightning calls nothing else.
        pl_module.to(trainer.strategy.root_device)
        if trainer.enable_validation and self._latest_step != trainer.global_step:
            self._catch_up(trainer, pl_module)
        elif not trainer.enable_validation:
            with _averaged(trainer, pl_module):
                for best in _callbacks(trainer, BestCheckpoint):
                    best.save(trainer)
        if trainer.is_global_zero:
            self._finish(trainer, pl_module)

    def _catch_up(self, trainer: lightning.Trainer, pl_module: TrainingModule) -> None:
        """Validates outside Lightning's loop."""
        with _averaged(trainer, pl_module):
            self.latest = _validate(trainer, pl_module)
            self._latest_step = trainer.global_step
            for best in _callbacks(trainer, BestCheckpoint):
                best.consider(trainer, self.latest)
            self._log(trainer, self.latest)
            self._draw(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.start, "latest": self.latest, "latest_step": self._latest_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.start, self.latest = state_dict["start"], state_dict["latest"]
        self._latest_step = state_dict["latest_step"]

    def _log(self, trainer: lightning.Trainer, scores: Mapping[str, float]) -> None:
        """Logs what was validated outside Lightning's loop."""
        for logger in trainer.loggers:
            named = {f"val/{name}": value for name, value in scores.items()}
            logger.log_metrics(named, step=trainer.global_step)
            logger.save()

    @rank_zero_only
    def _draw(self, trainer: lightning.Trainer, pl_module: TrainingModule) -> None:
        if self.num_pictures:
            folder, records = self.run_dir / "figures", _val_records(trainer)
            with _answering(trainer, pl_module):
                pl_module.draw_examples(folder, trainer.global_step, records, self.num_pictures)
        self._draw_curves(pl_module)

    def _draw_curves(self, pl_module: TrainingModule) -> None:
        path = self.run_dir / "figures" / "curves.png"
        figures.draw_curves(path, self.run_dir / run_folder.METRICS, pl_module.panels)

    def _finish(self, trainer: lightning.Trainer, pl_module: TrainingModule) -> None:
        self._draw_curves(pl_module)
        if trainer.enable_validation:
            self._note("at the end", self._headline(pl_module, self.latest))
        start = self._headline(pl_module, self.start)
        gained = {k: self.latest[k] - start[k] for k in start if k in self.latest}
        self._note("gained", gained, sign="+")
        extra: dict[str, float] = {"steps": trainer.global_step}
        for speed in _callbacks(trainer, Speed):
            extra |= speed.figures(trainer.global_step)
        extra |= {f"start_{name}": score for name, score in start.items()}
        result = {
            "protocol": pl_module.protocol,
            "dataset": " ".join(pl_module.val_sources) or pl_module.val_source,
            "num_images": pl_module.num_val_images,
            "num_masks": pl_module.val_metrics.num_masks,
            "checkpoint": str(self.run_dir / run_folder.LAST_CHECKPOINT),
            "metrics": {**self.latest, **extra},
        }
        run_folder.finish(self.run_dir, result)

    @rank_zero_only
    def _note(self, when: str, scores: Mapping[str, float], *, sign: str = "") -> None:
        text = "  ".join(f"{name} {score:{sign}.3f}" for name, score in scores.items())
        log.info("validation %s: %s", when, text)

    @staticmethod
    def _headline(pl_module: TrainingModule, scores: Mapping[str, float]) -> dict[str, float]:
        return {name: scores[name] for name in pl_module.headline if name in scores}


def _callbacks(trainer: lightning.Trainer, kind: type[Callback]) -> list[Callback]:
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]


@contextmanager
def _averaged(trainer: lightning.Trainer, pl_module: TrainingModule) -> Iterator[None]:
    """With the averaged weights in place, where an average is kept."""
    with ExitStack() as stack:
        for average in _callbacks(trainer, WeightAverage):
            stack.enter_context(average.in_place(pl_module))
        yield


def _is_log_step(trainer: lightning.Trainer, steps_done: int) -> bool:
    """Whether what is logged at the step that makes `steps_done` reaches the loggers."""
    return trainer.log_every_n_steps > 0 and steps_done % trainer.log_every_n_steps == 0


def _validate(trainer: lightning.Trainer, pl_module: TrainingModule) -> dict[str, float]:
    """Runs the validation images outside Lightning's loop, before the first step and after the last."""
    with _answering(trainer, pl_module):
        pl_module.on_validation_epoch_start()
        for index, record in enumerate(_val_records(trainer)):
            pl_module.validation_step(record, index)
        return pl_module.validation_scores()


def _val_records(trainer: lightning.Trainer) -> Iterator[ImageRecord]:
    """This process's validation images, as many as Lightning's loop takes of them."""
    limit = trainer.limit_val_batches
    records = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
    # An integer counts; 1.0 is all of them, and Lightning refuses other shares of what has no length.
    return itertools.islice(records, limit if isinstance(limit, int) else None)


@contextmanager
def _answering(trainer: lightning.Trainer, pl_module: TrainingModule) -> Iterator[None]:
    """As Lightning validates: in eval mode and the run's precision; parts then get their modes back."""
    modes = {module: module.training for module in pl_module.modules()}
    pl_module.eval()
    try:
        with trainer.precision_plugin.forward_context():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
