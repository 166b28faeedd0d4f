"""The signals that stop a run, wherever they meet it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

NUMBERS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def as_ctrl_c() -> Iterator[None]:
    """Inside, SIGTERM ends the work as Ctrl-C does, by a KeyboardInterrupt.

    For what goes on before the first step and after the last: between them `LastCheckpoint` listens. Where
    the interrupt comes out of a library as an error of the library's own, it is a KeyboardInterrupt again.
    Signals that were ignored before stay so.
    """
    process, was_told = os.getpid(), False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal was_told
        if os.getpid() != process:  # a reader that has just been forked: its parent ends it
            return
        was_told = True
        raise KeyboardInterrupt

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # no other may handle signals
        before = {number: signal.getsignal(number) for number in NUMBERS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        yield
    except Exception as error:
        if was_told:
            raise KeyboardInterrupt from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
