"""The automatic stage: what it writes, what it makes of trouble, how workers share and go on."""

from __future__ import annotations

import io
import json
import logging
import resource
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from data_engine.filters import UselessModelError
from data_engine.image_shards import InputShardError
from data_engine.shard_claims import Share
from data_engine.shard_writer import ShardManifest, finished
from data_engine.stages.fully_automatic import AutomaticStage, Generated, generate
from sam_train import config
from sam_train.convert import check
from sam_train.convert.tar_writer import TarWriter
from sam_train.data.sa1b import ShardSource
from sam_train.data.source import UnusableSourceError
from sam_train.models.sam import Sam

Run = Callable[..., Generated]

# pycocotools 2.0.8 and NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture
def run(built_in_sam: Sam, stage_node: Callable[..., dict[str, Any]]) -> Run:
    """`run(shards, out, "preset.NAME=VALUE", ..., share=, round_number=)`: one worker."""

    def work(shards: Any, out: Path, *overrides: str, **arguments: Any) -> Generated:
        node = stage_node(*overrides)
        stage = config.instantiate(node)
        assert isinstance(stage, AutomaticStage)
        return stage.run(built_in_sam, shards, out, settings=node, **arguments)

    return work


def plain_samples(shard: Path) -> dict[str, tuple[bytes, dict[str, Any], list[np.ndarray]]]:
    """What a reader who knows SA-1B and nothing of this project gets from a shard."""
    parts: dict[str, dict[str, bytes]] = {}
    with tarfile.open(shard) as tar:
        for member in tar:
            key, suffix = member.name.split(".")
            file = tar.extractfile(member)
            assert file is not None
            parts.setdefault(key, {})[suffix] = file.read()
    samples = {}
    for key, files in parts.items():
        content = json.loads(files["json"])
        masks = [coco_mask.decode(own["segmentation"]) for own in content["annotations"]]
        image = np.asarray(Image.open(io.BytesIO(files["jpg"])))
        assert all(mask.shape == image.shape[:2] for mask in masks)
        samples[key] = files["jpg"], content, masks
    return samples


def same_files(one: Path, other: Path) -> bool:
    """Whether two folders of shards are equal, but for what the wall clock says."""

    def contents(folder: Path) -> dict[str, Any]:
        found: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
        for name in [name for name in found if name.endswith(".json")]:
            found[name] = json.loads(found[name])
            found[name].pop("wall_clock", None)
        return found

    return contents(one) == contents(other)


def manifest_of(shard: Path) -> ShardManifest:
    manifest = finished(shard, in_full=True)
    assert manifest is not None
    return manifest


@pytest.mark.parametrize("masks", [True, False])
def test_a_plain_reader_finds_the_images_untouched_with_signed_masks(
    tmp_path: Path, write_shard: Callable[..., Path], run: Run, masks: bool
) -> None:
    shard = write_shard(tmp_path / "in" / "a-000000.tar", masks=masks)

    done = run(str(shard), tmp_path / "out", round_number=4)

    got = plain_samples(tmp_path / "out" / "a-000000.tar")
    with tarfile.open(shard) as tar:
        images = {
            name[:-4]: tar.extractfile(name).read() for name in tar.getnames() if "jpg" in name
        }  # type: ignore[union-attr]
    assert {key: data for key, (data, _, _) in got.items()} == images
    annotations = [own for _, content, _ in got.values() for own in content["annotations"]]
    assert done.num_images == 3 and done.num_masks == len(annotations) > 0
    manifest = manifest_of(tmp_path / "out" / "a-000000.tar")
    for own in annotations:
        assert (own["source"], own["round"]) == ("automatic", 4)
        assert own["model"] == manifest.made_with["model"]
        assert {"predicted_iou", "stability_score", "point_coords", "crop_box"} <= own.keys()
    for _, content, found in got.values():
        assert [own["area"] for own in content["annotations"]] == [int(m.sum()) for m in found]
    if masks:  # the JSON that came says which image it is
        assert [content["image"]["image_id"] for _, content, _ in got.values()] == [
            1000,
            1001,
            1002,
        ]


def test_what_is_written_passes_the_check_and_loads_as_training_data(
    tmp_path: Path, write_shard: Callable[..., Path], run: Run
) -> None:
    for number in range(2):
        write_shard(tmp_path / "in" / f"a-{number:06}.tar", 2, first=10 * number)

    done = run(str(tmp_path / "in"), tmp_path / "out")

    said = check.check(str(tmp_path / "out"), tmp_path / "check", 0, 0)
    assert said.startswith(f"4 images, {done.num_masks} masks in 2 shards")
    assert "no fault" in said
    source = ShardSource(path=str(tmp_path / "out"))
    records = list(source.records(epoch=0, reader=0, num_readers=1, shuffle=False))
    assert sum(len(record.annotations) for record in records) == done.num_masks
    assert records[0].annotations[0].extra["source"] == "automatic"


