"""What goes on around the steps: checkpoints, figures of speed and gradients, the final report."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_only

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
    steps; a second Ctrl-C stops at once.

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
        self._previous: Any = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._saved_step = trainer.global_step
        self._previous = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, self._on_interrupt)

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        step = trainer.global_step
        if self._told_to_stop or step - self._saved_step >= self.every_n_steps:
            self._save(trainer)
        if self._told_to_stop:
            raise KeyboardInterrupt

    def on_train_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._save(trainer)

    def teardown(self, trainer: lightning.Trainer, pl_module: Any, stage: str) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def _save(self, trainer: lightning.Trainer) -> None:
        if trainer.global_step != self._saved_step:
            self._saved_step = trainer.global_step
            trainer.save_checkpoint(self.path)

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._told_to_stop:
            raise KeyboardInterrupt
        log.warning("stopping after this step; Ctrl-C again stops at once")
        self._told_to_stop = True


class BestCheckpoint(lightning.Callback):
    """Keeps `best.ckpt`, the checkpoint of the best validation score, that after the last step included.

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

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: InteractiveTraining) -> None:
        if not trainer.sanity_checking:
            self.consider(trainer, pl_module.val_metrics.compute())

    def consider(self, trainer: lightning.Trainer, scores: Mapping[str, float]) -> None:
        """Saves the model if `scores` are the best so far."""
        if self.monitor not in scores:
            raise ValueError(
                f"callbacks.best.monitor is one of {', '.join(sorted(scores))}, got {self.monitor}"
            )
        score = scores[self.monitor]
        sign = 1 if self.mode == "max" else -1
        if self.best is None or sign * score > sign * self.best:
            self.best = score
            trainer.save_checkpoint(self.path)

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
        if trainer.global_step % trainer.log_every_n_steps:
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
    """Counts images, masks and seconds of training, over restarts too, and logs them per second."""

    def __init__(self) -> None:
        self.num_images = 0
        self.num_masks = 0
        self.seconds = 0.0
        self._since = 0.0
        self._window = (0.0, 0, 0)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._since = time.monotonic()
        self._window = (self._since, self.num_images, self.num_masks)

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
        self.seconds, self._since = self.seconds + now - self._since, now
        if trainer.global_step % trainer.log_every_n_steps == 0:
            start, images, masks = self._window
            spent = max(now - start, 1e-9)
            pl_module.log("train/images_per_second", (self.num_images - images) / spent)
            rate = (self.num_masks - masks) / spent
            pl_module.log("train/masks_per_second", rate, prog_bar=True)
            self._window = (now, self.num_images, self.num_masks)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self.seconds += time.monotonic() - self._since if trainer.training else 0.0

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._since = time.monotonic()
        self._window = (self._since, self.num_images, self.num_masks)

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

    def on_train_start(self, trainer: lightning.Trainer, pl_module: InteractiveTraining) -> None:
        if not self.start:
            self.start = self._validate(trainer, pl_module)
            self._note("at the start", self.start)
            for logger in trainer.loggers:
                named = {f"val/{name}": value for name, value in self.start.items()}
                logger.log_metrics(named, step=trainer.global_step)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: InteractiveTraining) -> None:
        if trainer.sanity_checking:
            return
        self.latest = pl_module.val_metrics.compute()
        self._latest_step = trainer.global_step
        self._draw(trainer, pl_module)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: InteractiveTraining) -> None:
        if self._latest_step != trainer.global_step:
            self.latest = self._validate(trainer, pl_module)
            for callback in trainer.callbacks:
                if isinstance(callback, BestCheckpoint):
                    callback.consider(trainer, self.latest)
            self._draw(trainer, pl_module)
        for logger in trainer.loggers:
            named = {f"val/{name}": value for name, value in self.latest.items()}
            logger.log_metrics(named, step=trainer.global_step)
            logger.save()
        if trainer.is_global_zero:
            self._finish(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.start = state_dict["start"]

    def _validate(
        self, trainer: lightning.Trainer, pl_module: InteractiveTraining
    ) -> dict[str, float]:
        """Runs the validation images outside Lightning's loop, before the first step and after the last."""
        pl_module.eval()
        pl_module.on_validation_epoch_start()
        for index, record in enumerate(trainer.datamodule.val_dataloader()):  # type: ignore[attr-defined]
            pl_module.validation_step(record, index)
        scores = pl_module.validation_scores()
        pl_module.train()
        return scores

    @rank_zero_only
    def _draw(self, trainer: lightning.Trainer, pl_module: InteractiveTraining) -> None:
        if self.num_pictures:
            pl_module.eval()
            path = self.run_dir / "figures" / f"clicks_step{trainer.global_step:06d}.png"
            records = iter(trainer.datamodule.val_dataloader())  # type: ignore[attr-defined]
            figures.draw_clicks(path, pl_module, records, self.num_pictures)
            pl_module.train()
        figures.draw_curves(self.run_dir / "figures" / "curves.png", self.run_dir / "metrics.csv")

    def _finish(self, trainer: lightning.Trainer, pl_module: InteractiveTraining) -> None:
        figures.draw_curves(self.run_dir / "figures" / "curves.png", self.run_dir / "metrics.csv")
        self._note("at the end", self.latest)
        gained = {name: self.latest[name] - value for name, value in self.start.items()}
        self._note("gained", gained)
        speed = next((c for c in trainer.callbacks if isinstance(c, Speed)), None)
        extra = speed.figures(trainer.global_step) if speed else {"steps": trainer.global_step}
        extra |= {f"start_{name}": self.start[name] for name in HEADLINE if name in self.start}
        records = list(trainer.datamodule.val_dataloader())  # type: ignore[attr-defined]
        result = {
            "protocol": "clicks",
            "dataset": records[0].source if records else "",
            "num_images": len(records),
            "num_masks": pl_module.val_metrics.num_masks,
            "checkpoint": str(self.run_dir / run_folder.LAST_CHECKPOINT),
            "metrics": {**self.latest, **extra},
        }
        run_folder.finish(self.run_dir, result)

    @rank_zero_only
    def _note(self, when: str, scores: Mapping[str, float]) -> None:
        text = "  ".join(f"{name} {scores[name]:+.3f}" for name in HEADLINE if name in scores)
        log.info("validation %s: %s", when, text)


class BudgetProgressBar(TQDMProgressBar):
    """A bar over the run's budget, steps or minutes, with the time that is left."""

    def init_train_tqdm(self) -> Any:
        bar = super().init_train_tqdm()
        bar.bar_format = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        return bar

    def on_train_epoch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        self.train_progress_bar.reset(total=1.0)
        self.train_progress_bar.initial = 0
        self.train_progress_bar.set_description(f"step {trainer.global_step}")

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if trainer.global_step % self.refresh_rate == 0:
            self.train_progress_bar.n = pl_module.progress()
            self.train_progress_bar.set_description(f"step {trainer.global_step}", refresh=False)
            self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module))

    def get_metrics(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {
            name.split("/")[-1]: value
            for name, value in super().get_metrics(*args, **kwargs).items()
            if name != "v_num"
        }
