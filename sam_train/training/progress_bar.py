"""How far a run has come, on a terminal or in a log."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from datetime import timedelta
from typing import Any

import lightning
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from sam_train.training.module import TrainingModule

log = logging.getLogger(__name__)


class BudgetProgressBar(TQDMProgressBar):
    """A bar over the run's budget, steps or time, with masks/s and the time that is left.

    Where the output is no terminal, a line of the log every now and then takes its place.

    Args:
        refresh_rate: steps between two looks of the bar.
        seconds_per_line: between two lines of the log.
    """

    def __init__(self, refresh_rate: int = 1, seconds_per_line: float = 30.0) -> None:
        super().__init__(refresh_rate)
        self.seconds_per_line = seconds_per_line
        self._started = (0.0, 0.0)
        self._last_line = 0.0

    @property
    def is_enabled(self) -> bool:
        return super().is_enabled and sys.stdout.isatty()

    def init_train_tqdm(self) -> Tqdm:
        bar = super().init_train_tqdm()
        bar.bar_format = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        # tqdm shows nothing on a terminal that does not know its size; this takes 80 x 24 then.
        bar.ncols, bar.nrows = shutil.get_terminal_size()
        bar.dynamic_ncols = lambda _: tuple(shutil.get_terminal_size())
        return bar

    def init_validation_tqdm(self) -> Tqdm:
        """None: the training bar says that validation is under way."""
        return Tqdm(disable=True)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: TrainingModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._started = (time.monotonic(), pl_module.progress())
        self._last_line = self._started[0]
        bar = self.train_progress_bar
        bar.total, bar.n, bar.initial = 1.0, self._started[1], self._started[1]
        bar.set_description(f"step {trainer.global_step}")

    def on_train_epoch_start(self, *_: Any) -> None:
        """Nothing: an epoch is no part of the budget."""

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: TrainingModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self.is_enabled and trainer.global_step % self.refresh_rate == 0:
            self._refresh(trainer, pl_module)
        is_silent = self.is_enabled or not self._enabled or not self.refresh_rate
        if not is_silent and time.monotonic() - self._last_line >= self.seconds_per_line:
            self._last_line = time.monotonic()
            log.info("%s", self._line(trainer, pl_module))

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: TrainingModule) -> None:
        super().on_validation_start(trainer, pl_module)
        self.train_progress_bar.set_description(f"step {trainer.global_step}, validating")

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: TrainingModule) -> None:
        super().on_validation_end(trainer, pl_module)
        self._refresh(trainer, pl_module)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: TrainingModule) -> None:
        # The stream of batches ends once. Only then, so that what is reported at the end goes below the bar.
        self._refresh(trainer, pl_module)
        self.train_progress_bar.close()

    def on_exception(self, *_: Any) -> None:
        if self._train_progress_bar is not None:
            self._train_progress_bar.close()

    def get_metrics(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        names = {"masks_per_second": "masks/s"}
        found = {k.split("/")[-1]: v for k, v in super().get_metrics(*args, **kwargs).items()}
        return {names.get(name, name): v for name, v in found.items() if name != "v_num"}

    def _refresh(self, trainer: lightning.Trainer, pl_module: TrainingModule) -> None:
        bar = self.train_progress_bar
        bar.n = pl_module.progress()
        bar.set_description(f"step {trainer.global_step}", refresh=False)
        bar.set_postfix(self.get_metrics(trainer, pl_module))

    def _line(self, trainer: lightning.Trainer, pl_module: TrainingModule) -> str:
        since, start = self._started
        progress = pl_module.progress()
        seconds = (time.monotonic() - since) * (1 - progress) / max(progress - start, 1e-9)
        left = f"  left {timedelta(seconds=round(seconds))}" if progress > start else ""
        metrics = self.get_metrics(trainer, pl_module).items()
        text = "".join(f"  {name} {float(value):.4g}" for name, value in metrics)
        return f"step {trainer.global_step}  {progress:.0%}{left}{text}"
