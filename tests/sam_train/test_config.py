"""Finding, composing and reading the recipes."""

from __future__ import annotations

from pathlib import Path

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from sam_train import config

TOY = Path(__file__).parents[1] / "toy_run" / "conf"
TOY_RUN = ["experiment=toy"]


def test_the_recipes_are_found_without_the_shared_parts() -> None:
    names = config.options("data")

    assert "nuclei" in names
    assert not [name for name in names if name.startswith("_")]


def test_a_users_folder_adds_its_names() -> None:
    assert "toy" in config.options("model", TOY)
    assert "toy" not in config.options("model")


def test_a_run_is_named_after_its_recipe() -> None:
    cfg = config.compose("train", TOY_RUN, config_dir=TOY)

    assert cfg.experiment_name == "toy"
    assert cfg.run_dir == "outputs/toy"
    assert "hydra" not in cfg


def test_composing_leaves_nothing_behind() -> None:
    config.compose("train", TOY_RUN, config_dir=TOY)

    with pytest.raises(Exception, match="toy"):
        config.compose("train", TOY_RUN)


def test_a_running_application_may_compose_and_goes_on_with_its_own() -> None:
    with hydra.initialize_config_dir(str(config.conf_dir()), version_base="1.3"):
        running = GlobalHydra.instance().hydra
        assert config.compose("train").data
        assert GlobalHydra.instance().hydra is running
        with pytest.raises(hydra.errors.MissingConfigException):
            config.compose("there is none")
        assert GlobalHydra.instance().hydra is running
        assert hydra.compose("eval").protocol


def test_missing_values_are_named_together() -> None:
    cfg = OmegaConf.create({"a": "???", "b": {"c": "???", "d": "${nowhere}"}})

    with pytest.raises(ValueError, match=r"no value for a, b\.c; say a=\.\.\. b\.c=\.\.\."):
        config.check_complete(cfg)


def test_the_data_lie_where_the_variable_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAM_TRAIN_DATA", "/mnt/sets")

    assert config.compose("train", TOY_RUN, config_dir=TOY).paths.data == "/mnt/sets"


def test_the_data_lie_beside_the_checkout_or_below_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SAM_TRAIN_DATA", raising=False)
    monkeypatch.setattr(config, "PACKAGE_DIR", tmp_path / "site" / "sam_train")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert config.data_root() == "data"

    (tmp_path / "shared" / "data").mkdir(parents=True)
    assert config.data_root() == str(tmp_path / "shared" / "data")


@pytest.mark.parametrize(
    ("variable", "netrc", "found"),
    [("key", "", True), ("", "machine api.wandb.ai login user", True), ("", "machine x", False)],
)
def test_a_wandb_key_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, netrc: str, found: bool
) -> None:
    (tmp_path / "netrc").write_text(netrc)
    monkeypatch.setenv("WANDB_API_KEY", variable)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))

    assert config.has_wandb_key() is found
    cfg = config.compose("train", [*TOY_RUN, "logger=wandb"], config_dir=TOY)
    assert cfg.logger.wandb.offline is not found


@pytest.mark.parametrize("names", ["csv", "tensorboard", "wandb", "[tensorboard,wandb]"])
def test_the_csv_is_written_whatever_else_is_chosen(names: str) -> None:
    cfg = config.compose("train", [*TOY_RUN, f"logger={names}"], config_dir=TOY)

    assert cfg.logger.csv.path == "outputs/toy/metrics.csv"
    assert set(names.strip("[]").split(",")) <= set(cfg.logger)


def test_a_node_builds_its_class_from_plain_values() -> None:
    built = config.instantiate(
        OmegaConf.create({"_target_": "builtins.dict", "a": [1, {"b": 2}]}), c=None
    )

    assert built == {"a": [1, {"b": 2}], "c": None}
    assert type(built["a"]) is list
    assert type(built["a"][1]) is dict
