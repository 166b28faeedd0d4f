"""The commands: sam-train, sam-eval, sam-segment, sam-precompute, sam-convert, sam-export.

Each is a Hydra application over a file of `conf/`. Libraries are imported inside the jobs, so that
`--help` and a mistyped name answer at once.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from sam_train import allocator, cli_arguments, cli_errors, config
from sam_train.ops.files import write_atomically
from sam_train.training import stop_signals
from sam_train.training.comparison import FAILED

if TYPE_CHECKING:
    import lightning

log = logging.getLogger(__name__)

DONE, BUG, MISTAKE, INTERRUPTED = 0, 1, 2, 130
TRACEBACK = "SAM_TRAIN_TRACEBACK"
GOES_ON = {
    "train": "goes on from the last checkpoint, or begins again where there is none",
    "convert": "goes on with what is missing",
    "precompute": "goes on with what is missing",
    "segment": "goes on with the images that are missing",
}
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
    _prepare_host()
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
        _print_result(state.result or {})
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
        _print_result(result)
    print(f"See {folder}/figures, {folder}/metrics.json and {folder}/checkpoints/best.ckpt")


def evaluate(cfg: DictConfig) -> None:
    """sam-eval: measures a checkpoint by a protocol on the validation split of a data set."""
    from sam_train.checkpoints.load import load_model

    config.check_complete(cfg)
    _prepare_host()
    config.pin(cfg)
    source = config.instantiate(cfg.data.val)
    if source == config.instantiate(cfg.data.train):
        log.warning(
            "measuring on all images of the path; a run that trained on it held back a tenth. "
            "data.val_path=PATH names others"
        )
    protocol = config.instantiate(cfg.protocol)
    model = load_model(cfg.checkpoint, device=_device(cfg.device))
    folder = _evaluated_run(cfg) / "eval" / cfg.name
    result = protocol.run(model, source, folder, checkpoint=str(cfg.checkpoint))
    _print_result(result)
    print(f"See {folder}")


def convert(cfg: DictConfig) -> None:
    """sam-convert: a data set to shards; or shards checked, or counted."""
    from sam_train.convert import check, job, manifest, sample, stats

    _whole_number("num_workers", cfg.num_workers)
    _whole_number("num_pictures", cfg.num_pictures)
    if cfg.out is not None and Path(cfg.out).is_file():
        raise ValueError(f"out={cfg.out} is a file, expected a folder or a name that is free")
    if cfg.check is not None and cfg.stats is not None:
        raise ValueError("say check=PATH or stats=PATH, one at a time")
    if cfg.check is not None:
        folder = Path(cfg.out or "outputs/check")
        shards = _stated_shards("check", cfg.check)
        print(check.check(shards, folder, cfg.num_pictures, cfg.num_workers))
    elif cfg.stats is not None:
        print(stats.stats(_stated_shards("stats", cfg.stats), Path(cfg.out or "outputs/stats")))
    else:
        if "data" not in cfg or cfg.out is None:
            raise ValueError("say data=NAME out=DIR to convert, check=PATH or stats=PATH")
        config.check_complete(cfg)
        settings = {name: cfg[name] for name in sample.ShardSettings.__dataclass_fields__}
        decisive = {"val_share": cfg.val_share, "seed": cfg.seed, **settings}
        sources = {name: config.plain(cfg.data[name], resolve=True) for name in ("train", "val")}
        conversion = job.conversion(
            *(config.instantiate(cfg.data[name]) for name in sources),
            out=Path(cfg.out),
            settings=sample.ShardSettings(**settings),
            config=decisive | {"data": sources},
            max_bad_fraction=cfg.max_bad_fraction,
            val_share=cfg.val_share,
        )
        print(manifest.summary(conversion.run(cfg.num_workers), Path(cfg.out)))


def _whole_number(name: str, value: object) -> None:
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} is a whole number of 0 or more, got {value!r}")


def _stated_shards(name: str, value: object) -> str | list[str]:
    """What check= and stats= name: a folder called 2017 comes as a number."""
    stated = config.plain_value(value)
    if not (stated or stated == 0):
        raise ValueError(f"{name}= names no shards: say {name}=PATH, as data=shards takes it")
    return list(map(str, stated)) if isinstance(stated, list) else str(stated)


def precompute(cfg: DictConfig) -> None:
    """sam-precompute: keeps the image embeddings of a data set on disk; adds what is missing."""
    from sam_train.checkpoints.load import load_model

    config.check_complete(cfg)
    if cfg.split not in ("train", "val"):
        raise ValueError(f"expected split=train or split=val, got {cfg.split}")
    _prepare_host()
    source = config.instantiate(cfg.data[cfg.split])
    model = load_model(cfg.checkpoint, device=_device(cfg.device), img_size=cfg.img_size)
    done = config.instantiate(cfg.precompute).run(model, source, Path(cfg.run_dir))
    print(
        f"{done.num_added} images encoded, {done.num_images} in {done.folder}, "
        f"{done.bytes_per_image / 1e6:.2f} MB each"
    )


def segment(cfg: DictConfig) -> None:
    """sam-segment: masks for a user's own images, as SA-1B JSON and pictures."""
    from sam_train.checkpoints.load import load_model
    from sam_train.inference.segment_files import SegmentFiles
    from sam_train.models.fingerprint import model_id

    if cfg.tune:
        _tune(cfg)
        return
    if "mode" not in cfg:
        raise ValueError(
            "say mode=points points=[[x,y,label],...], mode=boxes boxes=[[x0,y0,x1,y1],...] or "
            "mode=automatic"
        )
    config.check_complete(cfg)
    for name in ("points", "boxes"):
        if cfg[name] is not None and name not in cfg.mode:
            raise ValueError(f"{name}= is of mode={name}: say that, or leave it out")
    _prepare_host()
    files = SegmentFiles(
        images=str(cfg.images),
        out=Path(cfg.out),
        max_bad_fraction=cfg.max_bad_fraction,
        overlay_px=cfg.overlay_px,
    )
    files.find()  # a mistyped path is better known before the model is read
    model = load_model(cfg.checkpoint, device=_device(cfg.device), img_size=cfg.img_size)
    segmenter = config.instantiate(cfg.mode, model=model)
    made_with = {
        "checkpoint": str(cfg.checkpoint),
        "model": model_id(model),
        "mode": config.plain(cfg.mode, resolve=True),
    }
    print(files.run(segmenter, made_with))
    if hasattr(segmenter, "report") and segmenter.report.points:
        print(segmenter.report)


