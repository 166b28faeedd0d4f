"""`sam-train doctor=true`: what this installation can do, what is missing and how to get it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from sam_train import config

DISTRIBUTION = "sam-train"
GIB = 1024**3


def report(data_root: str) -> str:
    """The findings as text, a line each.

    Args:
        data_root: the folder of the named data sets, `paths.data`.
    """
    sections = {
        "Machine": _machine(),
        "Core packages": _core(),
        "Extras": _extras(),
        f"Data sets below {data_root}": _data_sets(Path(data_root)),
        "Logging": _logging(),
    }
    return "\n".join(
        line for title, lines in sections.items() for line in (title, *(f"  {x}" for x in lines))
    )


def _machine() -> Iterator[str]:
    yield f"python {platform.python_version()} on {platform.system()} {platform.machine()}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    yield f"{cores} CPU cores, {memory:.1f} GiB memory"
    yield from _gpus()


def _gpus() -> Iterator[str]:
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            yield f"cuda:{index} {gpu.name}, {gpu.total_memory / GIB:.0f} GiB"
    elif Path("/proc/driver/nvidia/version").exists():
        built = torch.version.cuda or "no CUDA"
        yield (
            f"an NVIDIA driver, but torch (built for {built}) cannot use it: "
            "install a torch wheel built for your driver's CUDA version"
        )
    else:
        yield "no GPU: training and evaluation run on the CPU (trainer.accelerator=cpu)"


def _core() -> Iterator[str]:
    versions = {name: _version(name) for name in _requirements()[""]}
    yield ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    if missing := [name for name, version in versions.items() if not version]:
        yield f"MISSING {', '.join(missing)}: pip install {DISTRIBUTION}"


def _extras() -> Iterator[str]:
    for extra, names in sorted(_requirements().items()):
        if missing := [name for name in names if extra and not _version(name)]:
            how = f"pip install '{DISTRIBUTION}[{extra}]'"
            yield f"{extra}: missing {', '.join(missing)}; get it with {how}"
        elif extra:
            yield f"{extra}: installed"


def _data_sets(root: Path) -> Iterator[str]:
    found = [name for name in config.options("data") if (root / name).is_dir()]
    for name in found:
        yield f"{name}: {sum(1 for path in (root / name).rglob('*') if path.is_file())} files"
    recipes = {path.stem: path.read_text() for path in (config.conf_dir() / "data").glob("*.yaml")}
    named = [name for name, text in recipes.items() if f"paths.data}}/{name}/" in text]
    if missing := sorted(set(named) - set(found)):
        yield (
            f"not here: {', '.join(missing)}. Point to them with paths.data=DIR or the variable "
            f"SAM_TRAIN_DATA; {config.conf_dir()}/data/NAME.yaml says where to get each"
        )
    yield "synthetic scenes are built in: data=synthetic"


def _logging() -> Iterator[str]:
    yield "metrics.csv always; logger=tensorboard or logger=wandb as well"
    if config.has_wandb_key():
        yield "wandb: a key is at hand, runs are sent"
    else:
        yield "wandb: no key, runs stay in the run folder; `wandb login` or WANDB_API_KEY sends them"


def _requirements() -> dict[str, list[str]]:
    """Package names by extra; the core ones under the empty name."""
    by_extra: dict[str, list[str]] = {"": []}
    for line in _requirement_lines():
        extra = re.search(r"""extra\s*==\s*["']([\w-]+)["']""", line)
        name = re.match(r"[\w.-]+", line)
        if name and name[0] != DISTRIBUTION:
            by_extra.setdefault(extra[1] if extra else "", []).append(name[0])
    return by_extra


def _requirement_lines() -> list[str]:
    try:
        return importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        text = (config.PACKAGE_DIR.parent / "pyproject.toml").read_text()
        project = tomllib.loads(text)["project"]
        extras = project["optional-dependencies"].items()
        return project["dependencies"] + [
            f"{line}; extra == '{extra}'" for extra, lines in extras for line in lines
        ]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def available_bytes() -> float:
    """Host memory that a process may still take: of the machine, and of the control group it is in."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    available = 1024.0 * int(fields["MemAvailable"].split()[0])
    group = Path("/sys/fs/cgroup")
    for limit, used in (
        (group / "memory.max", group / "memory.current"),
        (group / "memory/memory.limit_in_bytes", group / "memory/memory.usage_in_bytes"),
    ):
        if limit.exists() and (most := limit.read_text().strip()).isdigit():
            available = min(available, float(most) - float(used.read_text()))
    return available
