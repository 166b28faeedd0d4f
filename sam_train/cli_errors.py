"""One message for each mistake a user can make: what was expected, what exists, and what to do.

`describe` knows the mistakes and answers None for everything else, which is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
import inspect
import os
import re
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path

from hydra.errors import (
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.utils import get_object
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from sam_train import config

# Raised where values come in from outside; anything else is this project's own fault.
EDGE_ERRORS = (ValueError, OSError, ImportError)
PROJECT_DIR = config.PACKAGE_DIR.parent
WORKER_ERROR = re.compile(r"Caught (\w+) in DataLoader worker process")
MAX_LISTED = 40


def describe(
    error: BaseException, *, root: str, overrides: Iterable[str] = (), config_dir: str | None = None
) -> str | None:
    """The message for a user's mistake, or None where `error` is a bug.

    Args:
        error: what came out of the command.
        root: the command's file of `conf/`, for the names that exist.
        overrides: what the user typed, ditto.
        config_dir: the user's own recipes, ditto.
    """
    if isinstance(error, MissingConfigException):
        return _missing_option(error, config_dir)
    if isinstance(error, InstantiationException):
        return _instantiation(error, list(overrides))
    if isinstance(error, MissingMandatoryValue):
        key = error.full_key or str(error).rsplit(" ", 1)[-1]
        return f"{key} has no value; say {key}=..."
    if isinstance(error, OverrideParseException):
        return f"cannot read '{error.override}' as NAME=VALUE"
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return _composition(error, root, list(overrides), config_dir)
    if (
        type(error).__name__ == "MisconfigurationException"
    ):  # Lightning's; importing it takes seconds
        return f"trainer: {error}"
    if (advice := _memory_advice(error)) is not None:
        return advice
    if isinstance(error, EDGE_ERRORS) and WORKER_ERROR.search(str(error)):
        return _from_worker(str(error))
    if isinstance(error, (OSError, ImportError)):
        return _text(error)
    if isinstance(error, (ValueError, FloatingPointError)) and _raised_here(error):
        return _text(error)
    return None


def _memory_advice(error: BaseException) -> str | None:
    if not isinstance(error, RuntimeError):
        return None
    from sam_train.training.bounded import ADVICE, is_out_of_memory  # torch is there by now

    return (
        f"memory ran out: {str(error).splitlines()[0]}\n{ADVICE}"
        if is_out_of_memory(error)
        else None
    )


def near(name: str, known: Iterable[str], what: str) -> str:
    """Close names, else all of them: the second half of a message about an unknown one."""
    known = sorted(set(known))
    last = name.rpartition(".")[2]
    same_last = [key for key in known if key.rpartition(".")[2] == last]
    if close := list(dict.fromkeys(same_last[:3] + difflib.get_close_matches(name, known, n=3))):
        return f"Did you mean {' or '.join(close)}?"
    if not known:
        return f"There is no {what} here."
    more = f", ... ({len(known)} in all)" if len(known) > MAX_LISTED else ""
    return f"There is: {', '.join(known[:MAX_LISTED])}{more}."


def _missing_option(error: MissingConfigException, config_dir: str | None) -> str:
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    known = config.options(group, config_dir) if group else []
    if not known:
        return f"there is no recipe {error.missing_cfg_file}.yaml in {config.conf_dir()}" + (
            f" or {config_dir}" if config_dir else ""
        )
    listed = f" There is: {', '.join(known)}." if len(known) <= MAX_LISTED else ""
    close = difflib.get_close_matches(name, known, n=2)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return (
        f"{group}={name}: there is no such {group}.{hint}{listed}\n"
        f"Your own go in DIR/{group}/, with --config-dir DIR."
    )


def _composition(error: Exception, root: str, overrides: list[str], config_dir: str | None) -> str:
    text = str(error)
    cause = error.__cause__
    if match := re.search(r"Could not (?:override|delete from config\.) '([^']+)'", text):
        return _unknown_name(match[1], root, overrides, config_dir)
    if match := re.search(r"Ambiguous value for argument '(.+?)'", text, re.DOTALL):
        name, _, value = match[1].partition("=")
        return (
            f"{match[1]}: for a list say {name}=[{value}], to try one after the other add --multirun, "
            f"for a text with a comma put it in quotes twice: {name}='\"...\"'"
        )
    if isinstance(cause, OmegaConfBaseException):
        text = f"{text}: {cause}"
    return re.sub(r"\s*\n\s*(full_key|object_type)[:=].*", "", text).strip()


def _unknown_name(name: str, root: str, overrides: list[str], config_dir: str | None) -> str:
    rest = [item for item in overrides if item.partition("=")[0].lstrip("+~") != name]
    try:
        keys = config.dotted_keys(config.compose(root, rest, config_dir=config_dir))
    except (HydraException, OmegaConfBaseException):  # a second mistake on the same line
        keys = []
    groups = [path.name for path in config.conf_dir().iterdir() if path.is_dir()]
    # A group that this command has not would be no help; one that it leaves empty is not among the keys.
    used = {key.partition(".")[0] for key in keys}
    named = (*keys, *(group for group in groups if group in used or not keys))
    known = {key for key in named if not key.rpartition(".")[2].startswith("_")}
    if name in known or name in groups:
        return f"{name}: {root} has no such group. sam-{root} --help lists all."
    parent = name.rpartition(".")[0]
    siblings = {key for key in known if key.rpartition(".")[0] == parent}
    close = difflib.get_close_matches(name, known, n=1) or any(
        key.rpartition(".")[2] == name.rpartition(".")[2] for key in known
    )
    hint = near(name, known if close else siblings or known, "setting")
    return f"{name}: there is no such setting or group. {hint} `--help` lists all."


def _instantiation(error: InstantiationException, overrides: list[str]) -> str | None:
    text = str(error)
    match = re.search(r"full_key: (\S+)", text)
    where = f"{match[1]}: " if match else ""
    cause = error.__cause__
    while isinstance(cause, InstantiationException) and cause.__cause__:
        cause = cause.__cause__
    if located := re.search(r"locating target '(.+?)'", text):
        why = cause.__cause__ or cause if cause else ""
        return f"{where}_target_ {located[1]} cannot be imported ({_text(why)})"
    if isinstance(cause, TypeError) and _raised_by_the_call(cause):
        return where + _wrong_arguments(cause, text)
    if isinstance(cause, OmegaConfBaseException) or cause is None:
        return re.sub(r"\s*\n\s*(full_key|object_type).*", "", f"{where}{cause or text}")
    if isinstance(cause, EDGE_ERRORS) or type(cause).__name__ == "MisconfigurationException":
        return f"{where}{_text(cause)}"
    if isinstance(cause, (TypeError, RuntimeError, KeyError, AttributeError)):
        # A value of the wrong kind that nobody checked: it came from the configuration all the same.
        node = match[1] if match else ""
        given = ", ".join(item for item in overrides if item.lstrip("+").startswith(f"{node}."))
        return (
            f"{where}cannot be built from {given or 'these values'} ({type(cause).__name__}: {cause}); "
            "the variable SAM_TRAIN_TRACEBACK=1 shows where"
        )
    return None


def _wrong_arguments(error: TypeError, text: str) -> str:
    target = re.search(r"target '(.+?)'", text)
    try:
        parameters = list(inspect.signature(get_object(target[1])).parameters) if target else []
    except (ValueError, TypeError, ImportError):
        parameters = []
    message = re.sub(
        r"^[\w.]*__init__\(\)", target[1].rpartition(".")[2] if target else "", str(error)
    )
    unknown = re.search(r"unexpected keyword argument '(\w+)'", message)
    return f"{message}. {near(unknown[1], parameters, 'argument')}" if unknown else message


def _from_worker(text: str) -> str | None:
    files = re.findall(r'^  File "(.+?)"', text, re.MULTILINE)
    last = list(re.finditer(r"^(\w[\w.]*): ", text, re.MULTILINE))[-1]
    if last[1].endswith("ValueError") and not (files and _is_ours(files[-1])):
        return None
    return text[last.end() :].strip()


def _text(error: object) -> str:
    if isinstance(error, OSError) and error.strerror:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        said = f"{', '.join(names)}: {error.strerror}" if names else error.strerror
        is_plain = error.strerror == os.strerror(errno.ENOSPC)
        return f"{said}. Make room and call again: what is finished stays" if is_plain else said
    return str(error) or type(error).__name__


def _raised_by_the_call(error: BaseException) -> bool:
    """Whether the arguments did not fit, as against an error inside what was called."""
    frame = error.__traceback__
    return frame is not None and frame.tb_next is None


def _raised_here(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and _is_ours(frames[-1].filename)


def _is_ours(filename: str) -> bool:
    """Whether a ValueError from this file is about a value a user gave, not a library's inner trouble."""
    path = Path(filename)
    if any(path.is_relative_to(PROJECT_DIR / name) for name in ("sam_train", "data_engine")):
        return True
    if "lightning" in path.parts:  # whose ValueErrors are about the values of conf/trainer
        return True
    libraries = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
    return not any(path.is_relative_to(folder) for folder in libraries) and path.exists()
