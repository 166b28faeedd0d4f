"""Thresholds tuned on what an audit left."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from data_engine.audit import Audit
from data_engine.audited_source import AuditedSource, tune_thresholds
from data_engine.images import image_pixels
from sam_train.data.source import DamagedSampleError
from sam_train.evaluation.threshold_tuning import ThresholdTuning


@pytest.fixture
def audited(scenes: Any) -> Any:
    scenes.automatic(1, scenes.images)
    scenes.audit(1, Audit(num_images=3, pair=["ben", "carl"]))
    return scenes


def read(source: AuditedSource, **options: Any) -> list[Any]:
    arguments = {"epoch": 0, "reader": 0, "num_readers": 1, "shuffle": False} | options
    return list(source.records(**arguments))


def test_an_audited_image_has_the_masks_that_the_annotator_left(audited: Any) -> None:
    records = read(AuditedSource(audited.store, 1))

    assert len(records) == 3
    images = {own.key: own for own in audited.images}
    for record in records:
        image = images[record.key]
        np.testing.assert_array_equal(record.image, image_pixels(image))
        # `Filled.audit` leaves a mask for every object; a pair's own are none of them.
        assert len(record.annotations) >= len(audited.truth[record.key])
        assert all(own.rle["size"] == list(image.size) for own in record.annotations)


def test_readers_share_the_images_and_go_on_where_they_were(audited: Any) -> None:
    source = AuditedSource(audited.store, 1)
    whole = [own.key for own in read(source, shuffle=True)]

    parts = [read(source, shuffle=True, reader=n, num_readers=2) for n in range(2)]

    assert sorted(own.key for part in parts for own in part) == sorted(whole)
    first = read(source, shuffle=True)[0]
    assert [own.key for own in read(source, shuffle=True, start=first.cursor)] == whole[1:]


def test_an_image_that_is_gone_is_left_out_when_it_is_looked_at(audited: Any) -> None:
    (record, *_) = read(AuditedSource(audited.store, 1))
    for image in audited.images:
        audited.store.put_image(image.__class__(**vars(image) | {"path": "/gone.tar"}))
    (gone, *_) = read(AuditedSource(audited.store, 1))

    assert record.image.shape == (*record.size, 3)
    with pytest.raises(DamagedSampleError, match="gone.tar cannot be read"):
        gone.image  # noqa: B018  a cached property


def test_thresholds_are_tuned_on_an_audit(audited: Any) -> None:
    stage = audited.stage
    from sam_train import config

    tuning = ThresholdTuning(generator=config.instantiate(stage).generator, max_images=3)
    out = audited.root / "thresholds.json"

    tuned = tune_thresholds(audited.store, 1, audited.sam, tuning, out)

    assert tuned.num_images == 3
    assert tuned.best.quality >= tuned.current.quality > 0
    assert json.loads(out.read_text())["best"]["quality"] == tuned.best.quality


def test_without_an_audit_there_is_nothing_to_tune_on(scenes: Any) -> None:
    tuning = ThresholdTuning(generator=lambda **_: None)  # type: ignore[arg-type,return-value]

    with pytest.raises(ValueError, match="nothing of round 1 was audited yet"):
        tune_thresholds(scenes.store, 1, scenes.sam, tuning, scenes.root / "t.json")
