"""Warnings kept back for a moment, in several threads at a time."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

_LOCK = threading.Lock()
_INSIDE: list[object] = []
_BEFORE = ExitStack()


@contextmanager
def quiet(category: type[Warning] = Warning, *, module: str = "") -> Iterator[None]:
    """Ignores warnings of a category.

    Python's filters are one list for all threads, and `warnings.catch_warnings` puts back what it found: of
    two threads the one that leaves last would put back what the other had set. Here the last one to leave
    puts back what the first one found; what is ignored meanwhile is ignored in all threads.

    Args:
        category: of the warnings.
        module: a regular expression that the name of the warning module begins with.
    """
    with _LOCK:
        if not _INSIDE:
            _BEFORE.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", category=category, module=module)
        _INSIDE.append(None)
    try:
        yield
    finally:
        with _LOCK:
            _INSIDE.pop()
            if not _INSIDE:
                _BEFORE.close()
