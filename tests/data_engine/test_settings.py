"""The engine's file: read, completed from the packaged one, and refused where it says what cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_engine import settings

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    cfg = settings.composed([f"root={tmp_path}", "checkpoint=x", "plan=nuclei_small"])
    settings.write(tmp_path, cfg)
    return tmp_path


def edit(root: Path, change: Edit) -> None:
    path = root / settings.FILE
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(yaml.safe_dump(content, sort_keys=False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.update(promot="never"), "there is no setting promot. Did you mean"),
        (lambda file: file.update(lease_s="long"), "lease_s: expected float, got str"),
        (lambda file: file.update(images_per_shard=0), "images_per_shard: expected int >= 1"),
        (lambda file: file.update(promote="perhaps"), "better, always, never, got perhaps"),
        (lambda file: file.update(plan=None), "plan: expected object, got null"),
        (lambda file: file.pop("store"), "missing required field store"),
        (lambda file: file["training"].pop("_target_"), "training has no _target_"),
        (lambda file: file.update(seed="${nothing}"), "nothing"),
    ],
)
def test_a_file_that_was_edited_wrongly_is_one_sentence(
    root: Path, change: Edit, message: str
) -> None:
    edit(root, change)

    with pytest.raises(ValueError, match=message) as caught:
        settings.read(root)

    assert str(root / settings.FILE) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "- a list", "a: [b", "text"])
def test_a_file_without_names_and_values_is_one_sentence(root: Path, content: str) -> None:
    (root / settings.FILE).write_text(content)

    with pytest.raises(ValueError, match="is no readable configuration"):
        settings.read(root)


def test_what_an_older_version_did_not_know_is_as_packaged(root: Path) -> None:
    edit(root, lambda file: file.pop("promote_by"))

    assert settings.read(root)["promote_by"] == "mean_iou@1"


def test_a_user_s_own_recipes_are_found_again_by_later_calls(tmp_path: Path) -> None:
    own = tmp_path / "own"
    (own / "annotator").mkdir(parents=True)
    (own / "annotator" / "mine.yaml").write_text("_target_: mine\n")
    cfg = settings.composed([f"root={tmp_path}", "checkpoint=x"])
    settings.absolute(cfg, str(own))
    settings.write(tmp_path, cfg)

    assert settings.read(tmp_path, ["annotator=mine"])["annotator"] == {"_target_": "mine"}


def test_paths_of_a_plan_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "boxes.json").write_text("[]")
    step = "{stage: semi_automatic, detector_boxes: boxes.json}"
    cfg = settings.composed(
        ["root=here", "checkpoint=x", f"plan.steps=[{step}]", "held_out_images=apart"]
    )

    settings.absolute(cfg, None)

    assert cfg.plan.steps[0].detector_boxes == str(tmp_path / "boxes.json")
    assert cfg.held_out_images == str(tmp_path / "apart")
    assert cfg.root == str(tmp_path / "here")


def test_an_engine_may_be_made_with_an_annotator(tmp_path: Path) -> None:
    chosen = [f"root={tmp_path}", "checkpoint=x", "plan=nuclei_small", "annotator=simulated"]
    settings.write(tmp_path, settings.composed(chosen))

    assert settings.read(tmp_path)["annotator"]["screen_px"] == 1000
    changed = settings.read(tmp_path, ["annotator=simulated", "annotator.screen_px=500"])
    assert changed["annotator"]["screen_px"] == 500
