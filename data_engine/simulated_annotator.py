"""Plays an annotator whose ground truth is known, through the same calls that a person's page makes.

Nothing that it does depends on which tasks it did before or on who else works: what is random about a task
follows from the seed and the task's id, and its time is a model's (`time_model.py`), not the machine's. So an
annotator that is killed and comes back hands in the same submission.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from data_engine.annotator_settings import AnnotatorSettings
from data_engine.embeddings import Embeddings
from data_engine.images import image_pixels
from data_engine.mask_store.store import Store
from data_engine.records import Image, Rle, Stage, Submission, Task
from data_engine.sessions import AnnotationSession
from data_engine.simulated_image import ImageWork, Seen
from data_engine.tasks import Conflict, Desk
from data_engine.time_model import SimulatedClock
from data_engine.truth import known_truth
from sam_train.inference.predictor import SamPredictor

log = logging.getLogger(__name__)

FIRST_NAME = "simulated-0"
"""All simulated annotators are called simulated-NUMBER, by which reports tell them from people."""


@dataclass(frozen=True, kw_only=True)
class WorkDone:
    """What an annotator did, summed over tasks.

    Attributes:
        num_tasks: handed in.
        num_masks: in them, ready-made ones that were kept included.
        num_kept: of these, ready-made ones as they were.
        num_clicks: on the masks handed in.
        num_left_out, num_given_up: objects that were not begun, and that were tried in vain.
        num_conflicts: tasks that went to somebody else meanwhile.
        seconds: simulated.
    """

    num_tasks: int = 0
    num_masks: int = 0
    num_kept: int = 0
    num_clicks: int = 0
    num_left_out: int = 0
    num_given_up: int = 0
    num_conflicts: int = 0
    seconds: float = 0.0

    def __add__(self, other: WorkDone) -> WorkDone:
        names = [field.name for field in fields(self)]
        return WorkDone(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def __str__(self) -> str:
        drawn = self.num_masks - self.num_kept
        pace = f"{self.num_clicks / drawn:.1f} clicks a mask drawn, " if drawn else ""
        return (
            f"simulated: {self.num_tasks} images, {self.num_masks} masks ({self.num_kept} ready-made), "
            f"{pace}{self.seconds / 60:.1f} minutes"
        )


class SimulatedAnnotator:
    """One that works until there is no task for it.

    Args:
        desk: hands tasks out.
        store: with their images.
        truth: the masks of an image; None: those beside it in its shard.
        predictor: of the model that helps.
        settings: what it is like.
        name: as the desk knows it, simulated-NUMBER.
        model_id: of the model, which goes with the masks.
        embeddings: computed ahead; None: each image is encoded when it is opened.
    """

    def __init__(
        self,
        desk: Desk,
        store: Store,
        truth: Callable[[Image], Sequence[Rle]] | None,
        predictor: SamPredictor,
        settings: AnnotatorSettings | None = None,
        *,
        name: str = FIRST_NAME,
        model_id: str | None = None,
        embeddings: Embeddings | None = None,
    ) -> None:
        if not name.startswith("simulated-"):
            raise ValueError(f"a simulated annotator is called simulated-NUMBER, got {name!r}")
        self.name = name
        self._desk, self._store, self._truth = desk, store, truth or known_truth
        self._predictor, self._model_id, self._embeddings = predictor, model_id, embeddings
        self._settings = settings or AnnotatorSettings()

    def work(self, stage: Stage | None = None, *, max_tasks: int | None = None) -> WorkDone:
        """Does tasks until the desk has none for it.

        Args:
            stage: only tasks of this stage.
            max_tasks: stops after so many.

        Raises:
            UnknownTruthError, ImageGoneError: of an image; the tasks before are handed in.
        """
        done = WorkDone()
        while max_tasks is None or done.num_tasks + done.num_conflicts < max_tasks:
            task = self._desk.next_task(self.name, stage=stage)
            if task is None:
                break
            submission, seen = self.answer(task)
            try:
                self._desk.submit(submission, self.name)
            except Conflict as conflict:
                log.warning("%s: %s", self.name, conflict)
                done += WorkDone(num_conflicts=1)
                continue
            done += _counted(task, submission, seen)
        log.info("%s: %s", self.name, done)
        return done

    def answer(self, task: Task) -> tuple[Submission, Seen]:
        """What it hands in for a task, and what became of the objects; nothing is sent."""
        image = self._store.image(task.image_id)
        pixels, shown = image_pixels(image), task.payload.get("masks", ())
        if self._embeddings is None:
            self._predictor.set_image(pixels)
        else:
            self._embeddings.set(image, pixels)
        clock = SimulatedClock()
        session = AnnotationSession(
            self._predictor, None, clock=clock, shown=shown, model_id=self._model_id
        )
        patience_s = self._settings.patience.move_on_after_s
        work = ImageWork(
            session,
            clock,
            pixels,
            self._truth(image),
            self._settings,
            generator_of(self._settings.seed, task.id),
            task.payload.get("move_on_after_s", patience_s),
        )
        is_second_look = task.stage == "audit" and bool(shown)
        work.look_over(to_the_end=is_second_look)
        if not is_second_look:  # who audits judges what is there
            work.label_missing()
        return session.submission(f"{task.id}-v{task.version}", task), work.seen


def generator_of(seed: int, task_id: str) -> np.random.Generator:
    """All that is random about a task."""
    digest = hashlib.sha256(f"{seed} {task_id}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def _counted(task: Task, submission: Submission, seen: Seen) -> WorkDone:
    shown = {one["id"]: one["rle"]["counts"] for one in task.payload.get("masks", ())}
    kept = sum(
        one.corrects is not None and one.rle["counts"] == shown[one.corrects]
        for one in submission.masks
    )
    return WorkDone(
        num_tasks=1,
        num_masks=len(submission.masks),
        num_kept=kept,
        num_clicks=sum(one.num_clicks for one in submission.masks),
        num_left_out=seen.left_out,
        num_given_up=seen.given_up,
        seconds=submission.seconds,
    )
