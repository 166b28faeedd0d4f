"""Takes two steps on a batch with two processes and again with one; run by test_interactive.py.

    python steps_of_processes.py FOLDER OVERRIDES

FOLDER holds batch.pt; into it go the gradients of the first step, gradients_N.pt, and the weights
after the second on each rank, weights_N_RANK.pt. OVERRIDES is a JSON list.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Timer

from sam_train import config
from sam_train.structures import ImageBatch


class Share:
    """A rank's images of the batch, twice."""

    def __init__(self, batch: ImageBatch, rank: int, world_size: int) -> None:
        images = torch.arange(len(batch.images))[rank::world_size]
        is_mine = torch.isin(batch.image_index, images)
        self.batch = ImageBatch(
            images=batch.images[images],
            input_sizes=batch.input_sizes[images],
            masks=batch.masks[is_mine],
            boxes=batch.boxes[is_mine],
            image_index=torch.searchsorted(images, batch.image_index[is_mine]),
            keys=tuple(batch.keys[i] for i in images),
            seeds=tuple(batch.seeds[i] for i in images),
        )

    def __iter__(self) -> Iterator[ImageBatch]:
        return iter([self.batch, self.batch])


class Data(lightning.LightningDataModule):
    """The batch, split over the ranks by image."""

    def __init__(self, batch: ImageBatch) -> None:
        super().__init__()
        self.batch = batch

    def train_dataloader(self) -> Share:
        assert self.trainer is not None
        return Share(self.batch, self.trainer.global_rank, self.trainer.world_size)

    def val_dataloader(self) -> list[Any]:
        return []


class Save(lightning.Callback):
    """Writes gradients and weights."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for callback in trainer.callbacks:
            if isinstance(callback, Timer):  # clocks of ranks differ: their learning rates must not
                callback._offset = 20 * trainer.global_rank

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == 0 and trainer.is_global_zero:
            gradients = {
                name: p.grad for name, p in pl_module.model.named_parameters() if p.requires_grad
            }
            torch.save(gradients, self.folder / f"gradients_{trainer.world_size}.pt")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        name = f"weights_{trainer.world_size}_{trainer.global_rank}.pt"
        torch.save(pl_module.model.state_dict(), self.folder / name)


def main(folder: Path, overrides: list[str]) -> None:
    batch = ImageBatch(**torch.load(folder / "batch.pt"))
    for num_processes in (
        2,
        1,
    ):  # two first: a process that has been through a backward cannot fork
        torch.manual_seed(0)
        training = config.instantiate(config.compose("train", overrides).task)
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=num_processes,
            strategy="ddp_fork" if num_processes > 1 else "auto",
            max_epochs=1,
            max_time={"seconds": 100},
            limit_val_batches=0,
            callbacks=[Save(folder)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        trainer.fit(training, datamodule=Data(batch))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