def _tune(cfg: DictConfig) -> None:
    """sam-segment tune=true: thresholds for a model from labelled images."""
    from sam_train.checkpoints.load import load_model

    if cfg.get("mode", {}).get("generator") is None or "data" not in cfg:
        raise ValueError("tune=true wants mode=automatic data=NAME, with labelled images")
    cfg.images = None  # the labelled ones are looked at
    config.check_complete(cfg)
    _prepare_host()
    config.pin(cfg)
    source, tuning = config.instantiate(cfg.data.val), config.instantiate(cfg.tuning)
    model = load_model(cfg.checkpoint, device=_device(cfg.device), img_size=cfg.img_size)
    print(tuning.run(model, source, Path(cfg.out) / "tuning.json"))


def export(cfg: DictConfig) -> None:
    """sam-export: hands a checkpoint to other software, in its own format."""
    config.check_complete(cfg)
    from sam_train.checkpoints.load import load_model
    from sam_train.export import place

    out, form = Path(cfg.out), config.instantiate(cfg.format)
    place.check_free(out, is_folder=form.is_folder, overwrite=cfg.overwrite)
    model = load_model(cfg.checkpoint, img_size=cfg.img_size)
    report = place.write_whole(out, lambda made: form.write(model, made), owned=form.owned)
    print("\n".join([f"{out}", *(f"  {line}" for line in report)]))


def _prepare_host() -> None:
    import torch

    if not torch.cuda.is_available():
        allocator.keep_freed_memory()


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
        module, run = _imagined(cfg)
        size = estimate.fitting_batch_size(
            module, run, cfg.data.max_masks_per_batch, _free_bytes(cfg)
        )
        log.info("data.batch_size=auto: %d images fit", size)
    else:
        log.info("data.batch_size=auto: %s images, what this run began with", size)
    cfg.data.batch_size = size


