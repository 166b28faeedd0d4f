"""The job of sam-train: what a configuration trains, in which folder, at what cost."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import get_class
from omegaconf import DictConfig

from sam_train import cli_common, config
from sam_train.training import stop_signals

if TYPE_CHECKING:
    import lightning

log = logging.getLogger(__name__)

NO_NEWS = (
    "You're resuming from a checkpoint that ended before the epoch ended",  # the data module can
    "Checkpoint directory .* exists and is not empty",
    "The '.*_dataloader' does not have many workers",
    r"Found \d+ module\(s\) in eval mode",  # the frozen ones, which the table of parameters tells
    # With float16 the scaler leaves out a first step that overflows, which the guard counts.
    r"Detected call of `lr_scheduler.step\(\)` before `optimizer.step\(\)`",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning 2.6 with torch's newest pytree
)


@stop_signals.as_ctrl_c()
def train(cfg: DictConfig) -> None:
    """sam-train: trains in a run folder, or goes on there."""
    if cfg.doctor:
        from sam_train import doctor

        print(doctor.report(cfg.paths.data))
        return
    from sam_train.training import run_lock

    config.check_complete(cfg)
    cli_common.prepare_host(runs_long=True)
    _settle_run_dir(cfg)
    _settle_model(cfg)
    folder = Path(cfg.run_dir)
    _settle_batch_size(cfg, folder)
    if cfg.estimate:
        print(_estimate(cfg))
        return
    with run_lock.held(folder):
        _train_in(folder, cfg)


def _train_in(folder: Path, cfg: DictConfig) -> None:
    """Starts in a run folder, goes on there, or says that it is done."""
    from sam_train.training import run_folder

    plain = config.plain(cfg, resolve=False)
    state = run_folder.inspect(folder)
    action = run_folder.decide(folder, state, plain, resume=cfg.resume)
    if action is run_folder.Action.FINISHED:
        cli_common.print_result(state.result or {})
        print(f"{folder} holds this run, finished. Another run_dir=PATH starts anew.")
        return
    resumed = (
        run_folder.newest_whole_checkpoint(folder) if action is run_folder.Action.RESUME else None
    )
    module, data, trainer = _build_training(cfg, weights=None if resumed else cfg.checkpoint)
    run_folder.prepare(folder, plain, action)
    with _train_log(folder):
        print(f"Going on from {resumed}" if resumed else f"Training in {folder}", flush=True)
        _fit(trainer, module, data, resumed)
    if (result := run_folder.inspect(folder).result) is not None:
        cli_common.print_result(result)
    print(f"See {folder}/figures, {folder}/metrics.json and {folder}/checkpoints/best.ckpt")


def _settle_run_dir(cfg: DictConfig) -> None:
    """The recipe's name and, in a sweep, each job's own folder, as plain values."""
    config.pin(cfg)
    hydra_config = HydraConfig.get()
    swept = hydra_config.mode == RunMode.MULTIRUN
    cfg.run_dir = hydra_config.runtime.output_dir if swept else cfg.run_dir


def _settle_model(cfg: DictConfig) -> None:
    """In the place of model=from_checkpoint, the model that the checkpoint holds."""
    if not cfg.model.get("from_checkpoint"):
        return
    from sam_train.checkpoints.load import stored_config

    if cfg.checkpoint is None:
        raise ValueError("model=from_checkpoint trains what checkpoint=PATH holds: say that too")
    changes = config.given(cfg.model)
    del changes["from_checkpoint"]
    config.replace_node(cfg, "model", stored_config(cfg.checkpoint, changes))


def _settle_batch_size(cfg: DictConfig, folder: Path) -> None:
    """`data.batch_size=auto`: what the run began with, or as many images as the memory holds."""
    from sam_train.training import estimate, run_folder

    if cfg.data.get("batch_size") != "auto":
        return
    state = run_folder.inspect(folder)
    size = None
    if state.last_checkpoint is not None or state.result is not None:  # else nothing was begun
        size = (state.config or {}).get("data", {}).get("batch_size")
    if size is None:
        if cfg.trainer.num_nodes > 1:
            raise ValueError(
                "data.batch_size=auto looks at one machine: state a number for several"
            )
        cfg.data.batch_size = 1
        module, run = imagined(cfg)
        size = estimate.fitting_batch_size(
            module, run, cfg.data.max_masks_per_batch, free_bytes(cfg)
        )
        log.info("data.batch_size=auto: %d images fit", size)
    else:
        log.info("data.batch_size=auto: %s images, what this run began with", size)
    cfg.data.batch_size = size


def free_bytes(cfg: DictConfig) -> float:
    """What the device of one process can still hold."""
    import torch

    from sam_train import doctor

    if cfg.trainer.accelerator != "cpu" and torch.cuda.is_available():
        return float(torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", 0)))[0])
    devices = cfg.trainer.devices
    return doctor.available_bytes() / (devices if isinstance(devices, int) and devices > 0 else 1)


def imagined(cfg: DictConfig) -> tuple[Any, Any]:
    """The training on the meta device, and its batch."""
    import torch

    from sam_train.training.distillation import Teacher
    from sam_train.training.finetune import freeze
    from sam_train.training.interactive import InteractiveTraining
    from sam_train.training.step_cost import Run

    if not issubclass(get_class(cfg.task._target_), InteractiveTraining):
        raise ValueError(
            "estimate=true and data.batch_size=auto know what prompts cost, not what this task does: "
            "state data.batch_size, and try a few steps with trainer.max_steps=20"
        )
    given = {}
    if "teacher" in cfg.task:
        node = config.plain(cfg.task.teacher, resolve=True)
        del node["_target_"]
        given["teacher"] = Teacher.without_weights(**node)
    with torch.device("meta"):
        module = config.instantiate(cfg.task, **given)
    freeze(module.model, cfg.finetune)
    most_masks = cfg.data.batch_size * _max_masks(cfg.data)
    run = Run.of_trainer(
        config.plain(cfg.trainer, resolve=True),
        batch_size=cfg.data.batch_size,
        num_masks=min(most_masks, cfg.data.max_masks_per_batch or most_masks),
    )
    return module, run


def _max_masks(data: DictConfig) -> int:
    """The most masks that an image may have: in a mixture, of any of its sets."""
    own = (data.get("transforms") or {}).values()
    of_sets = [one.max_masks for one in own if "max_masks" in one]
    return max([data.train_transform.max_masks, *of_sets])


def _estimate(cfg: DictConfig) -> str:
    """What the run would cost, without any of its weights or data."""
    from sam_train.training import estimate
    from sam_train.training.machine_speed import Speed, measure_speed

    module, run = imagined(cfg)
    accelerator = {"auto": cli_common.device("auto"), "gpu": "cuda"}.get(cfg.trainer.accelerator)
    if cfg.estimate_tflops is not None:
        stated = Speed(flops=1e12 * cfg.estimate_tflops)
        return estimate.report(module, run, stated, "a device of the stated speed")
    device = accelerator or "cpu"
    return estimate.report(module, run, measure_speed(device, run.precision), device)


def _build_training(
    cfg: DictConfig, weights: str | None
) -> tuple[lightning.LightningModule, lightning.LightningDataModule, lightning.Trainer]:
    import lightning
    import torch

    from sam_train.checkpoints.load import load_weights
    from sam_train.training.finetune import freeze

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    module = config.instantiate(cfg.task)
    # Travels in its checkpoints.
    module.model_config = config.plain(cfg.task.get("model", cfg.model), resolve=True)
    if weights is not None:
        # A task of the user's own may be any LightningModule.
        start = getattr(module, "start_from", None) or partial(load_weights, module.model)
        start(weights)
    freeze(module.model, cfg.finetune)
    data = config.instantiate(cfg.data)
    callbacks = dict(cfg.callbacks or {})
    if not cfg.trainer.enable_progress_bar:  # Lightning refuses the one with the other
        callbacks.pop("progress", None)
    if cfg.trainer.accelerator == "auto":
        # Lightning would take an Apple GPU, which has no float64 to draw prompts with.
        cfg.trainer.accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    watching = _instantiate_all(callbacks)
    trainer = config.instantiate(
        cfg.trainer,
        logger=_instantiate_all(cfg.logger or {}),
        callbacks=watching,
        # Lightning would else add checkpoints of its own.
        enable_checkpointing=any(
            isinstance(one, lightning.pytorch.callbacks.Checkpoint) for one in watching
        ),
        default_root_dir=cfg.run_dir,
    )
    return module, data, trainer


def _instantiate_all(nodes: Mapping[Any, Any]) -> list[Any]:
    return [config.instantiate(node) for node in nodes.values() if node is not None]


def _fit(
    trainer: lightning.Trainer,
    module: lightning.LightningModule,
    data: lightning.LightningDataModule,
    resumed: Path | None,
) -> None:
    import torch

    try:
        with _quiet_lightning():
            trainer.fit(module, datamodule=data, ckpt_path=resumed, weights_only=True)
    except (RuntimeError, ValueError, KeyError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if (
            isinstance(error, torch.OutOfMemoryError)
            or resumed is None
            or not any(frame.name.startswith("restore") for frame in frames)
        ):
            raise
        raise ValueError(
            f"{resumed} does not fit this configuration: {str(error).splitlines()[0]}. Choose another "
            f"run_dir=PATH; checkpoint={resumed} starts from its weights there, if they fit"
        ) from error
    except SystemExit:
        # Lightning turns Ctrl-C into exit code 1, once its callbacks have saved.
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Leaves out what is no news here: a resumed run has checkpoints, readers are counted in conf/data."""
    with warnings.catch_warnings():
        for text in NO_NEWS:
            warnings.filterwarnings("ignore", message=text)
        yield


@contextmanager
def _train_log(folder: Path) -> Iterator[None]:
    """Adds what is logged, and the traceback of whatever ends the run, to the folder's train.log."""
    handler = logging.FileHandler(folder / "train.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    except BaseException:
        ended = {
            "name": __name__,
            "levelname": "ERROR",
            "msg": "the run ended here",
            "exc_info": sys.exc_info(),
        }
        handler.handle(logging.makeLogRecord(ended))
        raise
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
