"""Which code made something, for the lineage of what the engine writes."""

from __future__ import annotations

import importlib.metadata
import subprocess
from functools import cache

from sam_train.config import PACKAGE_DIR


@cache
def code_version() -> str:
    """The package's version and, in a git checkout, its commit: `0.1.0+a5deef2f1c0b`, `-dirty` if edited."""
    try:
        version = importlib.metadata.version("sam-train")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        version = "0"
    if not (PACKAGE_DIR.parent / ".git").exists():
        return version
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        said = subprocess.run(
            command, cwd=PACKAGE_DIR.parent, capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return version
    return f"{version}+{said.stdout.strip()}"
