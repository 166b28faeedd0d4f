"""A store of each kind, and work in it; shards of small images, and the automatic stage made small."""

from __future__ import annotations

import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy.engine import make_url

from data_engine.engine import Engine
from data_engine.mask_store.store import Store, open_store
from data_engine.records import Image
from data_engine.tasks import Desk
from sam_train import config
from sam_train.checkpoints.load import load_model
from sam_train.convert.tar_writer import TarWriter
from sam_train.data.shards import encode_record
from sam_train.models.sam import Sam
from sam_train.structures import ImageRecord

sys.path.insert(0, str(Path(__file__).parent))
import toy_engine

SERVER = Path(__file__).with_name("throwaway_postgres.py")
WriteShard = Callable[..., Path]

SMALL = [
    *("images=none", "+stage=automatic", "preset=sam_tiny", "preset.points_per_side=4"),
    *("preset.pred_iou_thresh=0.2", "preset.stability_score_thresh=0.4"),
]


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The URL of a PostgreSQL server that ends with the tests, however these end."""
    with subprocess.Popen(
        [sys.executable, SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None and server.stdout is not None
        url = server.stdout.readline().strip()
        if not url:
            if server.wait() == 3:
                pytest.skip("no PostgreSQL: `apt-get install postgresql` to run this test")
            pytest.fail("PostgreSQL did not start; it says why above")
        yield url
        server.stdin.close()


@pytest.fixture
def postgres_url(postgres_server: str) -> Iterator[str]:
    """The URL of an empty database."""
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(postgres_server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        yield make_url(postgres_server).set(database=name).render_as_string(hide_password=False)
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a store can be made, of each kind."""
    if request.param == "sqlite":
        return str(tmp_path / "engine.sqlite")
    return str(request.getfixturevalue("postgres_url"))


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    """An empty store."""
    store = open_store(store_url, create=True)
    yield store
    store.close()


class Clock:
    """Stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def desk(store: Store, clock: Clock) -> Desk:
    """A desk with leases of 60 s over a store with the images a, b and c of 8 x 6 px (width x height)."""
    store.add_images(make_image(name) for name in "abc")
    return Desk(store, clock=clock, lease_s=60)


def make_image(name: str, **values: object) -> Image:
    fields = {"key": name, "width": 8, "height": 6, "path": f"/images/{name}.jpg"}
    return Image(id=name, **(fields | values))  # type: ignore[arg-type]


@pytest.fixture
def image() -> Callable[..., Image]:
    """`image("a", held_out=True)`: a record of an image of 8 x 6 px."""
    return make_image


@pytest.fixture(scope="session")
def built_in_sam() -> Sam:
    """The model of the weights that are built in."""
    return load_model("sam_tiny")


@pytest.fixture(scope="session")
def write_shard(synthetic_scenes: Sequence[ImageRecord]) -> WriteShard:
    """`write_shard(path, num_images)`: scenes with their masks; `masks=False` leaves the JSON out."""

    def write(path: Path, num_images: int = 3, *, masks: bool = True, first: int = 0) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        tar = TarWriter(path)
        for number in range(first, first + num_images):
            scene = synthetic_scenes[number % len(synthetic_scenes)]
            files = encode_record(scene, image_id=1000 + number)
            if not masks:
                del files["json"]
            tar.add(f"{path.stem}_{number}", files)
        tar.finish()
        return path

    return write


@pytest.fixture(scope="session")
def stage_node() -> Callable[..., dict[str, Any]]:
    """`stage_node("limits.judged_after=2", ...)`: the stage's node as the command would have it."""

    def node(*overrides: str) -> dict[str, Any]:
        cfg = config.compose("segment", [*SMALL, *overrides])
        return config.plain(cfg.stage, resolve=True)

    return node


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, toy.ckpt, and ten scenes, scenes.tar."""
    return toy_engine.write_toys(tmp_path_factory.mktemp("toys"))


@pytest.fixture
def begin(tmp_path: Path, toys: Path) -> Callable[..., Path]:
    """`begin("{stage: ...}", ..., overrides=[...])`: the folder of a new engine; its images are in scenes.tar beside it.

    Its models are not measured.
    """

    def begun(*steps: str, overrides: Sequence[str] = ()) -> Path:
        chosen = [*toy_engine.UNMEASURED, *overrides]
        return toy_engine.begun(tmp_path, toys, *steps, overrides=chosen)

    return begun


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`refused("round", ...)`: calls, sees that it fails as a mistake does, and gives the sentence."""

    def call_and_read(*argv: str) -> str:
        capsys.readouterr()
        assert toy_engine.call(*argv) == 2
        (said,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert said.startswith("data-engine: ")
        return said

    return call_and_read


@pytest.fixture(scope="session")
def labelled_once(tmp_path_factory: pytest.TempPathFactory, toys: Path) -> Path:
    folder, steps = tmp_path_factory.mktemp("labelled"), (toy_engine.QUIET, toy_engine.AUTOMATIC)
    root = toy_engine.begun(folder, toys, *steps, overrides=toy_engine.UNMEASURED)
    assert toy_engine.simulated(root) == 0
    assert toy_engine.simulated(root) == 0
    return root


@pytest.fixture
def labelled(labelled_once: Path, tmp_path: Path) -> Iterator[Engine]:
    """Three images by people, three by the model; a copy of one that was made elsewhere, as one may be moved."""
    engine = Engine.open(shutil.copytree(labelled_once, tmp_path / "engine"))
    yield engine
    engine.close()
