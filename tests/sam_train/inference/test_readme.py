"""The README's Python runs, and its published usage gives what segment_anything gives."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import segment_anything
import torch
from PIL import Image

from sam_train.checkpoints.load import load_model
from sam_train.inference import model_registry

README = Path(__file__).parents[3] / "README.md"
WEIGHTS = "sam_vit_b_01ec64.pth"
IMPORT = "from sam_train import sam_model_registry, SamPredictor"
ANSWERS = ("by_point", "by_points", "refined", "by_box", "by_both", "by_boxes")


@pytest.fixture
def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(autouse=True)
def at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, balanced_sam: Any) -> Iterator[None]:
    """The files that the README names, small ones, and the package that reads them by that name."""

    def published(checkpoint: str) -> Any:
        model = balanced_sam
        model.load_state_dict(torch.load(checkpoint, weights_only=True))
        return model

    torch.save(balanced_sam.state_dict(), tmp_path / WEIGHTS)
    noise = np.random.default_rng(0).integers(0, 256, (12, 18, 3), np.uint8)
    Image.fromarray(noise).resize((1800, 1200), Image.Resampling.BICUBIC).save(
        tmp_path / "truck.jpg"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(model_registry.sam_model_registry, "vit_b", _read)
    monkeypatch.setitem(segment_anything.sam_model_registry, "vit_b", published)
    matplotlib.use("agg")
    yield
    from matplotlib import pyplot as plt

    plt.close("all")


def _read(checkpoint: str) -> Any:
    return load_model(checkpoint)


def run(code: str, names: dict[str, Any] | None = None) -> dict[str, Any]:
    found = {} if names is None else names
    exec(compile(code, str(README), "exec"), found)
    return found


def test_every_block_runs_one_after_the_other(blocks: list[str]) -> None:
    names: dict[str, Any] = {}
    for block in blocks:
        run(block, names)

    assert len(blocks) == 3
    assert names["mask_generator"].report.candidates == 3 * 32**2
    assert [part.shape for part in names["masks"]] == [(2, 3, 1200, 1800), (3, 600, 1800)]


def test_published_usage_gives_the_published_answers(blocks: list[str]) -> None:
    block = next(block for block in blocks if IMPORT in block)

    ours = run(block)
    theirs = run(block.replace(IMPORT, IMPORT.replace("sam_train", "segment_anything")))

    np.testing.assert_allclose(ours["scores"], theirs["scores"], atol=1e-4)
    np.testing.assert_allclose(ours["logits"], theirs["logits"], atol=1e-4)
    for name in ANSWERS:
        got, expected = np.asarray(ours[name]), np.asarray(theirs[name])
        assert got.shape == expected.shape and got.dtype == expected.dtype == bool
        assert 0.05 < expected.mean() < 0.95, name
        assert (got != expected).mean() < 1e-5, name