def test_the_manifest_accounts_for_every_candidate(
    tmp_path: Path, write_shard: Callable[..., Path], run: Run
) -> None:
    run(str(write_shard(tmp_path / "in" / "a.tar")), tmp_path / "out")

    manifest = manifest_of(tmp_path / "out" / "a.tar")
    rejects = dict(manifest.rejects)
    assert rejects.pop("points") == 3 * 16
    assert rejects.pop("candidates") == sum(rejects.values()) == 3 * 16 * 3
    assert rejects["kept"] == manifest.masks
    assert manifest.input["bytes"] == (tmp_path / "in" / "a.tar").stat().st_size
    assert manifest.image_files == "untouched"


def test_workers_by_number_make_what_one_alone_makes(
    tmp_path: Path, write_shard: Callable[..., Path], run: Run
) -> None:
    for number in range(3):
        write_shard(tmp_path / "in" / f"a-{number:06}.tar", 1, first=number)
    shards = str(tmp_path / "in" / "a-{000000..000002}.tar")

    first = run(shards, tmp_path / "out", share=Share(worker=0, num_workers=2))
    second = run(shards, tmp_path / "out", share=Share(worker=1, num_workers=2))
    run(shards, tmp_path / "alone")

    assert (first.num_shards, first.num_open) == (2, 1)
    assert (second.num_shards, second.num_open) == (1, 0)
    assert same_files(tmp_path / "out", tmp_path / "alone")


class Leases:
    """Claims of one worker, among those of all in `owners`."""

    def __init__(self, owners: dict[str, str], own: str) -> None:
        self.owners, self.own = owners, own

    def claim(self, name: str) -> bool:
        return self.owners.setdefault(name, self.own) == self.own

    def release(self, name: str) -> None:
        assert self.owners.pop(name) == self.own


def test_a_shard_that_another_worker_claims_is_left_to_it(
    tmp_path: Path, write_shard: Callable[..., Path], run: Run
) -> None:
    for number in range(2):
        write_shard(tmp_path / "in" / f"a-{number:06}.tar", 1, first=number)
    owners = {"a-000000.tar": "other"}

    done = run(str(tmp_path / "in"), tmp_path / "out", share=Share(claims=Leases(owners, "me")))

    assert (done.num_shards, done.num_open) == (1, 1)
    assert owners == {"a-000000.tar": "other"}, "what was claimed is given back"
    assert not (tmp_path / "out" / "a-000000.tar").exists()


def test_only_what_is_missing_or_damaged_is_made_again(
    tmp_path: Path, write_shard: Callable[..., Path], run: Run
) -> None:
    for number in range(3):
        write_shard(tmp_path / "in" / f"a-{number:06}.tar", 1, first=number)
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(str(tmp_path / "in"), whole)
    run(str(tmp_path / "in"), out)
    kept = (out / "a-000000.tar").stat().st_mtime_ns
    (out / "a-000001.manifest.json").unlink()  # as after a kill between shard and manifest
    data = bytearray((out / "a-000002.tar").read_bytes())
    data[700] ^= 1
    (out / "a-000002.tar").write_bytes(data)  # same size, other content

    done = run(str(tmp_path / "in"), out)

    assert (done.num_shards, done.num_before) == (2, 1)
    assert (out / "a-000000.tar").stat().st_mtime_ns == kept
    assert same_files(out, whole)


def test_what_a_kill_left_half_written_is_cleared_away(
    tmp_path: Path, write_shard: Callable[..., Path], run: Run
) -> None:
    shard = write_shard(tmp_path / "in" / "a.tar", 1)
    out = tmp_path / "out"
    out.mkdir()
    for name in (".a.tar.0123.unfinished", ".a.manifest.json.x", ".generate.json.x"):
        (out / name).write_text("half")

    run(str(shard), out)

    assert sorted(path.name for path in out.iterdir()) == [
        *("a.manifest.json", "a.tar", "generate.json", "manifest.json")
    ]


