"""Keeps glibc from handing memory back to the system between the steps of a run on the CPU."""

from __future__ import annotations

import ctypes
import os
import sys

# Numbers of glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
TOP_PAD_BYTES = 64 << 20


def keep_freed_memory() -> bool:
    """Lets every later large tensor reuse the pages of an earlier one.

    By default glibc maps each large block anew and unmaps it when it is freed, so that every tensor of a
    step is paid for in page faults: on two cores the image encoder's forward and backward pass of eight
    256 px images took 0.27 s so, and 0.11 s with this. The process keeps its highest memory until it ends.

    Returns:
        Whether it was done: not where the user has settings of malloc's, nor without glibc.
    """
    if not sys.platform.startswith("linux") or any(n.startswith("MALLOC_") for n in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, TOP_PAD_BYTES))
    accepted = [mallopt(name, value) == 1 for name, value in settings]
    return all(accepted)
