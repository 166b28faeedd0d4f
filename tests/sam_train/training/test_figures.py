"""The pictures of a run show what its files hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sam_train.structures import ImageRecord
from sam_train.training import figures
from sam_train.training.interactive import InteractiveTraining

CSV = """\
step,epoch,grad_norm/image_encoder,train/iou_box,train/loss,val/mean_iou@1
0,,,,,0.1
9,0,2.5,0.3,1.5,
19,0,1.5,,1.2,0.4
29,0,0.5,0.5,0.9,
"""


@pytest.fixture
def plotted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list that gets the figures that are saved."""
    saved: list[Any] = []
    save = figures.save_figure

    def keep(path: Path, figure: Any) -> None:
        saved.append(figure)
        save(path, figure)

    monkeypatch.setattr(figures, "save_figure", keep)
    return saved


def test_curves_show_what_metrics_csv_holds(tmp_path: Path, plotted: list[Any]) -> None:
    (tmp_path / "metrics.csv").write_text(CSV)

    figures.draw_curves(
        tmp_path / "figures" / "curves.png", tmp_path / "metrics.csv", InteractiveTraining.panels
    )

    with Image.open(tmp_path / "figures" / "curves.png") as picture:
        assert picture.width > 1000
    loss, _, validation, gradient = plotted[0].axes
    raw, smooth = loss.lines
    assert raw.get_xydata().tolist() == [[9, 1.5], [19, 1.2], [29, 0.9]]
    assert smooth.get_ydata() == pytest.approx([1.35, 1.2, 1.05]), "means of neighbours"
    assert validation.lines[0].get_xydata().tolist() == [[0, 0.1], [19, 0.4]]
    assert gradient.get_yscale() == "log"
    assert [text.get_text() for text in gradient.get_legend().get_texts()] == ["image_encoder"]


@pytest.mark.parametrize("num_points", [1, 2, 3, 4, 250])
def test_a_smoothed_curve_has_as_many_points_and_keeps_a_constant(num_points: int) -> None:
    smoothed = figures._smoothed(np.full(num_points, 0.5))

    assert smoothed == pytest.approx(np.full(num_points, 0.5))


def test_a_run_that_has_logged_nothing_yet_has_no_curves(tmp_path: Path) -> None:
    figures.draw_curves(
        tmp_path / "curves.png", tmp_path / "metrics.csv", InteractiveTraining.panels
    )
    assert not (tmp_path / "curves.png").exists()

    (tmp_path / "metrics.csv").write_text("step\n")
    figures.draw_curves(
        tmp_path / "curves.png", tmp_path / "metrics.csv", InteractiveTraining.panels
    )
    assert (tmp_path / "curves.png").exists()


def test_clicks_are_drawn_for_one_object_an_image(
    make_training: Callable[..., InteractiveTraining],
    synthetic_scenes: list[ImageRecord],
    tmp_path: Path,
) -> None:
    training = make_training().eval()
    taken = []

    def records() -> Any:
        for record in [replace(synthetic_scenes[0], annotations=()), *synthetic_scenes]:
            taken.append(record)
            yield record

    figures.draw_clicks(tmp_path / "clicks.png", training, records(), 2)

    assert len(taken) == 3, "an image without an object is passed over, and none read in vain"
    with Image.open(tmp_path / "clicks.png") as image:
        picture = np.asarray(image)
    height, width = picture.shape[:2]
    assert height > 2 * 240
    assert width > 4 * 240, "the object and its answers after three clicks"
    assert picture.std() > 10


def test_no_object_makes_no_picture(
    make_training: Callable[..., InteractiveTraining], tmp_path: Path
) -> None:
    figures.draw_clicks(tmp_path / "clicks.png", make_training().eval(), [], 2)

    assert not (tmp_path / "clicks.png").exists()
