"""Checkpoints of a run: where it goes on from, and its best model."""

from __future__ import annotations

import logging
import math
import re
import shutil
import signal
import threading
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.plugins.io import TorchCheckpointIO

from sam_train.metrics.clicks import SIZE_SUFFIXES
from sam_train.ops.files import check_whole, write_atomically
from sam_train.training import run_folder
from sam_train.training.module import TrainingModule

log = logging.getLogger(__name__)


class VerifiedCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, reads it back, and only then puts it there.

    While `last.ckpt` is replaced, three whole ones are on disk: it, the new one and `previous.ckpt`.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """See Lightning's `CheckpointIO`."""

        def write(unfinished: Path) -> None:
            try:
                torch.save(checkpoint, unfinished)
            except RuntimeError as error:  # torch's own, for what the system says to it
                if not re.search(r"inline_container|PytorchStreamWriter", str(error)):
                    raise
                free = shutil.disk_usage(unfinished.parent).free / 2**30
                raise OSError(
                    f"{path} cannot be written: is the disk full? {free:.2f} GiB are free there. The same "
                    "command goes on from the checkpoint before"
                ) from error
            check_whole(unfinished)

        is_last = Path(path).name == run_folder.LAST_CHECKPOINT.name
        before = partial(run_folder.keep_previous, Path(path)) if is_last else None
        write_atomically(Path(path), write, before=before)


class LastCheckpoint(Checkpoint):
    """Saves `last.ckpt` every so many steps, at the end, and when the run is told to stop.

    What is saved is the state between two optimiser steps, with all that was logged and validated until
    then on disk. The checkpoint before it stays as `previous.ckpt`, to fall back to.

    Ctrl-C and SIGTERM let the step under way finish; a second signal stops at once. Whichever rank is
    told, all stop after the same step.

    Args:
        path: where the checkpoint goes.
        every_n_steps: optimiser steps between saves.
    """

    # A `Checkpoint` to Lightning, which calls these after all other callbacks: their state is complete.

    def __init__(self, *, path: str, every_n_steps: int) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps is 1 or more, got {every_n_steps}")
        self.path = Path(path)
        self.every_n_steps = every_n_steps
        self._told_to_stop = False
        self._saved_step = self._seen_step = -1

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._told_to_stop = False
        self._saved_step = self._seen_step = trainer.global_step
        for callback in trainer.callbacks:
            # Lightning keeps its count, and forgets that it was enough.
            if isinstance(callback, EarlyStopping) and callback.wait_count >= callback.patience:
                trainer.should_stop = True
        if threading.current_thread() is threading.main_thread():  # no other may handle signals
            # Lightning has noted down the handlers there were, and puts them back after the run.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._on_signal)

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        # Gradients that are still being accumulated are in no checkpoint.
        has_stepped = trainer.global_step != self._seen_step
        self._seen_step = trainer.global_step
        is_over = trainer.strategy.reduce_boolean_decision(self._told_to_stop, all=False)
        if has_stepped and is_over:
            self._save(trainer)
            raise KeyboardInterrupt
        # Lightning takes a checkpoint from before a validation for one from after it.
        if has_stepped and self._is_due(trainer) and not validation_is_due(trainer):
            self._save(trainer)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking and self._is_due(trainer):
            self._save(trainer)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._save(trainer)

    def _is_due(self, trainer: lightning.Trainer) -> bool:
        return trainer.global_step - self._saved_step >= self.every_n_steps

    def _save(self, trainer: lightning.Trainer) -> None:
        if trainer.global_step == self._saved_step:
            return
        self._saved_step = trainer.global_step
        for logger in trainer.loggers:
            logger.save()
        trainer.save_checkpoint(self.path, weights_only=False)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._told_to_stop:
            raise KeyboardInterrupt
        log.warning("stopping after this step; Ctrl-C again stops at once")
        self._told_to_stop = True


class BestCheckpoint(lightning.Callback):
    """Keeps `best.ckpt`, the weights of the best validation score, that after the last step included.

    A run that validates nothing keeps its last weights there.

    Args:
        path: where the checkpoint goes.
        monitor: a validation score by name, such as `mean_iou@1`, or `nuclei/mean_iou@1` in a mixture.
        mode: `max` where more is better, `min` where less is.
    """

    def __init__(self, *, path: str, monitor: str = "mean_iou@1", mode: str = "max") -> None:
        if mode not in ("max", "min"):
            raise ValueError(f"mode is max or min, got {mode}")
        self.path, self.monitor, self.mode = Path(path), monitor, mode
        self.best: float | None = None

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: TrainingModule) -> None:
        prefixes = ("", *(f"{source}/" for source in pl_module.val_sources))
        names = pl_module.val_metrics.names
        self._check(
            [p + name + suffix for p in prefixes for suffix in SIZE_SUFFIXES for name in names]
        )

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: TrainingModule) -> None:
        if not trainer.sanity_checking:
            self.consider(trainer, pl_module.val_metrics.compute())

    def consider(self, trainer: lightning.Trainer, scores: Mapping[str, float]) -> None:
        """Saves the model if `scores` are the best so far."""
        self._check(scores)
        score = scores[self.monitor]
        sign = 1 if self.mode == "max" else -1
        if self.best is None or math.isnan(self.best) or sign * score > sign * self.best:
            self.best = score
            self.save(trainer)

    def save(self, trainer: lightning.Trainer) -> None:
        """Without the optimiser's state, twice the size of the weights: a run goes on from last.ckpt."""
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


def validation_is_due(trainer: lightning.Trainer) -> bool:
    """Whether Lightning validates after the batch that was trained on last."""
    interval = trainer.val_check_batch
    if not trainer.enable_validation or not isinstance(interval, int) or interval < 1:
        return False
    return (trainer.fit_loop.total_batch_idx + 1) % interval == 0
