"""The map of the packages: each imports from those above it, never back."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = (
    "structures",
    "config",
    "allocator",
    "ops",
    "data",
    "prompts",
    "models",
    "losses",
    "metrics",
    "checkpoints",
    "training",
    "inference",
    "evaluation",
    "convert",
    "export",
    "cli_arguments",
    "cli_errors",
    "doctor",
    "cli_common",
    "cli_train",
    "cli",
)
PACKAGES = ("sam_train", "data_engine")


def test_imports_follow_the_map() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("sam_train/ops/a.py", "from sam_train.data import b", "ops imports data"),
        ("sam_train/models/a.py", "import sam_train.training.b", "models imports training"),
        ("sam_train/models/a.py", "def f():\n    from sam_train import cli", "models imports cli"),
        ("sam_train/data/a.py", "from ..models import b", "data imports models"),
        ("sam_train/data/a.py", "import data_engine.cli", "sam_train imports data_engine"),
        ("sam_train/config.py", "from sam_train import structures", "config imports structures"),
        (
            "sam_train/ops/a.py",
            "from sam_train import load_model",
            "imports from sam_train/__init__",
        ),
        ("sam_train/ops/a.py", "import sam_train", "imports from sam_train/__init__"),
        ("data_engine/a.py", "from sam_train import load_model", "imports from sam_train/__init__"),
        ("sam_train/newcomer.py", "", "newcomer is not on the map"),
    ],
)
def test_an_import_against_the_map_is_found(
    tmp_path: Path, file: str, line: str, complaint: str
) -> None:
    for name in ("sam_train/__init__.py", "sam_train/structures.py", "sam_train/cli.py", file):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(line if name == file else "")

    found = violations(tmp_path)

    assert len(found) == 1
    assert complaint in found[0]


def violations(root: Path) -> list[str]:
    found = []
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        here = path.relative_to(root).with_suffix("").parts
        if here == ("sam_train", "__init__"):
            continue
        if here[0] == "sam_train" and here[1] not in ORDER:
            found.append(f"{'.'.join(here)}: {here[1]} is not on the map of test_import_order.py")
            continue
        for module in imported_modules(path, here, root):
            if complaint := against_the_map(here, module):
                found.append(f"{path.relative_to(root)}: {complaint}")
    return found


def against_the_map(here: tuple[str, ...], module: tuple[str, ...]) -> str | None:
    if module[0] not in PACKAGES:
        return None
    if here[0] == "data_engine":
        return "imports from sam_train/__init__" if module == ("sam_train",) else None
    if module[0] == "data_engine":
        return "sam_train imports data_engine"
    if len(module) == 1:
        return "imports from sam_train/__init__"
    above, here_index = ORDER.index(module[1]), ORDER.index(here[1])
    backwards = above > here_index or (here[1] == "config" and module[1] != "config")
    return f"{here[1]} imports {module[1]}" if backwards else None


def imported_modules(path: Path, here: tuple[str, ...], root: Path) -> Iterator[tuple[str, ...]]:
    """Every module a file imports, anywhere in it; `from package import name` as deep as files go."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = here[: len(here) - node.level] if node.level else ()
            module = (*start, *(node.module.split(".") if node.module else ()))
            for alias in node.names:
                deeper = root.joinpath(*module, alias.name)
                is_module = deeper.is_dir() or deeper.with_suffix(".py").is_file()
                yield (*module, alias.name) if is_module else module
