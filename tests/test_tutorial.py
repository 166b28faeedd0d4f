"""docs/tutorial.ipynb runs from the first cell to the last in an empty folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"


@pytest.mark.slow
# About 60 s of one core, most of it training; many times that where others want the core, too.
@pytest.mark.timeout(1500)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_every_cell_runs_in_an_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    # The kernel is another process, in another folder.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    work = tmp_path / "work"
    work.mkdir()
    notebook = nbformat.read(NOTEBOOK, as_version=4)

    nbclient.NotebookClient(
        notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(work)}}
    ).execute()

    text = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert "zero-shot" in text and "all the same: True" in text
    assert [path.name for path in work.iterdir()] == ["outputs"], "it writes nowhere else"


def test_the_notebook_is_kept_without_outputs_and_names_no_machine() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)

    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and not any(cell.outputs or cell.execution_count for cell in code)
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert not re.search(r"/(home|Users|root|tmp|work|mnt)/|[A-Z]:\\\\", text)
    links = re.findall(r"\]\(([\w./]+\.md)", "".join(cell.source for cell in notebook.cells))
    assert links and all((NOTEBOOK.parent / link).is_file() for link in links)
