import csv
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sam_train import config
from sam_train.data.source import DamagedSampleError
from sam_train.evaluation import click_benchmark
from sam_train.evaluation.click_benchmark import (
    ClickBenchmark,
    ObjectScore,
    choose_cases,
    objects_table,
)
from sam_train.metrics.click_rollout import click_rollout
from sam_train.metrics.clicks import ClickMetrics
from sam_train.models.sam import Sam
from sam_train.ops.rle import encode
from sam_train.prompts.simulator import PromptSimulator
from sam_train.structures import Annotation, ImageFeatures, ImageRecord, MaskPrediction

SIMULATOR = PromptSimulator(
    box_prob=0,
    click_sampling="center",
    exclude_clicked=True,
    num_corrections=19,
    num_extra_passes=0,
)


class DiscModel(nn.Module):
    """Takes every object for a disc round its first point; each further click makes it larger."""

    mask_threshold = 0.0
    device = torch.device("cpu")
    postprocess_masks = Sam.postprocess_masks

    def __init__(self) -> None:
        super().__init__()
        self.image_encoder = nn.Identity()
        self.image_encoder.img_size = 48

    def encode(self, images, input_sizes):
        return ImageFeatures(images.float())

    def decode(self, features, prompts, *, image_index=None, multimask_output):
        coords, labels = prompts.point_coords, prompts.point_labels
        is_box = labels[:, :1, None] == 2
        centres = torch.where(is_box, coords[:, :2].mean(1, keepdim=True), coords[:, :1])
        y, x = torch.meshgrid(torch.arange(48), torch.arange(48), indexing="ij")
        distance = (torch.stack([x, y], -1)[None] - centres[:, None]).norm(dim=-1)
        radius = 3.0 + (labels >= 0).sum(1)
        logits = (radius[:, None, None] - distance)[:, None]
        ious = torch.full((len(labels), 1), 0.7)
        if multimask_output:
            logits, ious = torch.cat([logits, logits - 2, logits + 2], 1), ious.repeat(1, 3)
        return MaskPrediction(logits, ious)


class Discs:
    """A source of images with discs of all sizes, in an order that a shuffle turns round."""

    def __init__(self, num_images: int = 4, num_objects: int = 3) -> None:
        self.num_images, self.num_objects = num_images, num_objects

    def records(self, *, epoch, reader, num_readers, shuffle, start=()):
        order = range(self.num_images)
        for index in reversed(order) if shuffle else order:
            yield self.record(index)

    def record(self, index: int) -> ImageRecord:
        rng = np.random.default_rng(index)
        height, width = 60 + 4 * index, 48
        y, x = np.mgrid[:height, :width]
        annotations = []
        for i in range(self.num_objects):
            centre_y, centre_x = rng.uniform(10, height - 10), rng.uniform(10, width - 10)
            mask = (y - centre_y) ** 2 + (x - centre_x) ** 2 <= rng.uniform(2, 18) ** 2
            annotations.append(
                Annotation(
                    id=100 * index + i, rle=encode(mask), bbox=(0, 0, 1, 1), area=float(mask.sum())
                )
            )
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        return ImageRecord(
            f"image-{index}", (height, width), tuple(annotations), lambda: image, "discs"
        )


def read_table(run_dir: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((run_dir / "objects.csv").read_text().splitlines()))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """The folder of a whole run on four images of three discs."""
    folder = tmp_path_factory.mktemp("clicks")
    benchmark = ClickBenchmark(simulator=SIMULATOR, num_cases=2)
    result = benchmark.run(DiscModel(), Discs(), folder, checkpoint="runs/a.ckpt")
    assert json.loads((folder / "metrics.json").read_text()) == result
    return folder


