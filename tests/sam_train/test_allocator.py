"""Freed memory is used again and not asked of the system anew."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import resource
from sam_train import allocator
print(allocator.keep_freed_memory() if {keep} else None)
import torch
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(16, 1 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc only")


def run(*, keep: bool, **variables: str) -> tuple[str, int]:
    """What `keep_freed_memory` said, and the page faults of twenty tensors of 64 MiB, one at a time."""
    environment = {n: v for n, v in os.environ.items() if not n.startswith("MALLOC_")} | variables
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(keep=keep)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    said, count = done.stdout.split()
    return said, int(count)


@linux_only
def test_large_tensors_reuse_the_pages_of_earlier_ones() -> None:
    said, kept = run(keep=True)
    _, by_default = run(keep=False)
    assert said == "True"
    assert kept < 0.1 * by_default


@linux_only
def test_the_users_own_settings_win() -> None:
    said, _ = run(keep=True, MALLOC_ARENA_MAX="2")
    assert said == "False"


HUGE = """
from sam_train import allocator
allocator.keep_freed_memory(huge_pages={huge})
import torch
x = torch.ones(64 << 20)
lines = open("/proc/self/smaps_rollup").read().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("AnonHugePages")))
lines = open("/proc/self/status").read().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("VmRSS")))
"""


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def has_huge_pages() -> bool:
    return HUGE_PAGES.is_file() and "[never]" not in HUGE_PAGES.read_text()


@linux_only
@pytest.mark.skipif(not has_huge_pages(), reason="this system has no huge pages")
@pytest.mark.parametrize(("asked", "limited"), [(True, False), (True, True), (False, False)])
def test_large_tensors_lie_in_huge_pages_where_asked_and_nothing_is_taken_ahead(
    asked: bool, limited: bool
) -> None:
    """`limited`: the address space has no room for a reservation; all else works."""
    command = [sys.executable, "-c", HUGE.format(huge=asked)]
    if limited:
        command = ["bash", "-c", 'ulimit -v 9000000 && exec "$@"', "bash", *command]
    environment = {n: v for n, v in os.environ.items() if not n.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    huge, resident = map(int, done.stdout.split())
    assert resident < 3e6
    if not limited and "[madvise]" in HUGE_PAGES.read_text():
        assert (huge > 200_000) == asked
