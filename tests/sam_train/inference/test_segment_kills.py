"""sam-segment killed at some moments and started again ends with the files of an undisturbed run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam_train import cli
from sam_train.inference.segment_files import SegmentFiles
from sam_train.ops import rle
from sam_train.structures import Annotation

NUM_IMAGES = 24


class Corner:
    """Answers every image with its first pixels."""

    def segment(self, image: np.ndarray) -> list[Annotation]:
        mask = np.zeros(image.shape[:2], bool)
        mask[:5, :5] = True
        found = rle.encode(mask)
        return [Annotation(id=0, rle=found, bbox=rle.bbox(found), area=rle.area(found))]


@pytest.fixture
def images(tmp_path: Path, picture: Callable[[int, int], np.ndarray]) -> Path:
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for number in range(NUM_IMAGES):
        name = f"{'more/' if number % 2 else ''}{number:02}.png"
        Image.fromarray(picture(80 + number, 120)).save(folder / name)
    return folder


def contents(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def arguments(images: Path, out: Path) -> list[str]:
    return [f"images={images}", "mode=points", "points=[[60,40,1]]", f"out={out}"]


@pytest.mark.slow
@pytest.mark.timeout(900)  # four starts of a process that imports torch
def test_killed_and_started_again_it_ends_with_the_same_files(tmp_path: Path, images: Path) -> None:
    out, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-m", "sam_train.cli", "segment", *arguments(images, out)]
    before: dict[str, bytes] = {}
    for number in (1, 5, 11):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(out.glob("masks/**/*.json"))) < number:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()

        found = {name: data for name, data in contents(out).items() if name.endswith(".json")}
        assert number <= len(found) < NUM_IMAGES, "it was killed in the middle"
        for name, data in found.items():
            assert json.loads(data)["annotations"], "a JSON that is there is whole"
            assert (out / name.replace("masks", "overlays")).with_suffix(".jpg").is_file()
        assert before.items() <= found.items(), "what was finished is not done again"
        before = found

    assert cli.run("segment", arguments(images, out)) == 0
    assert cli.run("segment", arguments(images, whole)) == 0
    assert contents(out) == contents(whole)


def test_what_a_kill_left_half_written_is_no_result_and_is_cleared_away(
    tmp_path: Path, images: Path
) -> None:
    out = tmp_path / "out"
    # What write_atomically leaves where the process had no time to clear it away, and a picture cut short.
    for name in ("masks/.00.json.abc123", "masks/more/.01.json.x", "overlays/00.jpg"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text('{"image": {')

    done = SegmentFiles(images=str(images), out=out).run(Corner(), {"model": "a"})

    assert done.num_before == 0 and done.num_images == NUM_IMAGES
    assert not list(out.rglob(".*"))
    with Image.open(out / "overlays/00.jpg") as picture:
        picture.load()
