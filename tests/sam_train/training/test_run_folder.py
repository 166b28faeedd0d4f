"""Start, go on, done or refused: what a run folder allows."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from sam_train.ops.files import DamagedFileError
from sam_train.training import run_folder
from sam_train.training.run_folder import Action

CONFIG = {
    "seed": 0,
    "run_dir": "a",
    "optim": {"lr": 0.1, "betas": [0.9, 0.999]},
    "trainer": {"max_steps": 10, "max_time": "00:00:15:00", "devices": 1},
    "paths": {"data": "/here"},
}


def changed(**values: object) -> dict[str, object]:
    return CONFIG | values


def checkpointed(folder: Path) -> Path:
    run_folder.prepare(folder, CONFIG, Action.START)
    last = folder / run_folder.LAST_CHECKPOINT
    last.parent.mkdir()
    last.write_bytes(b"weights")
    return folder


def decide(folder: Path, config: dict[str, object], resume: str = "auto") -> Action:
    return run_folder.decide(folder, run_folder.inspect(folder), config, resume=resume)


def test_a_folder_that_does_not_exist_starts(tmp_path: Path) -> None:
    assert decide(tmp_path / "run", CONFIG) is Action.START


def test_an_unfinished_run_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    folder = checkpointed(tmp_path)

    assert decide(folder, CONFIG) is Action.RESUME
    assert run_folder.inspect(folder).last_checkpoint == folder / "checkpoints" / "last.ckpt"


def test_a_finished_run_is_finished(tmp_path: Path) -> None:
    run_folder.finish(checkpointed(tmp_path), {"metrics": {"mean_iou@1": 0.5}})

    assert decide(tmp_path, CONFIG) is Action.FINISHED
    assert decide(tmp_path, CONFIG, resume="force") is Action.FINISHED


def test_another_configuration_is_refused_with_the_difference(tmp_path: Path) -> None:
    folder = checkpointed(tmp_path)
    other = changed(optim={"lr": 0.2, "betas": [0.9, 0.999]}, extra=True)

    with pytest.raises(ValueError, match="another configuration") as refusal:
        decide(folder, other)

    text = str(refusal.value)
    assert "optim.lr: 0.1 there, 0.2 here" in text
    assert "extra: absent there, true here" in text
    assert "resume=force" in text
    assert "betas" not in text


def test_force_goes_on_with_another_configuration_even_where_the_run_was_finished(
    tmp_path: Path,
) -> None:
    longer = changed(trainer=CONFIG["trainer"] | {"max_steps": 20})
    run_folder.finish(checkpointed(tmp_path), {"metrics": {}})

    assert decide(tmp_path, longer, resume="force") is Action.RESUME

    run_folder.prepare(tmp_path, longer, Action.RESUME)
    assert decide(tmp_path, longer) is Action.RESUME, "finished again only by a new result"
    assert run_folder.inspect(tmp_path).config == longer


@pytest.mark.parametrize(
    "elsewhere",
    [
        {"run_dir": "b"},
        {"paths": {"data": "/there"}},
        {"trainer": CONFIG["trainer"] | {"devices": 8}},
        {"resume": "force"},
    ],
)
def test_the_same_run_may_go_on_elsewhere(tmp_path: Path, elsewhere: dict[str, object]) -> None:
    assert decide(checkpointed(tmp_path), changed(**elsewhere)) is Action.RESUME


def test_an_attempt_without_a_checkpoint_leaves_the_folder_free(tmp_path: Path) -> None:
    run_folder.prepare(tmp_path, CONFIG, Action.START)
    (tmp_path / "metrics.csv").write_text("step\n3\n")
    other = changed(seed=1)

    action = decide(tmp_path, other)
    run_folder.prepare(tmp_path, other, action)

    assert action is Action.START
    assert not (tmp_path / "metrics.csv").exists(), "rows of another run"


def test_checkpoints_without_a_configuration_are_not_gone_on_from_unasked(tmp_path: Path) -> None:
    checkpointed(tmp_path)
    (tmp_path / run_folder.CONFIG).unlink()

    with pytest.raises(ValueError, match="nothing says what"):
        decide(tmp_path, CONFIG)

    assert decide(tmp_path, CONFIG, resume="force") is Action.RESUME


@pytest.mark.parametrize(
    ("name", "content"), [(".hydra/config.yaml", "a: ["), ("metrics.json", "{")]
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: str) -> None:
    checkpointed(tmp_path)
    (tmp_path / name).write_text(content)

    with pytest.raises(ValueError, match=name):
        run_folder.inspect(tmp_path)


def test_an_unknown_resume_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="auto or force, got forse"):
        decide(tmp_path, CONFIG, resume="forse")


def test_the_configuration_comes_back_as_it_was_written(tmp_path: Path) -> None:
    tricky = changed(time="00:15:00", small="1e-3", flag="yes", path="${paths.data}/a{0..3}.tar")

    run_folder.prepare(tmp_path, tricky, Action.START)

    assert run_folder.inspect(tmp_path).config == tricky
    assert run_folder.differences(tricky, tricky) == []


def test_a_folder_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(OSError, match="cannot be written.*run_dir=PATH"):
        run_folder.prepare(tmp_path / "file" / "run", CONFIG, Action.START)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)

    with pytest.raises(OSError, match=r"cannot be written \(Permission denied\)"):
        run_folder.prepare(tmp_path, CONFIG, Action.START)


def test_the_result_is_json(tmp_path: Path) -> None:
    run_folder.finish(tmp_path, {"protocol": "clicks", "metrics": {"noc@90": 3.5}})

    assert json.loads((tmp_path / "metrics.json").read_text())["metrics"]["noc@90"] == 3.5


def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    last, previous = (tmp_path / "checkpoints" / f"{name}.ckpt" for name in ("last", "previous"))
    last.parent.mkdir()
    torch.save({"weights": torch.zeros(1000)}, last)
    run_folder.keep_previous(last)
    torch.save({"weights": torch.ones(1000)}, last.with_suffix(".new"))
    last.with_suffix(".new").replace(last)
    assert run_folder.newest_whole_checkpoint(tmp_path) == last
    assert torch.load(previous, weights_only=True)["weights"].sum() == 0

    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    assert run_folder.newest_whole_checkpoint(tmp_path) == last
    assert torch.load(last, weights_only=True)["weights"].sum() == 0, (
        "the one before took its place"
    )
    assert not previous.exists(), "no save can put the damaged one there"
    assert "last.ckpt is damaged" in caplog.text and "the one before" in caplog.text

    run_folder.keep_previous(last)
    last.unlink()
    last.write_bytes(content)
    previous.write_bytes(previous.read_bytes()[:500])
    with pytest.raises(DamagedFileError, match=r"last\.ckpt.*previous\.ckpt.*run_dir=PATH"):
        run_folder.newest_whole_checkpoint(tmp_path)


def test_without_a_last_checkpoint_a_previous_one_is_gone_on_from(tmp_path: Path) -> None:
    previous = tmp_path / "checkpoints" / "previous.ckpt"
    previous.parent.mkdir()
    torch.save({}, previous)
    assert run_folder.inspect(tmp_path).last_checkpoint == previous


def test_what_a_kill_left_of_an_unfinished_checkpoint_goes_when_the_run_goes_on(
    tmp_path: Path,
) -> None:
    left = tmp_path / "checkpoints" / ".last.ckpt.abc123"
    left.parent.mkdir()
    left.write_bytes(b"half")
    run_folder.prepare(tmp_path, {}, run_folder.Action.RESUME)
    assert not left.exists()


def test_keeping_one_checkpoint_twice_leaves_nothing_behind(tmp_path: Path) -> None:
    last = tmp_path / "last.ckpt"
    last.write_bytes(b"x")
    for _ in range(2):
        run_folder.keep_previous(last)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "previous.ckpt"]
