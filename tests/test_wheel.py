"""The wheel carries `conf/`, and every recipe in it composes far away from the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[1]
COMPOSE_ALL = """
import json
from sam_train import config
names = {name: sorted(config.compose("train", [f"experiment={name}"])) for name in config.options("experiment")}
models = config.options("model")
for root in ("train", "eval"):
    config.compose(root)
print(json.dumps({"conf": str(config.conf_dir()), "recipes": sorted(names), "models": models}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds nothing but the installed wheel."""
    wheel = next(WheelBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("dist"))))
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", "--no-index", "--target", str(target), wheel], check=True)
    return target


def test_every_recipe_composes_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(installed)}

    done = subprocess.run(
        [sys.executable, "-c", COMPOSE_ALL],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert Path(answer["conf"]) == installed / "sam_train" / "conf"
    assert answer["recipes"] == names_in("experiment")
    assert answer["models"] == names_in("model")


def test_the_wheel_holds_both_packages_the_licence_and_nothing_else(installed: Path) -> None:
    top = {path.name for path in installed.iterdir()}

    packages = {name for name in top if not name.endswith(".dist-info")} - {"bin"}
    assert packages == {"sam_train", "data_engine"}
    assert list(installed.glob("*.dist-info/licenses/LICENSE"))


def test_the_wheel_names_every_command(installed: Path) -> None:
    (entry_points,) = installed.glob("*.dist-info/entry_points.txt")

    scripts = {line.partition(" =")[0] for line in entry_points.read_text().splitlines()}

    trained = {
        f"sam-{verb}" for verb in ("train", "eval", "segment", "precompute", "convert", "export")
    }
    assert trained | {"data-engine"} <= scripts


def names_in(group: str) -> list[str]:
    names = (path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))
    return sorted(name for name in names if not name.startswith("_"))
