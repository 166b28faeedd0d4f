"""What goes on around the steps: checkpoints, figures of speed and gradients, the final report."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities import rank_zero_only

from sam_train.metrics.clicks import SIZE_SUFFIXES
from sam_train.structures import ImageBatch
from sam_train.training import figures, run_folder
from sam_train.training.interactive import InteractiveTraining
from sam_train.training.optim import parameter_table

log = logging.getLogger(__name__)

HEADLINE = ("mean_iou@1", "mean_iou@3", "oracle_mean_iou@1", "box_mean_iou")
"""The scores that are told in the log, at the start and at the end."""


class LastCheckpoint(lightning.Callback):
    """Saves `last.ckpt` every so many steps, at the end, and when the run is told to stop.

    Ctrl-C and SIGTERM let the step under way finish, so that what is saved is the state between two
    steps; a second signal stops at once. Whichever rank is told, all stop after the same step.

    Args:
        path: where the checkpoint goes.
        every_n_steps: optimiser steps between saves.
    """

    def __init__(self, *, path: str, every_n_steps: int) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps is 1 or more, got {every_n_steps}")
        self.path = Path(path)
        self.every_n_steps = every_n_steps
        self._told_to_stop = False
        self._saved_step = -1

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._told_to_stop, self._saved_step = False, trainer.global_step
        if threading.current_thread() is threading.main_thread():  # no other may handle signals
            # Lightning has noted down the handlers there were, and puts them back after the run.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._on_signal)

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        is_over = trainer.strategy.reduce_boolean_decision(self._told_to_stop, all=False)
        if is_over or trainer.global_step - self._saved_step >= self.every_n_steps:
            self._save(trainer)
        if is_over:
            raise KeyboardInterrupt

    def on_train_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._save(trainer)

    def _save(self, trainer: lightning.Trainer) -> None:
        if trainer.global_step != self._saved_step:
            self._saved_step = trainer.global_step
            trainer.save_checkpoint(self.path, weights_only=False)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._told_to_stop:
            raise KeyboardInterrupt
        log.warning("stopping after this step; Ctrl-C again stops at once")
        self._told_to_stop = True


class BestCheckpoint(lightning.Callback):
    """Keeps `best.ckpt`, the weights of the best validation score, that after the last step included.

    Args:
        path: where the checkpoint goes.
        monitor: a validation score by name, such as `mean_iou@1`.
        mode: `max` where more is better, `min` where less is.
    """

    def __init__(self, *, path: str, monitor: str = "mean_iou@1", mode: str = "max") -> None:
        if mode not in ("max", "min"):
            raise ValueError(f"mode is max or min, got {mode}")
        self.path, self.monitor, self.mode = Path(path), monitor, mode
        self.best: float | None = None

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: InteractiveTraining) -> None:
        prefixes = ("", *(f"{source}/" for source in trainer.datamodule.val_sources))  # type: ignore[attr-defined]
        names = pl_module.val_metrics.names
        self._check(
            [p + name + suffix for p in prefixes for suffix in SIZE_SUFFIXES for name in names]
        )

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: InteractiveTraining) -> None:
        if not trainer.sanity_checking:
            self.consider(trainer, pl_module.val_metrics.compute())

    def consider(self, trainer: lightning.Trainer, scores: Mapping[str, float]) -> None:
        """Saves the model if `scores` are the best so far."""
        self._check(scores)
        score = scores[self.monitor]
        sign = 1 if self.mode == "max" else -1
        if self.best is None or math.isnan(self.best) or sign * score > sign * self.best:
            self.best = score
            # Without the optimiser's state, twice the size of the weights: a run goes on from last.ckpt.
            trainer.save_checkpoint(self.path, weights_only=True)

    def _check(self, names: Collection[str]) -> None:
        if self.monitor not in names:
            raise ValueError(
                f"callbacks.best.monitor is one of {', '.join(names)}, got {self.monitor}"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]


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
        self._is_finished = False

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._is_finished = False
        if trainer.is_global_zero:
            log.info("parameters\n%s", parameter_table(pl_module.model))

    def on_train_start(self, trainer: lightning.Trainer, pl_module: InteractiveTraining) -> None:
        if not self.start:
            self.start = _validate(trainer, pl_module)
            self._log(trainer, self.start)
            self._note("at the start", self.start)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: InteractiveTraining) -> None:
        if trainer.sanity_checking:
            return
        self.latest = pl_module.val_metrics.compute()
        self._latest_step = trainer.global_step
        self._draw(trainer, pl_module)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: InteractiveTraining) -> None:
        if self._latest_step != trainer.global_step:
            self.latest = _validate(trainer, pl_module)
            for callback in trainer.callbacks:
                if isinstance(callback, BestCheckpoint):
                    callback.consider(trainer, self.latest)
            self._log(trainer, self.latest)
            self._draw(trainer, pl_module)
        self._is_finished = True
        if trainer.is_global_zero:
            self._finish(trainer, pl_module)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: InteractiveTraining) -> None:
        # A run that was stopped between its last step and its report has no step left to train, and
        # Lightning then calls neither `on_train_start` nor `on_train_end`.
        if not self._is_finished:
            pl_module.to(trainer.strategy.root_device)
            self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.start = state_dict["start"]

    def _log(self, trainer: lightning.Trainer, scores: Mapping[str, float]) -> None:
        """Logs what was validated outside Lightning's loop."""
        for logger in trainer.loggers:
            named = {f"val/{name}": value for name, value in scores.items()}
            logger.log_metrics(named, step=trainer.global_step)
            logger.save()

    @rank_zero_only
    def _draw(self, trainer: lightning.Trainer, pl_module: InteractiveTraining) -> None:
        if self.num_pictures:
            path = self.run_dir / "figures" / f"clicks_step{trainer.global_step:06d}.png"
            with _answering(trainer, pl_module):
                records = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
                figures.draw_clicks(path, pl_module, records, self.num_pictures)
        self._draw_curves()

    def _draw_curves(self) -> None:
        figures.draw_curves(
            self.run_dir / "figures" / "curves.png", self.run_dir / run_folder.METRICS
        )

    def _finish(self, trainer: lightning.Trainer, pl_module: InteractiveTraining) -> None:
        self._draw_curves()
        self._note("at the end", self.latest)
        gained = {
            k: self.latest[k] - self.start[k]
            for k in HEADLINE
            if k in self.latest and k in self.start
        }
        self._note("gained", gained, sign="+")
        speed = next((c for c in trainer.callbacks if isinstance(c, Speed)), None)
        extra = speed.figures(trainer.global_step) if speed else {"steps": trainer.global_step}
        extra |= {f"start_{name}": self.start[name] for name in HEADLINE if name in self.start}
        result = {
            "protocol": "clicks",
            "dataset": " ".join(pl_module.val_sources) or pl_module.val_source,
            "num_images": pl_module.num_val_images,
            "num_masks": pl_module.val_metrics.num_masks,
            "checkpoint": str(self.run_dir / run_folder.LAST_CHECKPOINT),
            "metrics": {**self.latest, **extra},
        }
        run_folder.finish(self.run_dir, result)

    @rank_zero_only
    def _note(self, when: str, scores: Mapping[str, float], *, sign: str = "") -> None:
        text = "  ".join(f"{name} {scores[name]:{sign}.3f}" for name in HEADLINE if name in scores)
        log.info("validation %s: %s", when, text)


def _is_log_step(trainer: lightning.Trainer, steps_done: int) -> bool:
    """Whether what is logged at the step that makes `steps_done` reaches the loggers."""
    return trainer.log_every_n_steps > 0 and steps_done % trainer.log_every_n_steps == 0


def _validate(trainer: lightning.Trainer, pl_module: InteractiveTraining) -> dict[str, float]:
    """Runs the validation images outside Lightning's loop, before the first step and after the last."""
    with _answering(trainer, pl_module):
        pl_module.on_validation_epoch_start()
        for index, record in enumerate(trainer.datamodule.val_dataloader()):  # type: ignore[attr-defined]
            pl_module.validation_step(record, index)
        return pl_module.validation_scores()


@contextmanager
def _answering(trainer: lightning.Trainer, pl_module: InteractiveTraining) -> Iterator[None]:
    """As Lightning validates: in eval mode and the run's precision; parts then get their modes back."""
    modes = {module: module.training for module in pl_module.modules()}
    pl_module.eval()
    try:
        with trainer.precision_plugin.forward_context():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
