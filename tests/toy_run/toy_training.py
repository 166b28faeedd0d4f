"""The smallest thing `sam-train` can train, for tests of the command around it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sam_train.training import run_folder


class ToyModel(nn.Linear):
    """A line through a point."""

    def __init__(self, *, slope: float) -> None:
        if slope < 0:
            raise ValueError(f"slope is at least 0, got {slope}")
        super().__init__(1, 1)
        self.weight.data.fill_(slope)


class ToyTraining(lightning.LightningModule):
    """Fits a ToyModel, and breaks at a step when asked to."""

    def __init__(self, *, model: ToyModel, lr: float, break_at: int, how: str) -> None:
        super().__init__()
        self.model, self.lr, self.break_at, self.how = model, lr, break_at, how

    def training_step(self, batch: list[Tensor]) -> Tensor:
        if self.global_step == self.break_at:
            self._break()
        loss = (self.model(batch[0]) - 2 * batch[0]).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def _break(self) -> None:
        if self.how == "ctrl-c":
            os.kill(os.getpid(), signal.SIGINT)
        elif self.how == "bug":
            raise AssertionError("this should not happen")
        elif self.how == "library bug":
            torch.distributions.Normal(torch.zeros(1), -torch.ones(1), validate_args=True)
        else:
            raise FileNotFoundError(2, "No such file or directory", "/no/such/shard.tar")


class ToyData(lightning.LightningDataModule):
    """Four numbers."""

    def __init__(self, *, path: str) -> None:
        super().__init__()
        self.path = path

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.arange(4.0)[:, None]), batch_size=2)


class WriteResult(lightning.Callback):
    """The final metrics.json."""

    def __init__(self, *, run_dir: str) -> None:
        self.run_dir = Path(run_dir)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        metrics = {"steps": trainer.global_step, "loss": float(trainer.callback_metrics["loss"])}
        run_folder.finish(self.run_dir, {"protocol": "toy", "metrics": metrics})