def test_damaged_images_are_named_and_too_many_end_the_work(
    tmp_path: Path,
    write_shard: Callable[..., Path],
    run: Run,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shard = write_shard(tmp_path / "in" / "a.tar", 1)
    good = plain_samples(shard)
    tar = TarWriter(shard)
    for key, (data, _, _) in good.items():
        tar.add(key, {"jpg": data})
        tar.add(f"{key}_cut", {"jpg": data[:700]})
    tar.finish()

    with pytest.raises(UnusableSourceError, match="1 of 2 samples read are damaged .*a_0_cut"):
        run(str(shard), tmp_path / "out")
    with pytest.raises(UnusableSourceError):  # nor is it passed over by starting again
        run(str(shard), tmp_path / "out")
    with caplog.at_level(logging.WARNING):
        done = run(str(shard), tmp_path / "more", "stage.max_bad_fraction=0.5")

    assert done.num_damaged == 1
    assert "a_0_cut is damaged" in caplog.text
    (damaged,) = manifest_of(tmp_path / "more" / "a.tar").damaged
    assert damaged["name"] == "a_0_cut" and "cannot be decoded" in damaged["reason"]
    assert list(plain_samples(tmp_path / "more" / "a.tar")) == ["a_0"]


def test_a_shard_removed_meanwhile_is_named_the_rest_is_made_and_put_back_it_goes_on(
    tmp_path: Path, write_shard: Callable[..., Path], run: Run
) -> None:
    for number in range(3):
        write_shard(tmp_path / "in" / f"a-{number:06}.tar", 1, first=number)
    shards = str(tmp_path / "in" / "a-{000000..000002}.tar")
    run(shards, tmp_path / "whole")
    run(shards, tmp_path / "out", share=Share(worker=2, num_workers=3))
    gone = (tmp_path / "in" / "a-000001.tar").rename(tmp_path / "aside.tar")

    with pytest.raises(InputShardError, match=r"1 of 3 shards .* a-000001.tar is gone"):
        run(shards, tmp_path / "out")
    assert finished(tmp_path / "out" / "a-000000.tar")
    gone.rename(tmp_path / "in" / "a-000001.tar")
    done = run(shards, tmp_path / "out")

    assert (done.num_shards, done.num_before) == (1, 2)
    assert same_files(tmp_path / "out", tmp_path / "whole")


def test_a_shard_that_breaks_off_is_no_finished_one(
    tmp_path: Path, write_shard: Callable[..., Path], run: Run
) -> None:
    cut = write_shard(tmp_path / "in" / "a.tar", 2)
    write_shard(tmp_path / "in" / "b.tar", 1)
    cut.write_bytes(cut.read_bytes()[:-12_000])

    with pytest.raises(InputShardError, match=r"a\.tar: it breaks off at byte"):
        run(str(tmp_path / "in"), tmp_path / "out")

    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"b.tar", "b.manifest.json", "generate.json"}


def test_a_full_disk_is_said_and_leaves_nothing_half_written(
    tmp_path: Path, write_shard: Callable[..., Path], run: Run
) -> None:
    write_shard(tmp_path / "in" / "a.tar", 1)
    write_shard(tmp_path / "in" / "b.tar", 8)
    run(str(tmp_path / "in"), tmp_path / "whole")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = (tmp_path / "whole" / "a.tar").stat().st_size

    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))  # EFBIG, in the place of ENOSPC
    try:
        with pytest.raises(OSError, match="Finished shards are kept: mend that and start again"):
            run(str(tmp_path / "in"), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"a.tar", "a.manifest.json", "generate.json"}
    run(str(tmp_path / "in"), tmp_path / "out")
    assert same_files(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (
            ["preset.pred_iou_thresh=2"],
            "finds no mask in any of 2 images .* low predicted iou.*: lower",
        ),
        (["stage.limits.max_masks_per_image=1", "preset.pred_iou_thresh=0"], "more than 1 masks"),
    ],
)
def test_a_model_that_finds_nothing_or_everything_ends_the_work_early_and_may_be_mended(
    tmp_path: Path,
    write_shard: Callable[..., Path],
    run: Run,
    settings: list[str],
    complaint: str,
) -> None:
    shard = write_shard(tmp_path / "in" / "a.tar", 3)

    with pytest.raises(UselessModelError, match=complaint):
        run(str(shard), tmp_path / "out", *settings, "stage.limits.judged_after=2")

    assert [path.name for path in (tmp_path / "out").iterdir()] == ["generate.json"]
    assert run(str(shard), tmp_path / "out").num_images == 3, "other thresholds, the same folder"


def test_a_model_that_finds_nothing_in_few_images_is_told_at_the_end(
    tmp_path: Path, write_shard: Callable[..., Path], run: Run
) -> None:
    shard = write_shard(tmp_path / "in" / "a.tar", 2)

    for _ in range(2):
        with pytest.raises(UselessModelError, match="no mask in any of 2 images"):
            run(str(shard), tmp_path / "out", "preset.pred_iou_thresh=2")


