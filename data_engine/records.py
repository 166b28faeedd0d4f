"""The rows of the store: images, masks, rounds, tasks, reviews, models, with who, when and from which model.

Ids are texts that whoever makes a record gives, made from what it is about and not from a counter or a
clock: what is made again after a crash is the same record, not a second one. Times (`*_at`) are seconds
since 1970, UTC, by the clock that the desk was given; masks, points and boxes are in the original frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Stage = Literal["assisted", "semi_automatic", "audit"]
"""What people are asked for: masks, those that are missing, or corrections of automatic ones."""

MaskSource = Literal["assisted", "semi_automatic", "automatic", "audit"]
"""The stage that a mask comes from. Those of an audit measure, and are not trained on unless asked."""

TaskState = Literal["open", "leased", "done", "withdrawn"]
EventKind = Literal["click", "box", "brush", "eraser", "look", "undo", "redo", "accept", "delete"]
Rle = Mapping[str, Any]
"""COCO run lengths, {"size": [H, W], "counts": compressed string}."""


@dataclass(frozen=True, kw_only=True)
class Image:
    """One registered image; it stays where it is, and nothing of its labels is known here.

    Attributes:
        id: SHA-256 of the image file's bytes, in hex.
        key: its name in shards; unique in the store, without dots.
        width, height: in pixels, as its file has them.
        path: the image file, or the shard (path or URL) that it lies in.
        member: its file's name within the shard; None for a file of its own.
        offset: byte of the shard at which its sample begins (see `read_samples`); None likewise.
        held_out: whether it is kept for measuring, and never handed out or trained on.
        created_at: when it was registered.
    """

    id: str
    key: str
    width: int
    height: int
    path: str
    member: str | None = None
    offset: int | None = None
    held_out: bool = False
    created_at: float = 0.0

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.height, self.width


@dataclass(frozen=True, kw_only=True)
class Mask:
    """One accepted mask that a person made or passed; automatic ones live in shards, not here.

    Attributes:
        id: the submission's id and the mask's place in it.
        bbox: tightest (x, y, w, h) in pixels.
        area: in pixels.
        author: the annotator.
        model_id: the model that helped, if one did.
        label: class, if the project has any.
        point_coords: ((x, y), ...), the clicks.
        predicted_iou, stability_score: the model's, of the candidate that was taken, in [0, 1].
        seconds: spent on this mask.
        num_clicks: 0 for one that was shown ready-made and passed as it was.
        corrects: id within the task's payload of the ready-made mask that this one was made from.
    """

    id: str
    image_id: str
    task_id: str
    round: int
    source: MaskSource
    rle: Rle
    bbox: tuple[float, float, float, float]
    area: int
    author: str
    model_id: str | None = None
    label: str | None = None
    point_coords: tuple[tuple[float, float], ...] | None = None
    predicted_iou: float | None = None
    stability_score: float | None = None
    seconds: float = 0.0
    num_clicks: int = 0
    corrects: str | None = None
    created_at: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Task:
    """One image for one annotator.

    Attributes:
        id: the maker's name for it; adding it again changes nothing. Of equal priority, the lesser id
            goes first.
        priority: higher goes first.
        reserved_for: the only annotator who gets it; None for whoever comes.
        annotator: who holds it or did it.
        lease_expires_at: until when; afterwards another may get it.
        version: goes up whenever it is handed to somebody; a submission names the one it worked on.
        payload: what the stage shows, plain JSON: ready-made masks, boxes.
    """

    id: str
    round: int
    stage: Stage
    image_id: str
    state: TaskState = "open"
    priority: float = 0.0
    reserved_for: str | None = None
    annotator: str | None = None
    lease_expires_at: float | None = None
    version: int = 0
    payload: Mapping[str, Any] = field(default_factory=dict)
    created_at: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Event:
    """One thing an annotator did.

    Attributes:
        offset_s: seconds since the task was opened.
        mask_index: place in the submission's masks of the one it was for; None for one given up.
        data: plain JSON: {"x", "y", "label"} of a click, a box, a stroke's points, a candidate's number.
    """

    kind: EventKind
    offset_s: float
    mask_index: int | None = None
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DrawnMask:
    """A mask as an annotator hands it in; the fields are those of `Mask`, the rest follows from the task."""

    rle: Rle
    model_id: str | None = None
    label: str | None = None
    point_coords: tuple[tuple[float, float], ...] | None = None
    predicted_iou: float | None = None
    stability_score: float | None = None
    seconds: float = 0.0
    num_clicks: int = 0
    corrects: str | None = None


@dataclass(frozen=True, kw_only=True)
class Submission:
    """The answer to a task.

    Attributes:
        submission_id: the client's own; sending it again, after whatever happened, is safe.
        version: of the task when it was handed out.
        masks: all of them, or none for an image with nothing on it.
        seconds: from opening the task to sending.
    """

    submission_id: str
    task_id: str
    version: int
    masks: tuple[DrawnMask, ...] = ()
    events: tuple[Event, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What was stored of a submission: the same, however often it is sent."""

    submission_id: str
    task_id: str
    annotator: str
    mask_ids: tuple[str, ...]
    received_at: float


