"""The commands: what they run, what they say when something is wrong, and their exit codes."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from sam_train import cli

TOY = Path(__file__).parents[1] / "toy_run"
ROOT = Path(__file__).parents[2]
Train = Callable[..., int]


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Train]:
    """`sam-train experiment=toy ...` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(TOY)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    interrupt = signal.getsignal(signal.SIGINT)
    yield lambda *argv: cli.run(
        "train", ["experiment=toy", "run_dir=run", f"--config-dir={TOY / 'conf'}", *argv]
    )
    signal.signal(signal.SIGINT, interrupt)  # Lightning leaves Ctrl-C ignored


def steps(run: Path) -> list[int]:
    with (run / "metrics.csv").open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def message(capsys: pytest.CaptureFixture[str]) -> str:
    """What went to the terminal as an error, which must be a message and not a traceback."""
    text = capsys.readouterr().err
    assert "Traceback" not in text
    assert text.count("sam-") >= 1
    return text


def test_a_run_leaves_its_folder(train: Train, tmp_path: Path) -> None:
    assert train() == 0

    run = tmp_path / "run"
    assert steps(run) == [0, 1, 2, 3]
    assert json.loads((run / "metrics.json").read_text())["metrics"]["steps"] == 4
    assert yaml.safe_load((run / ".hydra/config.yaml").read_text())["experiment_name"] == "toy"
    assert (run / "checkpoints/last.ckpt").is_file()
    assert (run / "train.log").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"run"}, "nothing beside the run folder"