def test_a_folder_of_other_thresholds_or_other_shards_is_refused(
    tmp_path: Path, write_shard: Callable[..., Path], run: Run
) -> None:
    write_shard(tmp_path / "in" / "a.tar", 1)
    run(str(tmp_path / "in"), tmp_path / "out")

    with pytest.raises(ValueError, match=r"pred_iou_thresh: 0.2 there, 0.5 here"):
        run(str(tmp_path / "in"), tmp_path / "out", "preset.pred_iou_thresh=0.5")
    write_shard(tmp_path / "in" / "b.tar", 1)
    with pytest.raises(ValueError, match=r"1 shards were added .* \(b\.tar\)"):
        run(str(tmp_path / "in"), tmp_path / "out")
    with pytest.raises(ValueError, match="holds the shards of images themselves"):
        run(str(tmp_path / "in"), tmp_path / "in")


def test_shards_of_one_name_are_told_apart_by_their_folders(
    tmp_path: Path, write_shard: Callable[..., Path], run: Run
) -> None:
    paths = [str(write_shard(tmp_path / name / "a.tar", 1)) for name in ("x", "y")]

    run(paths, tmp_path / "out")

    assert {path.name for path in (tmp_path / "out").glob("*.tar")} == {"x-a.tar", "y-a.tar"}


def darken(pixels: np.ndarray) -> np.ndarray:
    """A user's step: the left half black."""
    pixels[:, : pixels.shape[1] // 2] = 0
    return pixels


def crop(pixels: np.ndarray) -> np.ndarray:
    """A user's mistake."""
    return pixels[1:]


def test_what_a_user_s_step_hides_is_in_the_written_image_too(
    tmp_path: Path,
    write_shard: Callable[..., Path],
    built_in_sam: Sam,
    stage_node: Callable[..., dict[str, Any]],
) -> None:
    shard = write_shard(tmp_path / "in" / "a.tar", 2)
    node = stage_node()
    generator = config.instantiate(node).generator

    stage = AutomaticStage(generator=generator, before=darken)
    stage.run(built_in_sam, str(shard), tmp_path / "out", settings=node)

    for data, _, _ in plain_samples(tmp_path / "out" / "a.tar").values():
        pixels = np.asarray(Image.open(io.BytesIO(data)))
        assert pixels[:, :40].max() < 30 < pixels[:, 56:].max()
    assert manifest_of(tmp_path / "out" / "a.tar").image_files.endswith(".darken")
    with pytest.raises(ValueError, match=r"expected before to return .*\(95, 96, 3\) for a_0"):
        bad = AutomaticStage(generator=generator, before=crop)
        bad.run(built_in_sam, str(shard), tmp_path / "bad", settings=node)


def test_the_command_s_function_loads_the_model_and_says_what_was_done(
    tmp_path: Path,
    write_shard: Callable[..., Path],
    stage_node: Callable[..., dict[str, Any]],
) -> None:
    shard = write_shard(tmp_path / "in" / "a.tar", 1)

    done = generate(
        stage_node(),
        checkpoint="sam_tiny",
        shards=str(shard),
        out=tmp_path / "out",
        device="cpu",
    )

    assert str(done).startswith("1 images, ") and "sam-convert check=" in str(done)


@pytest.mark.slow
@pytest.mark.timeout(6000)
@pytest.mark.parametrize(
    ("kills", "at_least", "num_shards"),
    [(5, 2, 6), pytest.param(30, 20, 12, marks=pytest.mark.evidence)],
)
def test_killed_at_random_moments_it_ends_with_the_files_of_an_undisturbed_run(
    tmp_path: Path,
    write_shard: Callable[..., Path],
    kills: int,
    at_least: int,
    num_shards: int,
) -> None:
    for number in range(num_shards):
        write_shard(tmp_path / "in" / f"a-{number:06}.tar", 3, first=3 * number)
    script = str(Path(__file__).with_name("kill_workers.py"))

    hits = {}
    for name, times in (("killed", kills), ("whole", 0)):
        command = [sys.executable, script, str(tmp_path / "in"), str(tmp_path / name)]
        done = subprocess.run([*command, str(times), "0"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        hits[name] = int(done.stdout)

    assert hits["killed"] >= at_least
    assert len(list((tmp_path / "whole").glob("*.tar"))) == num_shards
    assert same_files(tmp_path / "killed", tmp_path / "whole")