def _free_bytes(cfg: DictConfig) -> float:
    """What the device of one process can still hold."""
    import torch

    from sam_train import doctor

    if cfg.trainer.accelerator != "cpu" and torch.cuda.is_available():
        return float(torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", 0)))[0])
    devices = cfg.trainer.devices
    return doctor.available_bytes() / (devices if isinstance(devices, int) and devices > 0 else 1)


def _imagined(cfg: DictConfig) -> tuple[Any, Any]:
    """The training on the meta device, and its batch."""
    import torch

    from sam_train.training.distillation import Teacher
    from sam_train.training.finetune import freeze
    from sam_train.training.step_cost import Run

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

    module, run = _imagined(cfg)
    accelerator = {"auto": _device("auto"), "gpu": "cuda"}.get(cfg.trainer.accelerator)
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

    from sam_train.training.finetune import freeze

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    module = config.instantiate(cfg.task)
    module.model_config = config.plain(cfg.model, resolve=True)  # travels in its checkpoints
    if weights is not None:
        from sam_train.checkpoints.load import load_weights

        load_weights(module.model, weights)
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


def _evaluated_run(cfg: DictConfig) -> Path:
    """The run folder an evaluation belongs to."""
    if cfg.run_dir is not None:
        return Path(cfg.run_dir)
    checkpoint = Path(cfg.checkpoint)
    if checkpoint.parent.name == "checkpoints":
        return checkpoint.parent.parent
    return Path("outputs") / checkpoint.stem


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros((), device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"expected device=cpu, cuda, cuda:1 or auto, got {name}: {reason}"
        ) from None
    return name


def _print_result(result: Any) -> None:
    for name, value in sorted(result.get("metrics", {}).items()):
        print(f"{name:>28}  {value:.4g}" if isinstance(value, float) else f"{name:>28}  {value}")


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


JOBS: dict[str, Callable[[DictConfig], None]] = {
    "train": train,
    "eval": evaluate,
    "convert": convert,
    "precompute": precompute,
    "segment": segment,
    "export": export,
}


class _JobError(BaseException):
    """Carries a job's error past Hydra, which would else print a line of its own about it."""


def run(verb: str, argv: Sequence[str]) -> int:
    """Runs one command and returns its exit code: 0, 1 for a bug, 2 for a mistake, 130 for Ctrl-C."""
    arguments = cli_arguments.Arguments(None, [])
    # How long OpenMP's threads wait for the next piece of work by spinning. GNU's default, milliseconds,
    # takes the cores from the readers; none at all (PASSIVE) pays for a wake-up at each of a step's
    # thousands of small operations. A quickstart step on two idle cores took 0.156 s, 0.327 s and, so,
    # 0.175 s; with another process on one of them 0.47 s by default and 0.42 s so.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        argv = _without_verb(verb, argv)
        arguments = cli_arguments.parse(argv)
        with stop_signals.as_ctrl_c() if verb == "train" else nullcontext():
            _run_hydra(verb, arguments)
    except KeyboardInterrupt:
        goes_on = GOES_ON.get(verb, "starts over")
        print(f"\nsam-{verb}: stopped by Ctrl-C. The same command {goes_on}.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except SystemExit as stop:  # of --help and of argparse
        return stop.code if isinstance(stop.code, int) else DONE
    except (Exception, _JobError) as error:
        return _report(verb, arguments, error)
    return DONE


def _without_verb(verb: str, argv: Sequence[str]) -> list[str]:
    first = argv[0] if argv else ""
    if first == verb:
        return list(argv[1:])
    if first in JOBS:
        raise ValueError(f"'{first}' is another command: sam-{first} {' '.join(argv[1:])}")
    return list(argv)


def _run_hydra(verb: str, arguments: cli_arguments.Arguments) -> None:
    job, typed = JOBS[verb], sys.argv
    failed: list[str] = []

    @functools.wraps(job)
    def carried(cfg: DictConfig) -> None:
        sys.argv = typed  # what Lightning starts its other processes with
        swept = HydraConfig.get().mode == RunMode.MULTIRUN
        note = Path(HydraConfig.get().runtime.output_dir) / FAILED
        if swept:
            note.unlink(missing_ok=True)
        try:
            job(cfg)
        except Exception as error:
            if not swept:
                raise _JobError from error
            failed.append(note.parent.name)  # the sweep goes on with its other jobs
            _report(verb, arguments, error)
            text = cli_errors.describe(error, root=verb) or f"{type(error).__name__}: {error}"
            write_atomically(note, f"{text}\n")

    sys.argv = [f"sam-{verb}", *arguments.hydra]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises, instead of printing and exiting with 1
    try:
        with config.user_recipes(arguments.config_dir):
            hydra.main(str(config.conf_dir()), config_name=verb, version_base="1.3")(carried)()
    finally:
        sys.argv = typed
    if failed:
        raise ValueError(f"of the sweep's jobs {len(failed)} failed: {', '.join(failed)}")


def _report(verb: str, arguments: cli_arguments.Arguments, error: BaseException) -> int:
    if isinstance(error, _JobError) and error.__cause__ is not None:
        error = error.__cause__
    message = cli_errors.describe(
        error, root=verb, overrides=arguments.overrides, config_dir=arguments.config_dir
    )
    if message is None or os.environ.get(TRACEBACK) == "1":
        traceback.print_exception(error)
    if message is None:
        return BUG
    print(f"sam-{verb}: {message}", file=sys.stderr)
    return MISTAKE


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m sam_train.cli VERB name=value ...`: the command named by the leading verb."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in JOBS:
        verbs = ", ".join(JOBS)
        print(f"expected a verb first, one of {verbs}; then name=value ...", file=sys.stderr)
        return MISTAKE
    return run(arguments[0], arguments)


def _script(verb: str) -> Callable[[], int]:
    return lambda: run(verb, sys.argv[1:])


train_script, eval_script = _script("train"), _script("eval")
segment_script, precompute_script = _script("segment"), _script("precompute")
convert_script, export_script = _script("convert"), _script("export")


if __name__ == "__main__":
    sys.exit(main())