def test_a_finished_run_says_so_and_is_left_alone(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train()
    before = (tmp_path / "run/checkpoints/last.ckpt").stat().st_mtime_ns
    capsys.readouterr()

    assert train() == 0

    assert "finished" in capsys.readouterr().out
    assert (tmp_path / "run/checkpoints/last.ckpt").stat().st_mtime_ns == before


def test_another_configuration_is_refused_unless_forced(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train()
    capsys.readouterr()

    assert train("trainer.max_steps=6") == 2
    assert "trainer.max_steps: 4 there, 6 here" in message(capsys)

    assert train("trainer.max_steps=6", "resume=force") == 0
    assert steps(tmp_path / "run") == [0, 1, 2, 3, 4, 5]


def test_ctrl_c_leaves_a_run_that_goes_on(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("task.break_at=2") == 130
    assert "goes on from the last checkpoint" in message(capsys)
    assert not (tmp_path / "run/metrics.json").exists()

    assert train("task.break_at=-1", "resume=force") == 0
    assert json.loads((tmp_path / "run/metrics.json").read_text())["metrics"]["steps"] == 4
    assert steps(tmp_path / "run")[:2] == [0, 1]


def test_a_sweep_gives_each_job_a_folder(train: Train, tmp_path: Path) -> None:
    assert train("--multirun", "optim.lr=0.1,0.2", "trainer.max_steps=1") == 0

    jobs = sorted(path.parent.name for path in (tmp_path / "run").glob("*/metrics.json"))
    assert jobs == ["optim.lr=0.1", "optim.lr=0.2"]


def test_a_sweep_compares_its_runs_and_goes_on_past_one_that_fails(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--multirun", "model.slope=0.5,-1.0,1.0", "trainer.max_steps=2") == 2

    assert "1 failed: model.slope=-1.0" in message(capsys)
    with (tmp_path / "run/comparison.csv").open(newline="") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert {name: row["state"] for name, row in rows.items()} == {
        "model.slope=0.5": "finished",
        "model.slope=-1.0": "failed",
        "model.slope=1.0": "finished",
    }
    assert "slope is at least 0, got -1.0" in rows["model.slope=-1.0"]["failure"]
    assert rows["model.slope=1.0"]["model.slope"] == "1.0"
    assert (tmp_path / "run/comparison.md").is_file()
    assert (tmp_path / "run/comparison.png").is_file()


def test_a_path_works_as_it_is_typed(train: Train, tmp_path: Path) -> None:
    assert train("run_dir=my runs/a=b (1)", "data.path=/x/a{0..3}.tar", "trainer.max_steps=1") == 0

    config = yaml.safe_load((tmp_path / "my runs/a=b (1)/.hydra/config.yaml").read_text())
    assert config["data"]["path"] == "/x/a{0..3}.tar"


def test_the_users_recipes_win_over_the_packaged_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/sam.yaml").write_text("mine: 1\n")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/own.yaml").write_text("# @package _global_\nseed: 7\n")
    argv = ["--config-dir", str(tmp_path), "experiment=own", "--cfg", "job"]

    assert cli.run("train", argv) == 0

    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["prompts"] == {"mine": 1}
    assert shown["seed"] == 7


@pytest.mark.parametrize("verb", ["train", "eval"])
def test_help_lists_the_groups(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(verb, ["--help"]) == 0

    shown = capsys.readouterr().out
    assert f"sam-{verb}" in shown
    assert "\ndata: " in shown
    assert "nuclei" in shown


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["model=sam_vit_bb"], ["no such model", "sam_vit_b"]),
        (["data=nucleii"], ["no such data", "Did you mean nuclei"]),
        (["experiment=toyy"], ["no such experiment", "toy"]),
        (["modle=x"], ["modle", "Did you mean model"]),
        (["protocol=clicks"], ["protocol", "train has no such group"]),
        (["trainer.max_stepz=1"], ["trainer.max_stepz", "trainer.max_steps"]),
        (["max_steps=1"], ["Did you mean trainer.max_steps"]),
        (["optim.nothing_like_it=1"], ["There is: optim.lr"]),
        (["~nothing"], ["nothing", "no such setting"]),
        (["seed=1,2"], ["--multirun", "seed=[1,2]"]),
        (["a b=1"], ["cannot read 'a b=1'"]),
        (["toyy"], ["expected NAME=VALUE, got 'toyy'"]),
        (["resume=always"], ["resume is auto or force, got always"]),
        (["data=mine"], ["no value for data.path", "data.path=..."]),
        (["model.slope=-1"], ["slope is at least 0, got -1"]),
        (["+model.slop=1"], ["ToyModel", "'slop'", "Did you mean slope"]),
        (["optim.lr=${nothing}"], ["nothing"]),
        (["model._target_=toy_training.Nothing"], ["toy_training.Nothing", "cannot be imported"]),
        (["trainer.accelerator=abacus"], ["trainer", "abacus"]),
        (["trainer.max_steps=abc"], ["trainer", "max_steps"]),
        (["trainer.max_time=soon"], ["trainer", "soon"]),
        (["checkpoint=/no/such.pth"], ["/no/such.pth"]),
        (["task.how=missing file", "task.break_at=0"], ["/no/such/shard.tar", "No such file"]),
        (["run_dir=/dev/null/run"], ["/dev/null/run"]),
        (["--bogus"], ["unrecognized arguments: --bogus"]),
        (["eval"], ["expected NAME=VALUE, got 'eval'"]),
    ],
)
def test_a_mistake_gets_one_message_and_exit_code_2(
    train: Train, capsys: pytest.CaptureFixture[str], argv: list[str], expected: list[str]
) -> None:
    assert train(*argv) == 2

    text = message(capsys)
    for part in expected:
        assert part in text


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_a_mistake(
    device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run("eval", ["checkpoint=a.pth", f"device={device}"]) == 2
    assert f"expected device=cpu, cuda, cuda:1 or auto, got {device}" in message(capsys)


def test_the_traceback_of_a_mistake_can_be_asked_for(
    train: Train, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cli.TRACEBACK, "1")

    assert train("model.slope=-1") == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["bug", "library bug"])
def test_a_bug_keeps_its_traceback_and_exits_with_1(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    assert train(f"task.how={how}", "task.break_at=0") == 1

    assert "Traceback" in capsys.readouterr().err
    assert "Traceback" in (tmp_path / "run/train.log").read_text()


def test_a_folder_that_cannot_be_written_stops_the_run(
    train: Train,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system", "run")

    monkeypatch.setattr("sam_train.training.run_folder.write_atomically", read_only)

    assert train() == 2
    text = message(capsys)
    assert "run cannot be written (Read-only file system)" in text
    assert "run_dir=PATH" in text


def test_a_file_that_is_no_checkpoint_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "notes.pth"
    path.write_text("no weights")

    assert cli.run("eval", [f"checkpoint={path}", "data=synthetic"]) == 2
    assert "notes.pth" in message(capsys)


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`:UserWarning")
def test_an_empty_data_folder_is_named(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()

    assert train("data=shards", "data.path=empty", "model=sam_vit_b") == 2
    assert "empty" in message(capsys)


def test_eval_asks_for_what_only_the_user_knows(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run("eval", ["data=shards"]) == 2
    assert "no value for data.path, checkpoint; say" in message(capsys)


def test_the_verb_may_lead(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--cfg", "job", "--package", "seed"]) == 0
    assert cli.main(["trian"]) == 2
    assert "expected a verb first" in capsys.readouterr().err


def test_another_commands_verb_names_that_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run("train", ["eval", "data=nuclei"]) == 2
    assert "sam-eval data=nuclei" in message(capsys)


def test_doctor_says_what_this_installation_can_do(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sets/nuclei").mkdir(parents=True)
    (tmp_path / "sets/nuclei/val-000000.tar").write_text("")

    assert train("doctor=true", "paths.data=sets") == 0

    shown = capsys.readouterr().out
    for part in ("python 3.", "torch 2.", "CPU cores", "nuclei: 1 files", "not here: ", "wandb"):
        assert part in shown
    assert "coco_panoptic" in shown.partition("not here: ")[2]
    assert not (tmp_path / "run").exists()


def test_help_and_mistakes_answer_before_torch_is_imported() -> None:
    code = (
        "import sys; from sam_train import cli\n"
        "codes = [cli.run('train', ['--help']), cli.run('train', ['modle=x'])]\n"
        "assert codes == [0, 2], codes\n"
        "assert not {'torch', 'lightning', 'numpy'} & set(sys.modules)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)


@pytest.mark.slow
def test_ctrl_c_in_a_process_of_its_own_exits_with_130(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sam_train.cli", "train", "experiment=toy", "run_dir=run"]
    command += [f"--config-dir={TOY / 'conf'}", "trainer.max_steps=100000000"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{TOY}"}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as process:
        while process.poll() is None and not (tmp_path / "run/metrics.csv").exists():
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)

    assert process.returncode == 130, errors.decode()
    assert b"Traceback" not in errors
    assert (tmp_path / "run/checkpoints/last.ckpt").is_file()
