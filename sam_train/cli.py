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
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from sam_train import cli_arguments, cli_common, cli_errors, config
from sam_train.cli_train import train
from sam_train.ops.files import write_atomically
from sam_train.training import stop_signals
from sam_train.training.comparison import FAILED

log = logging.getLogger(__name__)

DONE, BUG, MISTAKE, INTERRUPTED = 0, 1, 2, 130
TRACEBACK = "SAM_TRAIN_TRACEBACK"
GOES_ON = {
    "train": "goes on from the last checkpoint, or begins again where there is none",
    "convert": "goes on with what is missing",
    "precompute": "goes on with what is missing",
    "segment": "goes on with the images that are missing",
}


def evaluate(cfg: DictConfig) -> None:
    """sam-eval: measures a checkpoint by a protocol on the validation split of a data set."""
    from sam_train.checkpoints.load import load_model

    config.check_complete(cfg)
    cli_common.prepare_host()
    config.pin(cfg)
    source = config.instantiate(cfg.data.val)
    if source == config.instantiate(cfg.data.train):
        log.warning(
            "measuring on all images of the path; a run that trained on it held back a tenth. "
            "data.val_path=PATH names others"
        )
    protocol = config.instantiate(cfg.protocol)
    device, asked_in = _place(cfg)
    model = load_model(cfg.checkpoint, device=device)
    folder = _evaluated_run(cfg) / "eval" / cfg.name
    with asked_in:
        result = protocol.run(model, source, folder, checkpoint=str(cfg.checkpoint))
    cli_common.print_result(result)
    print(f"See {folder}")


def _place(cfg: DictConfig) -> tuple[str, AbstractContextManager[object]]:
    """The device that a model is put on, and the precision that it is asked in."""
    device = cli_common.device(cfg.device)
    return device, cli_common.precision(str(cfg.precision), device)


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
    cli_common.prepare_host()
    source = config.instantiate(cfg.data[cfg.split])
    model = load_model(cfg.checkpoint, device=cli_common.device(cfg.device), img_size=cfg.img_size)
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
    cli_common.prepare_host()
    files = SegmentFiles(
        images=str(cfg.images),
        out=Path(cfg.out),
        max_bad_fraction=cfg.max_bad_fraction,
        overlay_px=cfg.overlay_px,
        max_pixels=cfg.max_pixels,
    )
    files.find()  # a mistyped path is better known before the model is read
    device, asked_in = _place(cfg)
    model = load_model(cfg.checkpoint, device=device, img_size=cfg.img_size)
    segmenter = config.instantiate(cfg.mode, model=model)
    made_with = {
        "checkpoint": str(cfg.checkpoint),
        "model": model_id(model),
        "mode": config.plain(cfg.mode, resolve=True),
    }
    if cfg.precision != cli_common.FULL:
        made_with["precision"] = cfg.precision
    with asked_in:
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
    cli_common.prepare_host()
    config.pin(cfg)
    source, tuning = config.instantiate(cfg.data.val), config.instantiate(cfg.tuning)
    device, asked_in = _place(cfg)
    model = load_model(cfg.checkpoint, device=device, img_size=cfg.img_size)
    with asked_in:
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


def _evaluated_run(cfg: DictConfig) -> Path:
    """The run folder an evaluation belongs to."""
    if cfg.run_dir is not None:
        return Path(cfg.run_dir)
    checkpoint = Path(cfg.checkpoint)
    if checkpoint.parent.name == "checkpoints":
        return checkpoint.parent.parent
    return Path("outputs") / checkpoint.stem


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
