"""`from sam_train import NAME`: cheap, and honest about what is not there yet."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import sam_train
from sam_train.checkpoints.load import load_model

ROOT = Path(__file__).parents[2]


def test_load_model_is_public() -> None:
    assert sam_train.load_model is load_model
    assert "load_model" in dir(sam_train)


@pytest.mark.parametrize("name", sorted(sam_train._PLANNED))
def test_a_name_that_is_not_built_says_so(name: str) -> None:
    with pytest.raises(ImportError, match=f"{name} is not built yet"):
        getattr(sam_train, name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(sam_train, "nothing")


def test_the_package_imports_without_torch() -> None:
    code = "import sys, sam_train; assert 'torch' not in sys.modules"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
