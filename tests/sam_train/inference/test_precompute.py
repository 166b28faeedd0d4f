"""Filling the cache: what is kept, what is left alone, and that training would be shown the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sam_train import cli
from sam_train.data.collate import collate
from sam_train.data.embedding_cache import EmbeddingCache
from sam_train.data.source import UnusableSourceError
from sam_train.data.transforms import ToSample
from sam_train.inference.precompute import Precompute
from sam_train.models.fingerprint import embedding_shape, encoder_id
from sam_train.models.sam import Sam
from sam_train.structures import ImageRecord


@dataclass(frozen=True)
class Listed:
    """A source of these records; it notes down whose pixels were looked at."""

    listed: list[ImageRecord]
    decoded: list[str] = field(default_factory=list)

    def records(self, *, reader: int, num_readers: int, **_: Any) -> Iterator[ImageRecord]:
        for record in self.listed[reader::num_readers]:
            yield replace(record, load=lambda record=record: self._load(record))

    def _load(self, record: ImageRecord) -> Any:
        self.decoded.append(record.key)
        return record.load()


@pytest.fixture
def model(tiny_sam: Sam) -> Sam:
    tiny_sam.set_img_size(64)
    return tiny_sam


def opened(folder: Path, model: Sam) -> EmbeddingCache:
    return EmbeddingCache(folder, encoder=encoder_id(model), shape=embedding_shape(model))


def test_what_is_kept_is_what_training_would_compute(
    tmp_path: Path, model: Sam, synthetic_scenes: list[ImageRecord]
) -> None:
    wide = replace(
        synthetic_scenes[0], key="wide", size=(50, 96), load=lambda: synthetic_scenes[0].image[:50]
    )
    listed = Listed([wide, *synthetic_scenes[1:]])

    done = Precompute(batch_size=3, num_workers=0).run(model, listed, tmp_path)  # type: ignore[arg-type]

    assert (done.num_added, done.num_images) == (4, 4)
    transform = ToSample(img_size=64, mask_size=32)
    samples = [transform(record, 0) for record in (synthetic_scenes[1], wide)]
    batch = collate([sample for sample in samples if sample is not None], 64)
    with torch.no_grad():
        expected = model.encode(batch.images, batch.input_sizes).image_embeddings
    read = opened(tmp_path, model).read(batch.keys, batch.images)
    torch.testing.assert_close(read, expected, rtol=2e-3, atol=2e-3)


def test_a_second_run_decodes_only_what_is_missing(
    tmp_path: Path, model: Sam, synthetic_scenes: list[ImageRecord]
) -> None:
    precompute = Precompute(num_workers=0)
    precompute.run(model, Listed(synthetic_scenes[:2]), tmp_path)  # type: ignore[arg-type]
    listed = Listed(synthetic_scenes)

    done = precompute.run(model, listed, tmp_path)  # type: ignore[arg-type]

    assert (done.num_added, done.num_images) == (2, 4)
    assert listed.decoded == [record.key for record in synthetic_scenes[2:]]


def test_shares_fill_one_cache_between_them(
    tmp_path: Path, model: Sam, synthetic_scenes: list[ImageRecord]
) -> None:
    added = [
        Precompute(num_workers=0, share=share, num_shares=3)
        .run(model, Listed(synthetic_scenes), tmp_path)  # type: ignore[arg-type]
        .num_added
        for share in range(3)
    ]

    assert added == [2, 1, 1]
    assert all(record.key in opened(tmp_path, model) for record in synthetic_scenes)


def test_other_weights_and_another_size_are_another_encoder(model: Sam) -> None:
    first = encoder_id(model)
    assert encoder_id(model) == first
    model.set_img_size(128)
    assert encoder_id(model) != first
    model.set_img_size(64)
    with torch.no_grad():
        model.mask_decoder.iou_token.weight.add_(1)
        assert encoder_id(model) == first
        next(model.image_encoder.parameters()).view(-1)[0] += 1e-6
    assert encoder_id(model) != first


def test_a_source_that_cannot_be_used_is_said_from_a_reading_process(
    tmp_path: Path, model: Sam
) -> None:
    class Broken:
        def records(self, **_: Any) -> Iterator[ImageRecord]:
            raise UnusableSourceError("no such thing")
            yield

    with pytest.raises(UnusableSourceError, match="no such thing"):
        Precompute(num_workers=1).run(model, Broken(), tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"batch_size": 0}, "batch_size >= 1"), ({"share": 2, "num_shares": 2}, "share < num_shares")],
)
def test_settings_out_of_range_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Precompute(**settings)  # type: ignore[arg-type]


def test_the_command_fills_the_cache_and_goes_on(
    tmp_path: Path, tiny_sam_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*more: str) -> int:
        arguments = [f"checkpoint={tiny_sam_file}", f"run_dir={tmp_path}/cache", "img_size=64"]
        scenes = ["data.train.size=64", "precompute.num_workers=0", *more]
        return cli.run("precompute", [*arguments, *scenes])

    assert run("data.train.num_scenes=2") == 0
    assert "2 images encoded, 2 in" in capsys.readouterr().out
    assert run("data.train.num_scenes=3") == 0
    assert "1 images encoded, 3 in" in capsys.readouterr().out
    assert run("split=test") == 2
    assert "split=train or split=val" in capsys.readouterr().err