def test_metrics_json_has_the_published_form_and_the_means_of_the_table(run_dir):
    result = json.loads((run_dir / "metrics.json").read_text())

    assert list(result) == [
        "protocol",
        "dataset",
        "num_images",
        "num_masks",
        "checkpoint",
        "metrics",
    ]
    assert {k: v for k, v in result.items() if k != "metrics"} == {
        "protocol": "clicks",
        "dataset": "discs",
        "num_images": 4,
        "num_masks": 12,
        "checkpoint": "runs/a.ckpt",
    }
    rows = read_table(run_dir)
    assert [row["key"] for row in rows] == [f"image-{i}" for i in range(4) for _ in range(3)]
    assert [int(row["id"]) for row in rows] == [100 * i + j for i in range(4) for j in range(3)]
    for name, column in (
        ("mean_iou@1", "iou@1"),
        ("mean_iou@9", "iou@9"),
        ("box_mean_iou", "box_iou"),
        ("oracle_mean_iou@1", "oracle_iou@1"),
        ("noc@85", "noc@85"),
        ("noc@90", "noc@90"),
    ):
        mean = sum(float(row[column]) for row in rows) / len(rows)
        assert result["metrics"][name] == pytest.approx(mean, abs=1e-4)
    small = [float(row["iou@2"]) for row in rows if row["size"] == "small"]
    assert result["metrics"]["mean_iou@2_small"] == pytest.approx(np.mean(small), abs=1e-4)


def test_the_result_is_that_of_rollouts_image_by_image_however_they_are_chunked(run_dir, tmp_path):
    source, metrics = Discs(), ClickMetrics(20)
    for i in range(4):
        metrics.update(click_rollout(DiscModel(), source.record(i), SIMULATOR, chunk_size=2))

    assert json.loads((run_dir / "metrics.json").read_text())["metrics"] == metrics.compute()


def test_a_second_run_writes_the_same(tmp_path):
    benchmark = ClickBenchmark(
        simulator=dataclasses.replace(SIMULATOR, num_corrections=2), num_cases=0
    )
    written = []
    for name in "ab":
        benchmark.run(DiscModel(), Discs(2), tmp_path / name)
        written.append(
            [(tmp_path / name / file).read_bytes() for file in ("metrics.json", "objects.csv")]
        )

    assert written[0] == written[1]


def test_pictures_are_drawn(run_dir):
    figures = run_dir / "figures"
    assert sorted(path.name for path in figures.iterdir()) == [
        "best.png",
        "curves.png",
        "median.png",
        "worst.png",
    ]
    with Image.open(figures / "worst.png") as image:
        worst = np.asarray(image)
    assert worst.shape[0] > 2 * 200
    assert len(np.unique(worst.reshape(-1, 3), axis=0)) > 100


class OneKey(Discs):
    """Shards may hold different images under the same key."""

    def record(self, index: int) -> ImageRecord:
        return dataclasses.replace(super().record(index), key="same")


def test_images_of_one_key_are_told_apart(run_dir, tmp_path):
    benchmark = ClickBenchmark(simulator=SIMULATOR, num_cases=2)
    benchmark.run(DiscModel(), OneKey(), tmp_path)

    for name in ("worst", "best"):
        with (
            Image.open(tmp_path / f"figures/{name}.png") as same,
            Image.open(run_dir / f"figures/{name}.png") as apart,
        ):
            # All but the captions, which hold the keys.
            assert same.height == apart.height
            assert (np.asarray(same)[24:200] == np.asarray(apart)[24:200]).mean() > 0.99


def test_a_limit_measures_whole_images_in_the_shuffled_order(tmp_path):
    short = dataclasses.replace(SIMULATOR, num_corrections=0)
    benchmark = ClickBenchmark(simulator=short, max_masks=4, num_cases=0)
    result = benchmark.run(DiscModel(), Discs(), tmp_path)

    assert (result["num_images"], result["num_masks"]) == (2, 6)
    keys = {row["key"] for row in read_table(tmp_path)}
    assert keys == {"image-3", "image-2"}


