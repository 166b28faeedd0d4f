"""A value comes through as it was typed, and Hydra's own syntax still means what Hydra says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from sam_train import cli_arguments


def value_of(argument: str) -> Any:
    """What Hydra reads, with interpolations as they would be resolved."""
    value = OverridesParser.create().parse_override(cli_arguments.quote(argument)).value()
    cfg = OmegaConf.create({"paths": {"data": "/root"}, "x": value})
    return OmegaConf.to_container(cfg, resolve=True)["x"]


@pytest.mark.parametrize(
    "typed",
    [
        "/x/a{0..3}.tar",
        "/x/a{0,1}.tar",
        "{a,b}.tar",
        "a{0,1}/b{2,3}",
        "my runs/a=b (1)",
        "runs (1)",
        "a=b",
        "a=b=c",
        "/x/[1] final/a.tar",
        "it's here (1)",
        'say "hi" (1)',
        "C:\\runs\\a=b\\",
        "a\\'b=",
        "données/été",
        "postgresql://user:p@host/db?sslmode=off&x=1",
        "pipe:aws s3 cp s3://bucket/a.tar -",
        "https://host/a%20b.tar?x=[1]",
        "a#b!c;d<e>f`g^h",
        "unbalanced{(",
        "00:00:15:00",
        "2024-01-01",
        "plain",
    ],
)
def test_a_text_comes_through_as_it_was_typed(typed: str) -> None:
    assert value_of(f"run_dir={typed}") == typed


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("[1,2]", [1, 2]),
        ("[[10,20,1],[3.5,4,0]]", [[10, 20, 1], [3.5, 4, 0]]),
        ("{a:1,b:{c:x}}", {"a": 1, "b": {"c": "x"}}),
        ("null", None),
        ("true", True),
        ("1e-3", 1e-3),
        ("-7", -7),
        ("", ""),
        ("'quoted, text'", "quoted, text"),
        ("${paths.data}/a.tar", "/root/a.tar"),
        ("${paths.data}/a{0..3} (1).tar", "/root/a{0..3} (1).tar"),
        ("[/x/a{0..3}.tar,/y/b (1).tar]", ["/x/a{0..3}.tar", "/y/b (1).tar"]),
        ("[[a=b], [{0,1}.tar]]", [["a=b"], ["{0,1}.tar"]]),
        ("str(1)", "1"),
    ],
)
def test_hydras_syntax_keeps_its_meaning(typed: str, meant: object) -> None:
    assert value_of(f"x={typed}") == meant


def test_a_leading_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")

    assert value_of("x=~/a (1)") == "/home/me/a (1)"


@pytest.mark.parametrize(
    ("typed", "tried"),
    [
        ("1,2", [1, 2]),
        ("/x/a{0..3}.tar,/x/b (1).tar", ["/x/a{0..3}.tar", "/x/b (1).tar"]),
        ("{0,1}.tar,{2,3}.tar", ["{0,1}.tar", "{2,3}.tar"]),
        ("choice(a,b)", ["a", "b"]),
        ("range(1,4)", [1, 2, 3]),
    ],
)
def test_sweeps_stay_sweeps(typed: str, tried: list[object]) -> None:
    override = OverridesParser.create().parse_override(cli_arguments.quote(f"x={typed}"))

    assert override.is_sweep_override()
    values = override.sweep_iterator(transformer=lambda element: element)
    assert [getattr(value, "text", value) for value in values] == tried


def test_quoting_twice_changes_nothing() -> None:
    once = cli_arguments.quote("run_dir=my runs/a=b (1)")

    assert cli_arguments.quote(once) == once


@pytest.mark.parametrize("prefix", ["+", "++", ""])
def test_a_prefix_stays_in_front_of_the_name(prefix: str) -> None:
    assert cli_arguments.quote(f"{prefix}a.b=c=d") == f"{prefix}a.b='c=d'"


@pytest.mark.parametrize("flag", [["--config-dir", "{}"], ["--config-dir={}"], ["-cd", "{}"]])
def test_the_users_folder_is_split_off(tmp_path: Path, flag: list[str]) -> None:
    arguments = cli_arguments.parse(
        ["a=1", *(part.format(tmp_path) for part in flag), "--cfg", "job"]
    )

    assert arguments.config_dir == str(tmp_path)
    assert arguments.hydra == ["a=1", "--cfg", "job"]
    assert arguments.overrides == ["a=1"]


@pytest.mark.parametrize("argv", [["--config-dir", "/no/such/folder"], ["--config-dir"]])
def test_a_folder_that_is_not_there_is_named(argv: list[str]) -> None:
    with pytest.raises(ValueError, match=r"--config-dir wants a folder .* got (/no/such|nothing)"):
        cli_arguments.parse(argv)


def test_a_bare_word_is_taken_for_a_forgotten_name() -> None:
    with pytest.raises(
        ValueError, match="expected NAME=VALUE, got 'nuclai'; did you mean .*=nuclei"
    ):
        cli_arguments.parse(["nuclai"])


def test_flags_may_stand_between_overrides() -> None:
    arguments = cli_arguments.parse(["a=1", "--cfg", "job", "b=2", "--resolve", "~c"])

    assert arguments.hydra == ["a=1", "b=2", "~c", "--cfg", "job", "--resolve"]


def test_jobs_of_a_sweep_are_named_by_what_is_swept() -> None:
    arguments = cli_arguments.parse(["-m", "seed=1,2", "run_dir=a b (1)", "+x=3"])

    assert arguments.hydra[-2] == f"{cli_arguments.EXCLUDED_FROM_NAME}=['run_dir','x']"
