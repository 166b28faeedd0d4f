"""What goes wrong ends in one sentence and exit code 2, and the next call goes on."""

from __future__ import annotations

import shutil
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from data_engine import settings
from data_engine.engine import Engine

sys.path.insert(0, str(Path(__file__).parent))
import toy_engine
from toy_engine import AUTOMATIC, QUIET, call, simulated

Begin = Callable[..., Path]


def test_help_names_all_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    said = capsys.readouterr().out
    assert all(f"\n  {verb} " in said for verb in ("init", "round", "status", "remove"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["rond", "root=x"], "did you mean round?"),
        ([], "expected one of init"),
        (["round"], "no value for root; say root=DIR"),
        (["status", "root=no/such"], "no/such holds no engine"),
        (["init", "root=x", "images=y"], "checkpoint"),
        (["round", "loud", "root=x"], "expected NAME=VALUE, got 'loud'"),
    ],
)
def test_a_mistyped_call_is_one_sentence(
    refused: Callable[..., str], argv: list[str], message: str
) -> None:
    assert message in refused(*argv)


def test_init_takes_no_folder_that_holds_something(
    begin: Begin, refused: Callable[..., str], tmp_path: Path, toys: Path
) -> None:
    root = begin(QUIET)
    places = [f"images={toys / 'scenes.tar'}", f"checkpoint={toys / 'toy.ckpt'}"]

    assert "promot: there is no such" in refused("round", f"root={root}", "promot=always")
    assert "holds an engine already" in refused("init", f"root={root}", *places)
    assert "holds other things" in refused("init", f"root={tmp_path}", *places)


def test_init_that_was_broken_off_is_finished_by_the_same_call(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_off(begin, monkeypatch)
    root = begin(QUIET)
    begun = Engine.open(root)
    assert begun.store.num_images() == 10
    assert [model.config["kind"] for model in begun.models()] == ["sam"]
    assert not (root / "init.yaml").exists()


def test_init_that_was_broken_off_counts_for_nothing_where_another_is_called(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_off(begin, monkeypatch, "held_out=0.9")
    root = begin(QUIET)
    before = Engine.open(root).store.contents(wall_clock=False)
    shutil.rmtree(root)

    begin(QUIET)

    assert Engine.open(root).store.contents() == before


def broken_off(begin: Begin, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> None:
    """An init that is killed while it writes its last file."""

    def killed(root: Path, _: object) -> None:
        (root / ".engine.yaml.a1b2").write_text("half of it")
        raise OSError("killed")

    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(settings, "write", killed)
        begin(QUIET, overrides=overrides)


def test_init_takes_no_store_of_another_engine(
    begin: Begin, refused: Callable[..., str], tmp_path: Path, toys: Path
) -> None:
    root = begin(QUIET)
    places = [f"images={toys / 'scenes.tar'}", f"checkpoint={toys / 'toy.ckpt'}"]
    store = f"store.url={root / 'engine.sqlite'}"

    said = refused("init", f"root={tmp_path / 'other'}", *places, store)

    assert "is the store of another engine" in said
    assert Engine.open(root).store.num_images() == 10


def test_init_says_that_nothing_can_be_measured(
    tmp_path: Path, toys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(8):
        picture = np.random.default_rng(number).integers(0, 255, (48, 64, 3), np.uint8)
        PIL.Image.fromarray(picture).save(tmp_path / f"{number}.png")
    root = tmp_path / "engine"
    places = [f"images={tmp_path}/*.png", f"checkpoint={toys / 'toy.ckpt'}", "held_out=0.5"]

    assert call("init", f"root={root}", *places, *toy_engine.toy_settings("x", f"[{QUIET}]")) == 0

    assert "no masks are known of the images that are held out" in caplog.text


def test_a_store_that_is_gone_or_locked_is_named(begin: Begin, refused: Callable[..., str]) -> None:
    root = begin(QUIET)
    with closing(sqlite3.connect(root / "engine.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        said = refused("round", f"root={root}", "store.busy_timeout_s=0.1")
    assert "engine.sqlite is locked" in said

    assert call("round", f"root={root}") == 0  # waits for annotators
    (root / "engine.sqlite").rename(root / "aside")
    assert "engine.sqlite: there is no store" in refused("round", f"root={root}")

    (root / "aside").rename(root / "engine.sqlite")
    assert simulated(root) == 0


def test_images_that_were_removed_are_named_and_put_back_it_goes_on(
    begin: Begin, refused: Callable[..., str], tmp_path: Path
) -> None:
    root = begin(QUIET)
    (tmp_path / "scenes.tar").rename(tmp_path / "aside.tar")

    assert "scenes.tar cannot be read" in refused("round", f"root={root}")

    (tmp_path / "aside.tar").rename(tmp_path / "scenes.tar")
    assert simulated(root) == 0
    assert Engine.open(root).store.rounds()[0].state == "done"


def test_a_model_that_finds_nothing_ends_the_round_and_other_thresholds_go_on(
    begin: Begin, refused: Callable[..., str]
) -> None:
    root = begin(AUTOMATIC)

    assert "finds no mask in any" in refused("round", f"root={root}", "preset.pred_iou_thresh=9")
    assert call("round", f"root={root}") == 0

    (round_,) = Engine.open(root).store.rounds()
    assert round_.state == "done"
    assert round_.config["masks"] > 0


def test_a_shard_that_was_removed_since(
    begin: Begin, refused: Callable[..., str], toys: Path
) -> None:
    root = begin(QUIET, AUTOMATIC)
    assert simulated(root) == 0
    assert simulated(root) == 0
    shards = root / "rounds"
    by_people = next(shards.glob("001/shards/assisted-*.tar"))
    content = by_people.read_bytes()
    by_people.unlink()  # comes again from the store
    automatic = next(shards.glob("002/shards/automatic-*.tar"))
    automatic.rename(automatic.with_suffix(".aside"))

    assert f"{automatic} is gone or damaged" in refused("retrain", f"root={root}")

    automatic.with_suffix(".aside").rename(automatic)
    assert call("retrain", f"root={root}") == 0
    assert by_people.read_bytes() == content