@dataclass(frozen=True, kw_only=True)
class StoredSubmission:
    """A submission as the store keeps it; its masks are rows of their own.

    Attributes:
        digest: of all that was sent, to tell the same submission from another of its id.
    """

    submission_id: str
    task_id: str
    version: int
    annotator: str
    digest: str
    mask_ids: tuple[str, ...]
    events: tuple[Event, ...]
    seconds: float
    received_at: float

    @property
    def receipt(self) -> Receipt:
        """What its sender gets, each time."""
        return Receipt(
            submission_id=self.submission_id,
            task_id=self.task_id,
            annotator=self.annotator,
            mask_ids=self.mask_ids,
            received_at=self.received_at,
        )


@dataclass(frozen=True, kw_only=True)
class Round:
    """One step of the plan under way or done.

    Attributes:
        stage: `assisted`, `semi_automatic`, `automatic`.
        state: `rounds.py` says which there are.
        model_id: the model that it works with.
        plan_step: its place in the plan.
        config: plain JSON, all that it was made with.
    """

    number: int
    stage: str
    state: str
    plan_step: int
    model_id: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    created_at: float = 0.0
    finished_at: float | None = None


@dataclass(frozen=True, kw_only=True)
class Review:
    """A second look at a mask.

    Attributes:
        before: the mask that was looked at.
        before_id: where it came from: a mask's id, or SHARD#ID of an automatic one.
        after: what it became; None where it was struck out.
        iou: of both, in [0, 1]; 0 where it was struck out.
        annotator: who looked.
    """

    id: str
    round: int
    image_id: str
    annotator: str
    before_id: str
    before: Rle
    after: Rle | None
    iou: float
    task_id: str | None = None
    seconds: float = 0.0
    created_at: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Model:
    """A checkpoint and where it comes from.

    Attributes:
        id: fingerprint of its weights (`sam_train/models/fingerprint.py`): a checkpoint file holds times too.
        path: of its checkpoint, relative to the engine's folder.
        parent: id of the model that its training began from; of a detector, the one whose encoder it has.
        round: the one after which it was trained; None for the first.
        trained_on: paths of the shards (see `Shard`) that it saw.
        data_fingerprint: of all that it saw.
        config: plain JSON; "kind" is "sam" or "detector", "command" what trained it.
        metrics: plain JSON, on the held-out images; empty where nothing was measured.
        code_version: of the project.
        promoted: whether rounds work with it; the next round works with the last one of these.
    """

    id: str
    path: str
    parent: str | None = None
    round: int | None = None
    trained_on: tuple[str, ...] = ()
    data_fingerprint: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    code_version: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    promoted: bool = False
    created_at: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A shard that the engine wrote, so that what came from an image can be named.

    Attributes:
        path: where it lies, relative to the engine's folder or a URL.
        source: the stage of its masks.
        model_id: that made them, of automatic ones.
        sha256: of the file, in hex.
        num_images, num_masks: what it holds.
    """

    path: str
    round: int
    source: MaskSource
    num_images: int
    num_masks: int
    sha256: str
    model_id: str | None = None
    created_at: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Tombstone:
    """An image that was taken down; it is not registered again.

    Attributes:
        image_id: its hash.
        who: took it down, `reason`: why.
        shards, models: what held it or has learnt from it and is not cleaned yet (see `lineage.cleaned`).
    """

    image_id: str
    key: str
    reason: str
    who: str
    shards: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    created_at: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """All that came from one image, by id, number or path.

    Attributes:
        models: those that saw a shard with it, and those trained on from these.
        shards: of the engine's own.
    """

    image_id: str
    tasks: tuple[str, ...]
    masks: tuple[str, ...]
    reviews: tuple[str, ...]
    rounds: tuple[int, ...]
    models: tuple[str, ...]
    shards: tuple[str, ...]
