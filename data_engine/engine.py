"""An engine: its folder, its configuration, its store, and what they say of where it stands.

ROOT/engine.yaml        the configuration (`settings.py`); written last by `init`, so without it there is no engine
ROOT/engine.sqlite      the store, or store.url elsewhere
ROOT/models/            the model that it began with
ROOT/held_out/          the held-out images with their masks, as shards
ROOT/rounds/NNN/        shards/ and checkpoints/ of a round, report.md, report.json; training/ and detector/ are run folders
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from data_engine import settings
from data_engine.image_copies import follow
from data_engine.mask_store.store import Store
from data_engine.plan import Step, read_steps
from data_engine.records import Image, Model, Rle, Round
from data_engine.tasks import Desk
from data_engine.truth import known_truth
from sam_train import config
from sam_train.training import run_lock

SAM, DETECTOR = "sam", "detector"
"""Kinds of models, as `Model.config["kind"]` says."""


class Engine:
    """What the parts of the engine share.

    Args:
        root: its folder.
        settings: its configuration as plain values.
        store: of `settings["store"]`.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        root: Path,
        settings: Mapping[str, Any],
        store: Store,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.root = root.absolute()
        self.settings = settings
        self.store = store
        self.clock = clock

    @classmethod
    def open(
        cls,
        root: str | Path,
        overrides: Sequence[str] = (),
        *,
        config_dir: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> Engine:
        """Opens the engine of a folder.

        Args:
            root: the folder.
            overrides: `name=value`, what is otherwise than `init` has it, for this call.
            config_dir: a user's own recipes.
            clock: seconds since 1970.

        Raises:
            FileNotFoundError: there is no engine.
            ValueError: its configuration is damaged, or an override is none.
            StoreError: its store cannot be opened.
        """
        read = settings.read(Path(root), overrides, config_dir)
        engine = cls(Path(root), read, config.instantiate(read["store"]), clock)
        follow(engine.store, engine.root)
        return engine

    @cached_property
    def desk(self) -> Desk:
        """Hands the tasks out."""
        labels, lease_s = self.settings.get("labels"), float(self.settings["lease_s"])
        return Desk(self.store, clock=self.clock, lease_s=lease_s, labels=labels)

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """The plan."""
        return read_steps(self.settings["plan"])

    def truth(self, image: Image) -> Sequence[Rle]:
        """The ground truth of an image, for simulated annotators and for measuring alone.

        Raises:
            UnknownTruthError: none is known.
        """
        return self._truth(image)

    @cached_property
    def _truth(self) -> Callable[[Image], Sequence[Rle]]:
        node = self.settings.get("truth")
        return known_truth if node is None else config.instantiate(node)

    def close(self) -> None:
        """Lets go of the store."""
        self.store.close()

    def round_folder(self, number: int) -> Path:
        """The folder of a round."""
        return self.root / "rounds" / f"{number:03d}"

    def relative(self, path: Path) -> str:
        """A path within the folder as the store has it: the folder may move."""
        return path.absolute().relative_to(self.root).as_posix()

    def path(self, stored: str) -> Path:
        """The place of what the store names."""
        return self.root / stored

    def models(self, kind: str = SAM) -> list[Model]:
        """All models of a kind, the first ones first; of one round in the order of their making."""
        found = [one for one in self.store.models() if one.config.get("kind") == kind]
        return sorted(found, key=lambda one: (_round_of(one), one.created_at))

    def current_model(self) -> Model:
        """The model that the next round works with: the last one that was promoted.

        Raises:
            ValueError: there is none.
        """
        promoted = [model for model in self.models() if model.promoted]
        if not promoted:
            raise ValueError(f"{self.root} has no model: data-engine init was not finished")
        return promoted[-1]

    def model_of(self, round_: Round) -> Model:
        """The model that a round works with."""
        model = self.store.model(str(round_.model_id))
        if model is None:
            raise ValueError(
                f"round {round_.number} works with a model that the store does not know"
            )
        return model

    def current_round(self) -> Round | None:
        """The last round that was begun."""
        rounds = self.store.rounds()
        return rounds[-1] if rounds else None


@contextmanager
def only_one(root: Path) -> Iterator[None]:
    """Holds an engine's folder: one process at a time moves its rounds on, makes it or takes images out.

    Raises:
        ValueError: another does.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(run_lock.held(root))
        except ValueError as error:
            raise ValueError(
                f"{str(error).split(':')[0]}: wait for its end; data-engine status root={root} "
                "shows where it stands"
            ) from None
        yield


def _round_of(model: Model) -> int:
    return -1 if model.round is None else model.round
