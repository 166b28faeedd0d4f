"""`data-engine` says what it will do, and that it does not do it yet."""

from __future__ import annotations

import pytest

from data_engine import cli


@pytest.mark.parametrize(("verb", "said"), [("round", "round is not built yet"), ("x", "expected")])
def test_a_verb_that_is_not_built_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str, said: str
) -> None:
    monkeypatch.setattr("sys.argv", ["data-engine", verb, "root=x"])

    assert cli.main() == 2
    assert said in capsys.readouterr().err