def test_a_short_run_has_no_number_of_clicks(tmp_path):
    short = dataclasses.replace(SIMULATOR, num_corrections=2)
    result = ClickBenchmark(simulator=short, with_box=False, num_cases=0).run(
        DiscModel(), Discs(2), tmp_path
    )

    assert "noc@90" not in result["metrics"]
    assert "box_mean_iou" not in result["metrics"]
    assert "noc@90" not in (tmp_path / "objects.csv").read_text()


def test_nothing_to_measure_is_an_error_that_says_so(tmp_path):
    with pytest.raises(ValueError, match="found none: check the data's path"):
        ClickBenchmark(simulator=SIMULATOR).run(DiscModel(), Discs(0), tmp_path)

    assert not (tmp_path / "metrics.json").exists()


def score(key: str, index: int, iou: float) -> ObjectScore:
    return ObjectScore(key, ord(key), index, index, 100, (iou,), 0.5, iou, math.nan)


def test_cases_are_the_worst_middling_and_best_of_different_images():
    scores = [score("abcde"[i % 5], i, i / 20) for i in range(20)]

    cases = choose_cases(scores, 3)

    assert [case.index for case in cases["worst"]] == [0, 1, 2]
    assert [case.index for case in cases["median"]] == [10, 9, 11]
    assert [case.index for case in cases["best"]] == [19, 18, 17]
    same_image = [score("a", i, i / 20) for i in range(4)]
    assert [case.index for case in choose_cases(same_image, 3)["worst"]] == [0, 1, 2]
    assert len(choose_cases(scores[:1], 3)["best"]) == 1


def test_the_table_leaves_cells_without_a_value_empty():
    rows = list(csv.DictReader(objects_table([score("a", 0, 0.25)]).splitlines()))

    assert rows[0]["iou@1"] == "0.2500"
    assert rows[0]["box_iou"] == ""
    assert rows[0]["size"] == "small"


def test_the_protocol_is_a_config():
    cfg = config.compose("eval", ["checkpoint=x", "seed=3", "protocol.max_masks=50"])

    assert config.instantiate(cfg.protocol) == ClickBenchmark(
        simulator=SIMULATOR, max_masks=50, seed=3
    )


@pytest.mark.parametrize("part", ["image", "mask"])
def test_a_damaged_sample_is_left_out_of_the_evaluation(tmp_path, part):
    class OneDamaged(Discs):
        def record(self, index: int) -> ImageRecord:
            def damaged(reason: object = "it cannot be read") -> Exception:
                return DamagedSampleError(f"image-1: {reason}")

            def load() -> np.ndarray:
                raise damaged()

            record = super().record(index)
            if index != 1:
                return record
            if part == "image":
                return dataclasses.replace(record, load=load)
            broken = dataclasses.replace(
                record.annotations[0], rle={"size": list(record.size), "counts": "04"}
            )
            return dataclasses.replace(record, annotations=(broken,), damaged=damaged)

    result = ClickBenchmark(simulator=SIMULATOR).run(DiscModel(), OneDamaged(), tmp_path)

    assert result["num_images"] == 3
    assert {row["key"] for row in read_table(tmp_path)} == {"image-0", "image-2", "image-3"}


def test_a_result_is_there_before_its_pictures_are_drawn(tmp_path, monkeypatch):
    def fails(*args: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(click_benchmark, "save_image", fails)
    with pytest.raises(OSError, match="no space left"):
        ClickBenchmark(simulator=SIMULATOR).run(DiscModel(), Discs(), tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text())["num_masks"] == 12


def test_a_folder_that_cannot_be_made_is_known_before_the_clicks(tmp_path):
    class NeverAsked:
        def records(self, **kwargs: object) -> None:
            raise AssertionError("clicks were made for nothing")

    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        ClickBenchmark(simulator=SIMULATOR).run(DiscModel(), NeverAsked(), tmp_path / "file" / "a")
