"""`data-engine VERB root=DIR name=value ...`: the model-in-the-loop annotation rounds of SAM's data engine."""

from __future__ import annotations

import difflib
import logging
import os
import sys
import traceback
from collections.abc import Sequence

from omegaconf import OmegaConf

from data_engine import settings
from data_engine.verbs import VERBS, Call
from sam_train import cli_arguments, cli_errors
from sam_train.training import stop_signals

DONE, BUG, MISTAKE, INTERRUPTED = 0, 1, 2, 130
HELP = ("--help", "-h", "help")
TRACEBACK = "SAM_TRAIN_TRACEBACK"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb and returns its exit code: 0, 1 for a bug, 2 for a mistake, 130 for Ctrl-C."""
    verb, *rest = list(sys.argv[1:] if argv is None else argv) or [""]
    if verb in HELP or any(argument in HELP for argument in rest):
        print(_help())
        return DONE
    call = Call([], None)
    try:
        _check_verb(verb)
        arguments = cli_arguments.parse(rest)
        call = Call(arguments.overrides, arguments.config_dir)
        if unknown := [one for one in arguments.hydra if one not in arguments.overrides]:
            raise ValueError(f"expected NAME=VALUE, got '{unknown[0]}'")
        # The work of many small operations: see sam_train/cli.py.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        with stop_signals.as_ctrl_c():
            VERBS[verb](call)
    except KeyboardInterrupt:
        print("\ndata-engine: stopped. The same command goes on.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:
        return _report(call, error)
    return DONE


def _check_verb(verb: str) -> None:
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"expected one of {', '.join(VERBS)}, got '{verb}'{hint}")


def _report(call: Call, error: Exception) -> int:
    message = cli_errors.describe(
        error, root="engine", overrides=call.overrides, config_dir=call.config_dir
    )
    if message is None or os.environ.get(TRACEBACK) == "1":
        traceback.print_exception(error)
    if message is None:
        return BUG
    print(f"data-engine: {message}", file=sys.stderr)
    return MISTAKE


def _help() -> str:
    verbs = "\n".join(f"  {name:<10} {verb.__doc__}" for name, verb in VERBS.items())
    names = OmegaConf.to_yaml(settings.composed([]))
    return (
        f"data-engine VERB root=DIR name=value ...\n\n{verbs}\n\nNames and their values:\n{names}"
    )


if __name__ == "__main__":
    sys.exit(main())
