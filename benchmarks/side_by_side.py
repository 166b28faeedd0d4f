"""Timing of several implementations of one thing in one process, and the table it ends in."""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sam_train import allocator


def parser(description: str, repeats: int) -> argparse.ArgumentParser:
    """The arguments that all such benchmarks take."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--repeats", type=int, default=repeats, help="runs of each that are timed")
    made.add_argument("--threads", type=int, default=1, help="of torch; 1: CPU time is measured")
    made.add_argument("--device", default="cpu", help="cpu, or cuda where there is one")
    made.add_argument("--out", type=Path, help="folder that also gets the table as a file")
    return made


def settle(threads: int, device: str) -> None:
    """The same ground for all: threads, and an allocator that does not hand every tensor back."""
    allocator.keep_freed_memory()
    torch.set_num_threads(threads)
    if device != "cpu":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False


def medians(
    runs: Mapping[str, Callable[[], object]], repeats: int, *, device: str = "cpu"
) -> dict[str, float]:
    """Median seconds of each, taken in turn, forwards and backwards, after one run that warms up.

    CPU time where there is one thread, so that a busy machine disturbs little; wall time otherwise.
    """
    use_cpu_time = device == "cpu" and torch.get_num_threads() == 1
    now = time.process_time if use_cpu_time else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name in list(runs)[:: -1 if repeat % 2 else 1]:
            start = now()
            runs[name]()
            if device != "cpu":
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(now() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def largest_difference(got: Tensor, expected: Tensor) -> float:
    """Relative to the largest expected number."""
    return float((got - expected).abs().max() / expected.abs().max())


def gradient_difference(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest difference of a gradient, by norm.

    Relative to the expected norm; where that is rounding noise (a key's bias, which a softmax takes out
    again), relative to a millionth of the norm of all.
    """
    of_all = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    return max(
        float((got[name] - gradient).norm() / gradient.norm().clamp(min=1e-6 * of_all))
        for name, gradient in expected.items()
    )


def machine(device: str) -> str:
    """Hardware, threads and torch, in words."""
    if device != "cpu":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [n for n in info.read_text().splitlines() if n.startswith("model name")]
        model = names[0].split(":")[1].strip() if names else model
    kind = "CPU time of one thread" if torch.get_num_threads() == 1 else "wall time"
    return (
        f"{model}, {torch.get_num_threads()} thread(s), {kind}, "
        f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def publish(report: str, name: str, out: Path | None) -> None:
    """Prints a report, and writes it to the folder `out` under today's date."""
    print(report)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{datetime.date.today()}-{name}.md"
        path.write_text(report + "\n", encoding="utf-8")
