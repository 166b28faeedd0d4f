"""An engine with a round of each stage, done by somebody who knows the masks: what audits and reports are of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from data_engine import mask_shapes
from data_engine.audit import Audit, audit_tasks
from data_engine.automatic_shards import automatic_shards
from data_engine.image_finding import find_images
from data_engine.images import image_bytes, register
from data_engine.mask_store.store import open_store
from data_engine.records import DrawnMask, Event, Image, Model, Round, Shard, Submission, Task
from data_engine.shard_writer import ShardManifest, finished
from data_engine.stages.fully_automatic import AutomaticStage
from data_engine.tasks import Desk
from sam_train import config
from sam_train.convert.tar_writer import TarWriter
from sam_train.data.sa1b import ShardSource
from sam_train.models.sam import Sam
from sam_train.ops import rle
from sam_train.structures import ImageRecord

CLICK_S = 2.0
MODELS = ((None, 0.50, True), (1, 0.62, True), (2, 0.60, False))
"""Round, `mean_iou@1`, whether it was promoted."""


class Filled:
    """An engine's folder and store, and somebody who works there.

    Attributes:
        root: the folder.
        store: in it.
        truth: the RLEs of each image, by the image's key.
    """

    def __init__(self, root: Path, shard: Path, sam: Sam, stage: dict[str, Any]) -> None:
        self.root, self.sam, self.stage = root, sam, stage
        self.store = open_store(root / "engine.sqlite", create=True)
        self.now = 1000.0
        self.desk = Desk(self.store, clock=self.clock)
        register(self.store, find_images(str(shard)), clock=self.clock)
        source = ShardSource(path=str(shard))
        records = source.records(epoch=0, reader=0, num_readers=1, shuffle=False)
        self.truth = {own.key: [one.rle for one in own.annotations] for own in records}
        for round_number, iou, promoted in MODELS:
            self.store.put_model(_model(round_number, iou, promoted))

    def clock(self) -> float:
        self.now += 1
        return self.now

    @property
    def images(self) -> list[Image]:
        return sorted(self.store.images(), key=lambda own: own.key)

    def assisted(self, number: int, images: Sequence[Image], annotators: Sequence[str]) -> None:
        """A round in which every object is drawn with as many clicks as its place among them says, up to 3."""
        self._round(number, "assisted")
        tasks = [
            Task(id=f"r{number}-{own.key}", round=number, stage="assisted", image_id=own.id)
            for own in images
        ]
        self.desk.add_tasks(tasks)
        for place in range(len(tasks)):
            annotator = annotators[place % len(annotators)]
            task = self.desk.next_task(annotator)
            assert task is not None
            objects = self._objects(task)
            self._submit(task, annotator, [_drawn(one, 1 + i % 3) for i, one in enumerate(objects)])

    def semi_automatic(self, number: int, images: Sequence[Image], annotator: str) -> None:
        """A round that shows three of four objects: passes one, corrects one, strikes one out, and draws the fourth."""
        self._round(number, "semi_automatic")
        for image in images:
            shown = [one for i, one in enumerate(self.truth[image.key]) if i % 4 < 3]
            payload = {"masks": [{"id": f"m{i}", "rle": dict(one)} for i, one in enumerate(shown)]}
            name = f"r{number}-{image.key}"
            new = Task(
                id=name, round=number, stage="semi_automatic", image_id=image.id, payload=payload
            )
            self.desk.add_tasks([new])
            task = self.desk.next_task(annotator)
            assert task is not None
            masks = []
            for i, one in enumerate(shown):
                if i % 3 == 0:
                    masks.append(DrawnMask(rle=one, corrects=f"m{i}", seconds=1.0))
                elif i % 3 == 1:
                    masks.append(_drawn(grown(one), 2, corrects=f"m{i}"))
            masks += [_drawn(one, 1) for i, one in enumerate(self.truth[image.key]) if i % 4 == 3]
            self._submit(task, annotator, masks)

    def automatic(self, number: int, images: Sequence[Image]) -> list[ShardManifest]:
        """The real stage, on images in two shards."""
        round_ = self._round(number, "automatic")
        folder = self.root / "rounds" / f"{number:03d}"
        half = (len(images) + 1) // 2
        parts = [own for own in (images[:half], images[half:]) if own]
        for part, own in enumerate(parts):
            tar = TarWriter(_made(folder / "images" / f"automatic-{part:06d}.tar"))
            for image in own:
                suffix = str(image.member).rsplit(".", 1)[1]
                tar.add(image.key, {suffix: image_bytes(image)})
            tar.finish()
        stage = config.instantiate(self.stage)
        assert isinstance(stage, AutomaticStage)
        out = folder / "shards"
        stage.run(self.sam, str(folder / "images"), out, settings=self.stage, round_number=number)
        made = []
        for part, own in enumerate(parts):
            manifest = finished(out / f"automatic-{part:06d}.tar")
            assert manifest is not None
            made.append(manifest)
            shard = Shard(
                path=(out / manifest.name).relative_to(self.root).as_posix(),
                round=number,
                source="automatic",
                num_images=manifest.images,
                num_masks=manifest.masks,
                sha256=manifest.sha256,
                model_id=round_.model_id,
            )
            self.store.put_shard(shard, [image.id for image in own])
        return made

    def audit(self, number: int, audit: Audit, annotator: str = "anna") -> list[Task]:
        """Hands an audit out and does it: passes what is nearly right, mends what is half right, strikes out the rest."""
        tasks = audit_tasks(self.store, self.root, number, audit)
        self.desk.add_tasks(tasks)
        for name in (annotator, *(audit.pair or ())):
            while (task := self.desk.next_task(name, stage="audit")) is not None:
                self._submit(task, name, self._looked_at(task))
        return tasks

    def _looked_at(self, task: Task) -> list[DrawnMask]:
        objects = self._objects(task)
        shown = task.payload["masks"]
        found = mask_shapes.ious([own["rle"] for own in shown], objects)
        masks = []
        for own, row in zip(shown, found, strict=True):
            best = int(row.argmax())
            if row[best] > 0.8:
                masks.append(DrawnMask(rle=own["rle"], corrects=own["id"], seconds=1.0))
            elif row[best] > 0.4:
                masks.append(_drawn(objects[best], 2, corrects=own["id"]))
        met = found.max(0) if len(shown) else np.zeros(len(objects))
        return masks + [_drawn(one, 1) for one, iou in zip(objects, met, strict=True) if iou <= 0.4]

    def shards(self, number: int) -> list[Path]:
        return [Path(own.path) for own in automatic_shards(self.store, self.root, number)]

    def _objects(self, task: Task) -> list[Any]:
        return self.truth[self.store.image(task.image_id).key]

    def _round(self, number: int, stage: str) -> Round:
        round_ = Round(
            number=number, stage=stage, state="done", plan_step=number - 1, model_id="start",
            config={"step": {"stage": stage}, "code_version": "0.1.0"},
        )  # fmt: skip
        self.store.put_round(round_)
        return round_

    def _submit(self, task: Task, annotator: str, masks: Sequence[DrawnMask]) -> None:
        events, at = [Event(kind="look", offset_s=0.5)], 1.0
        for index, mask in enumerate(masks):
            for _ in range(mask.num_clicks):
                at += CLICK_S
                events.append(Event(kind="click", offset_s=at, mask_index=index))
            events.append(Event(kind="accept", offset_s=at, mask_index=index))
        seconds = 3.0 + sum(mask.seconds for mask in masks)
        submission = Submission(
            submission_id=f"{task.id}-v{task.version}-{annotator}", task_id=task.id,
            version=task.version, masks=tuple(masks), events=tuple(events), seconds=seconds,
        )  # fmt: skip
        self.desk.submit(submission, annotator)


def _model(round_number: int | None, iou: float, promoted: bool) -> Model:
    metrics = {f"mean_iou@{clicks}": iou + 0.02 * (clicks - 1) for clicks in range(1, 10)}
    recalls = {f"average_recall@{n}": iou / 2 + n / 5000 for n in (10, 100, 1000)}
    name = "start" if round_number is None else f"after-{round_number}"
    return Model(
        id=name, path=f"models/{name}.ckpt", round=round_number, promoted=promoted,
        metrics=metrics | recalls | {"box_mean_iou": iou + 0.1}, config={"kind": "sam"},
    )  # fmt: skip


def _drawn(own: Any, num_clicks: int, corrects: str | None = None) -> DrawnMask:
    seconds = num_clicks * CLICK_S + 1
    return DrawnMask(rle=own, num_clicks=num_clicks, seconds=seconds, corrects=corrects)


def grown(own: Any) -> dict[str, Any]:
    """A mask with a border of one pixel more."""
    return rle.encode(cv2.dilate(rle.decode(own).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0)


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture
def fill(
    tmp_path: Path, built_in_sam: Sam, stage_node: Callable[..., dict[str, Any]]
) -> Iterator[Callable[..., Filled]]:
    """`fill(shard, "preset.NAME=VALUE", ...)`: an engine with the images of a shard, and no round yet."""
    made = []

    def make(shard: Path, *overrides: str, root: Path = tmp_path / "engine") -> Filled:
        root.mkdir(parents=True, exist_ok=True)
        made.append(Filled(root, shard, built_in_sam, stage_node(*overrides)))
        return made[-1]

    yield make
    for own in made:
        own.store.close()


THRESHOLDS = "preset.pred_iou_thresh=0.2", "preset.stability_score_thresh=0.5"
"""Of the few points that are asked, masks on every scene."""


@pytest.fixture
def scenes(fill: Callable[..., Filled], write_shard: Callable[..., Path], tmp_path: Path) -> Filled:
    """An engine of four synthetic scenes."""
    shard = write_shard(tmp_path / "in" / "scenes-000000.tar", 4)
    return fill(shard, *THRESHOLDS)


@pytest.fixture(scope="module")
def filled_once(
    tmp_path_factory: pytest.TempPathFactory,
    built_in_sam: Sam,
    stage_node: Callable[..., dict[str, Any]],
    write_shard: Callable[..., Path],
) -> Filled:
    """The same, of a whole module of tests."""
    shard = write_shard(tmp_path_factory.mktemp("in") / "scenes-000000.tar", 4)
    return Filled(tmp_path_factory.mktemp("engine"), shard, built_in_sam, stage_node(*THRESHOLDS))


@pytest.fixture
def nuclei_shard(shared_data: Path, tmp_path: Path) -> Path:
    """The first 24 small images of the nuclei set."""
    source = ShardSource(path=str(shared_data / "nuclei" / "val-000000.tar"))
    tar, number = TarWriter(_made(tmp_path / "nuclei-000000.tar")), 0
    for record in source.records(epoch=0, reader=0, num_readers=1, shuffle=False):
        if number < 24 and max(record.size) <= 400:
            tar.add(record.key, _files(record))
            number += 1
    tar.finish()
    return tmp_path / "nuclei-000000.tar"


def _files(record: ImageRecord) -> dict[str, bytes]:
    from sam_train.data.shards import encode_record

    assert record.read_file is not None
    return encode_record(record, image_bytes=record.read_file())
