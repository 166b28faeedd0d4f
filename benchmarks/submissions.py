"""Eight annotators at once on one store: is a submission lost, or doubled, and how many a second?

    python benchmarks/submissions.py                        # 10,000 on SQLite and on PostgreSQL
    python benchmarks/submissions.py --submissions 400 --stores postgresql://user@host/empty
    python benchmarks/submissions.py --out benchmarks/results

Four threads of this process and four processes take tasks and hand in five masks each. One submission in
ten is sent twice, some come after their lease is over, and `--kills` times a process is killed (SIGKILL)
and started again as the same annotator. PostgreSQL is started for it, where it is installed. Anything
lost or doubled is named and ends in exit code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import multiprocessing
import os
import platform
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sqlalchemy

from data_engine.mask_store.store import Store, open_store
from data_engine.records import DrawnMask, Event, Image, Submission, Task
from data_engine.tasks import Conflict, Desk
from sam_train.ops import rle

SERVER = Path(__file__).parents[1] / "tests" / "data_engine" / "throwaway_postgres.py"
NUM_THREADS, NUM_PROCESSES, NUM_MASKS = 4, 4, 5
SIDE_PX = 256
LEASE_S = 1.0
TWICE = 0.1
PAUSE_S = 0.05
KINDS = (("thread", NUM_THREADS), ("process", NUM_PROCESSES))


class Load(NamedTuple):
    """What is done to a store.

    Attributes:
        submissions: how many tasks there are.
        kills: how often a process is killed.
        late: share of submissions that wait until their lease is over.
        seed: of everything random.
    """

    submissions: int
    kills: int
    late: float
    seed: int


class Outcome(NamedTuple):
    """What became of it.

    Attributes:
        seconds: from the first task to the last submission.
        kills: how many there were in that time.
        refused: submissions that another annotator's had overtaken.
        problems: what was lost or doubled; empty if all is well.
    """

    seconds: float
    kills: int
    refused: int
    problems: list[str]


def main() -> int:
    load, stores, out = arguments()
    rows, problems = [], list[str]()
    with contextlib.ExitStack() as stack:
        for store in stores:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="submissions-")))
            url = str(folder / "engine.sqlite") if store == "sqlite" else store
            if store == "postgresql":
                url = stack.enter_context(postgres())
            outcome = run(url, folder, load)
            problems += outcome.problems
            rows.append(row(make_name(url), load, outcome))
            print(rows[-1], *outcome.problems, sep="\n", flush=True)
    if out:
        date = datetime.date.today().isoformat()
        (out / f"{date}-submissions.md").write_text(page(date, load, rows), encoding="utf-8")
    return 1 if problems else 0


def arguments() -> tuple[Load, list[str], Path | None]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--submissions", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--late", type=float, default=0.005)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stores",
        nargs="+",
        default=["sqlite", "postgresql"],
        help="sqlite, postgresql (a server of its own) or the URL of an empty database",
    )
    parser.add_argument("--out", type=Path, help="folder that also gets the table as a file")
    given = parser.parse_args()
    return Load(given.submissions, given.kills, given.late, given.seed), given.stores, given.out


def run(url: str, folder: Path, load: Load) -> Outcome:
    """Fills a new store with tasks, has them all done, and counts."""
    store = open_store(url, create=True)
    store.add_images(
        Image(id=f"{n:03}", key=f"{n:03}", width=SIDE_PX, height=SIDE_PX, path="-")
        for n in range(100)
    )
    Desk(store).add_tasks(
        Task(id=f"{n:06}", round=1, stage="assisted", image_id=f"{n % 100:03}", priority=n % 7)
        for n in range(load.submissions)
    )
    start = time.perf_counter()
    names = {kind: [f"{kind}{n}" for n in range(num)] for kind, num in KINDS}
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        threads = [pool.submit(annotate, url, folder, name, load, 0) for name in names["thread"]]
        kills = keep_processes(url, folder, load, names["process"], store)
        for thread in threads:
            thread.result()
    seconds = time.perf_counter() - start
    refused = sum(path.read_text().count("refused ") for path in folder.glob("*.receipts"))
    problems = check(store, folder, load)
    store.close()
    return Outcome(seconds, kills, refused, problems)


def keep_processes(url: str, folder: Path, load: Load, names: list[str], store: Store) -> int:
    """Runs the annotators that are processes, and kills and restarts them; returns how often."""
    context = multiprocessing.get_context("spawn")
    rng = random.Random(load.seed)

    def started(name: str, life: int) -> Any:
        process = context.Process(target=annotate, args=(url, folder, name, load, life))
        process.start()
        return process

    processes = {name: started(name, 0) for name in names}
    kills = 0
    # Spread over the work and not over time, of which nobody knows how much it takes.
    moments = sorted(rng.uniform(0.02, 0.9) * load.submissions for _ in range(load.kills))
    while kills < load.kills and (done := store.count_tasks().get("done", 0)) < load.submissions:
        if done >= moments[kills]:
            name = rng.choice(names)
            processes[name].kill()
            processes[name].join()
            kills += 1
            processes[name] = started(name, kills)
        time.sleep(PAUSE_S * rng.random())
    for process in processes.values():
        process.join()
        if process.exitcode:
            raise RuntimeError(f"{process.name} ended with {process.exitcode}")
    return kills


def annotate(url: str, folder: Path, name: str, load: Load, life: int) -> None:
    """Works until nothing is left; sends some submissions twice, and some late."""
    desk = Desk(open_store(url), lease_s=LEASE_S)
    rng = random.Random(f"{load.seed}/{name}/{life}")
    with (folder / f"{name}.receipts").open("a", buffering=1) as receipts:
        parent = multiprocessing.parent_process()
        while parent is None or parent.is_alive():
            task = desk.next_task(name)
            if task is None:
                if set(desk.store.count_tasks()) <= {"done"}:
                    break
                time.sleep(PAUSE_S)  # others hold what is left
                continue
            if rng.random() < load.late:
                time.sleep(LEASE_S * rng.uniform(1.0, 1.5))
            answer = submission(task, name, rng)
            try:
                receipt = desk.submit(answer, name)
                receipts.write(f"{receipt.submission_id}\n")
                if rng.random() < TWICE and desk.submit(answer, name) != receipt:
                    receipts.write(f"another receipt for {receipt.submission_id}\n")
            except Conflict:
                receipts.write(f"refused {answer.submission_id}\n")
    desk.store.close()


def submission(task: Task, name: str, rng: random.Random) -> Submission:
    """Five squares, two clicks each."""
    return Submission(
        submission_id=f"{task.id}/{task.version}/{name}/{rng.getrandbits(32):08x}",
        task_id=task.id,
        version=task.version,
        masks=tuple(
            DrawnMask(rle=square(rng), seconds=3.0, num_clicks=2) for _ in range(NUM_MASKS)
        ),
        events=tuple(
            Event(
                kind="click", offset_s=1.5 * n, mask_index=n // 2, data={"x": n, "y": n, "label": 1}
            )
            for n in range(2 * NUM_MASKS)
        ),
        seconds=15.0,
    )


def square(rng: random.Random) -> dict[str, Any]:
    mask = np.zeros((SIDE_PX, SIDE_PX), bool)
    x, y = rng.randrange(SIDE_PX - 40), rng.randrange(SIDE_PX - 40)
    mask[y : y + 40, x : x + 40] = True
    return rle.encode(mask)


def check(store: Store, folder: Path, load: Load) -> list[str]:
    """What was lost or doubled, in words."""
    problems = []
    stored = {one.submission_id: one for one in store.submissions()}
    given = [line for path in folder.glob("*.receipts") for line in path.read_text().split("\n")]
    receipts = [line for line in given if line and not line.startswith(("refused ", "another "))]
    problems += [line for line in given if line.startswith("another ")]
    problems += [f"lost: {name}" for name in receipts if name not in stored]
    problems += [f"{n} receipts for {name}" for name, n in Counter(receipts).items() if n > 1]
    tasks = Counter(one.task_id for one in stored.values())
    problems += [f"task {name} was done {n} times" for name, n in tasks.items() if n > 1]
    if len(tasks) != load.submissions:
        problems.append(f"{load.submissions - len(tasks)} tasks were never done")
    masks = Counter(mask.task_id for mask in store.masks())
    problems += [f"task {t}: {masks[t]} masks" for t in tasks if masks[t] != NUM_MASKS]
    if sum(masks.values()) != NUM_MASKS * load.submissions:
        problems.append(f"{sum(masks.values())} masks of {NUM_MASKS * load.submissions}")
    return problems


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """A server that writes to the disk as one that is in use, for as long as it is needed."""
    with subprocess.Popen(
        [sys.executable, SERVER, "--durable"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdin is not None and server.stdout is not None
        url = server.stdout.readline().strip()
        if not url:
            raise SystemExit("no PostgreSQL here: install it, or say --stores sqlite")
        yield url
        server.stdin.close()


def make_name(url: str) -> str:
    return "PostgreSQL" if url.startswith("postgres") else f"SQLite {sqlite3.sqlite_version}"


def row(store: str, load: Load, outcome: Outcome) -> str:
    rate = load.submissions / outcome.seconds
    return (
        f"| {store} | {load.submissions:,} | {outcome.seconds:.0f} | {rate:.0f} | {rate * NUM_MASKS:.0f} "
        f"| {outcome.kills} | {outcome.refused} | {len(outcome.problems)} |"
    )


def page(date: str, load: Load, rows: list[str]) -> str:
    return "\n".join(
        [
            f"# Submissions, {date}",
            "",
            f"`python benchmarks/submissions.py --submissions {load.submissions}`: {NUM_THREADS} threads and "
            f"{NUM_PROCESSES} processes at once, {NUM_MASKS} masks and {2 * NUM_MASKS} clicks a submission, "
            f"{TWICE:.0%} sent twice, {load.late:.1%} later than their lease of {LEASE_S:.0f} s, processes "
            "killed (SIGKILL) at random moments and started again. Every commit is forced to the disk; "
            "the rate includes taking the task, and the waits of those that are late.",
            "",
            f"{platform.machine()}, {len(os.sched_getaffinity(0))} core(s) of {os.cpu_count()}, "
            f"load {os.getloadavg()[1]:.1f}, Python {platform.python_version()}, SQLAlchemy "
            f"{sqlalchemy.__version__}.",
            "",
            "| store | submissions | s | submissions/s | masks/s | kills | refused | lost or doubled |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
