"""What many tests share: small models, scenes, real data where it is at hand."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from sam_train import config
from sam_train.checkpoints.build import model_config
from sam_train.checkpoints.formats import RECORD_KEY, checkpoint_payload
from sam_train.models.sam import Sam
from sam_train.structures import ImageRecord


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets; tests that need it are skipped, and say so, where there is none."""
    root = Path(config.data_root())
    if not root.is_dir():
        pytest.skip(f"no real data at {root}: set SAM_TRAIN_DATA to run this test")
    return root


@pytest.fixture
def compose() -> Callable[..., DictConfig]:
    """`compose("train", ["experiment=quickstart"])`: what the command would run with."""
    return config.compose


@pytest.fixture
def tiny_sam() -> Sam:
    """`model=sam_tiny` with fixed random weights, in eval mode."""
    torch.manual_seed(0)
    model = config.instantiate(config.compose("train", ["model=sam_tiny"]).model)
    assert isinstance(model, Sam)
    return model.eval()


@pytest.fixture
def save_model(tmp_path: Path) -> Callable[[Sam, dict[str, Any]], Path]:
    """Writes a model and its config node as training does, without the optimiser's state."""

    def save(model: Sam, node: dict[str, Any]) -> Path:
        path = tmp_path / "model.ckpt"
        state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        torch.save({RECORD_KEY: checkpoint_payload(node), "state_dict": state}, path)
        return path

    return save


@pytest.fixture
def tiny_sam_file(tiny_sam: Sam, save_model: Callable[[Sam, dict[str, Any]], Path]) -> Path:
    """`tiny_sam` as a checkpoint of this project."""
    return save_model(tiny_sam, model_config("sam_tiny"))


@pytest.fixture(scope="session")
def synthetic_scenes() -> list[ImageRecord]:
    """Four built-in scenes of 96 px with their masks."""
    from sam_train.data.synthetic import SyntheticSource

    source = SyntheticSource(split="val", num_scenes=4, size=96, seed=0)
    return list(source.records(epoch=0, reader=0, num_readers=1, shuffle=False))


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_is_heard() -> None:
    """A shell starts what it puts in the background with Ctrl-C ignored, and children inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def what_is_logged_is_the_test_s_own_choice() -> Iterator[None]:
    """A command run in a test's own process sets the root logger up (Hydra), and would for all tests behind it."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    root.setLevel(level)
    root.handlers[:] = handlers
