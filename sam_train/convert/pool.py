"""Work shared out to processes that end when their parent does, even if that is killed."""

from __future__ import annotations

import itertools
import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

import cv2

DONE = "done"


def run(
    function: Callable[[Any], Iterable[Any]], tasks: Iterable[Any], num_workers: int
) -> Iterator[Any]:
    """What `function` gives out for each task, as it comes.

    Args:
        function: gives out the news of one task; is sent to the processes, as are tasks and news.
        tasks: are begun in order.
        num_workers: processes; 0 works in this one.

    Raises:
        ValueError: `function` did, or a process ended before its task.
        RuntimeError: `function` raised something else, in a process; holds its traceback.
    """
    if num_workers == 0:
        for task in tasks:
            yield from function(task)
        return
    # Started anew, not forked: a fork would hold the others' pipes open, and none would see the end.
    context = multiprocessing.get_context("spawn")
    waiting = iter(tasks)
    processes, busy = [], set()
    try:
        for task in itertools.islice(waiting, num_workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, function), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            ours.send(task)
            busy.add(ours)
        while busy:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                news = _receive(connection)
                if news != DONE:
                    yield news
                elif (task := next(waiting, None)) is not None:
                    connection.send(task)
                else:
                    connection.close()
                    busy.discard(connection)
    finally:
        for connection in busy:
            connection.close()
        for process in processes:
            process.join(timeout=10)


def _receive(connection: Connection) -> Any:
    try:
        news = connection.recv()
    except EOFError:
        raise ValueError(
            "a process that was reading has ended (out of memory?); start again with a lower num_workers"
        ) from None
    if isinstance(news, _Failure):
        raise ValueError(news.text) if news.is_expected else RuntimeError(news.text)
    return news


class _Failure:
    def __init__(self, error: Exception) -> None:
        self.is_expected = isinstance(error, ValueError | OSError)
        self.text = _text(error) if self.is_expected else traceback.format_exc()


def _text(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _work(connection: Connection, function: Callable[[Any], Iterable[Any]]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends, and this with it
    cv2.setNumThreads(0)
    try:
        while True:
            task = connection.recv()
            try:
                for news in function(task):
                    connection.send(news)
            except (ValueError, OSError, RuntimeError, LookupError, TypeError) as error:
                if isinstance(error, BrokenPipeError):
                    return
                connection.send(_Failure(error))
            else:
                connection.send(DONE)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
