"""What the verbs do to an engine that has labelled images by people and by the model."""

from __future__ import annotations

import json
import multiprocessing
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import PIL.Image
import pytest
import torch

from data_engine.engine import Engine
from data_engine.records import DrawnMask, Submission
from data_engine.round_parts import _own_name
from data_engine.rounds import PARTS
from data_engine.shard_writer import manifest_path
from sam_train.checkpoints.load import load_model
from sam_train.data.sa1b import ShardSource
from sam_train.ops import rle

sys.path.insert(0, str(Path(__file__).parent))
import toy_engine
from toy_engine import call, keys_at, keys_of, simulated

Begin = Callable[..., Path]


def test_a_round_s_parts_may_all_be_done_again(labelled: Engine) -> None:
    """As after a kill between a part and the note that it is done."""
    before = labelled.store.contents()
    shards = {path: path.read_bytes() for path in labelled.root.glob("rounds/*/shards/*.tar")}
    last = labelled.store.rounds()[-1]
    for state in PARTS[last.stage]:
        labelled.store.put_round(replace(last, state=state))
        assert call("round", f"root={labelled.root}") == 0

    assert labelled.store.contents() == before
    assert {path: path.read_bytes() for path in shards} == shards
    assert all(manifest_path(path).is_file() for path in shards)


def test_an_automatic_shard_that_goes_before_the_store_knows_of_it_is_not_forgotten(
    labelled: Engine, refused: Callable[..., str]
) -> None:
    root = labelled.root
    path = min(root.glob("rounds/002/shards/*.tar"))
    content = path.read_bytes()
    path.unlink()
    last = labelled.store.rounds()[-1]
    labelled.store.put_round(replace(last, state="shards"))
    assert f"{path} is gone or damaged" in refused("round", f"root={root}")

    labelled.store.put_round(replace(last, state="images"))  # its inputs come again
    assert call("round", f"root={root}") == 0

    assert path.read_bytes() == content


def test_images_that_come_after_models_were_measured_are_all_labelled(
    labelled: Engine, tmp_path: Path
) -> None:
    held_out = labelled.store.num_images(held_out=True)
    for number in range(8):
        picture = np.random.default_rng(number).integers(0, 255, (48, 64, 3), np.uint8)
        PIL.Image.fromarray(picture).save(tmp_path / f"{number}.png")

    assert call("register", f"root={labelled.root}", f"images={tmp_path}/*.png") == 0

    assert labelled.store.num_images(held_out=True) == held_out
    assert labelled.store.num_images(held_out=False) == 10 - held_out + 8


def test_class_labels_travel_with_the_masks_and_every_file_says_where_it_is_from(
    begin: Begin,
) -> None:
    root = begin("{stage: assisted, num_images: 1}", overrides=["labels=[cell,debris]"])
    assert call("round", f"root={root}") == 0
    engine = Engine.open(root)
    task = engine.desk.next_task("anna")
    assert task is not None
    mask = np.zeros(engine.store.image(task.image_id).size, bool)
    mask[8:40, 8:40] = True
    drawn = DrawnMask(rle=rle.encode(mask), label="cell")
    sent = Submission(submission_id="s", task_id=task.id, version=task.version, masks=(drawn,))
    engine.desk.submit(sent, "anna")

    assert call("round", f"root={root}") == 0

    (path,) = root.glob("rounds/001/shards/*.tar")
    ((record),) = ShardSource(path=str(path)).records(
        epoch=0, reader=0, num_readers=1, shuffle=False
    )
    assert record.annotations[0].extra["label"] == "cell"
    first, trained = engine.models()
    assert first.config["checkpoint"].endswith("toy.ckpt") and first.code_version
    kept = torch.load(root / trained.path, weights_only=True)["lineage"]
    assert kept["parent"] == first.id and kept["round"] == 1
    assert kept["trained_on"] == ["rounds/001/shards/assisted-000000.tar"]
    assert kept["data_fingerprint"] == trained.data_fingerprint
    assert kept["config"] == trained.config and kept["code_version"] == trained.code_version
    assert str(root) not in json.dumps(kept)
    assert load_model(root / trained.path) is not None
    (round_,) = engine.store.rounds()
    assert round_.config["stage"]["move_on_after_s"] == 30


def test_a_training_goes_on_after_the_folder_was_moved(
    begin: Begin, refused: Callable[..., str], tmp_path: Path
) -> None:
    root = begin("{stage: assisted, num_images: 2}")
    assert simulated(root) == 0
    engine = Engine.open(root)
    before = engine.store.contents()
    engine.store.put_round(replace(engine.store.rounds()[0], state="training"))
    engine.close()
    (root / "rounds/001/training_sam/metrics.json").unlink()  # as if it had been broken off
    moved = root.rename(tmp_path / "else where (2)")

    assert call("round", f"root={moved}") == 0

    engine = Engine.open(moved)
    assert engine.store.contents() == before
    engine.store.put_round(replace(engine.store.rounds()[0], state="training"))
    otherwise = "plan.steps=[{stage: assisted, num_images: 2, overrides: ['seed=3']}]"
    said = refused("round", f"root={moved}", otherwise)
    assert "holds a training that was begun otherwise" in said


def test_two_workers_of_one_number_do_not_take_each_other_s_shards(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    held, done, names = context.Event(), context.Event(), context.SimpleQueue()
    other = context.Process(target=hold_name, args=(tmp_path / "workers", names, held, done))
    other.start()
    held.wait()

    with _own_name(tmp_path / "workers", 0) as name:
        assert name != names.get()

    done.set()
    other.join()
    with _own_name(tmp_path / "workers", 0) as again:
        assert again != name


def hold_name(folder: Path, names: Any, held: Any, done: Any) -> None:
    with _own_name(folder, 0) as name:
        names.put(name)
        held.set()
        done.wait(60)


def test_a_backup_is_a_store(labelled: Engine, tmp_path: Path) -> None:
    out = tmp_path / "copy.sqlite"

    assert call("backup", f"root={labelled.root}", f"out={out}") == 0

    copy = Engine.open(labelled.root, [f"store.url={out}"])
    assert copy.store.contents(wall_clock=True) == labelled.store.contents(wall_clock=True)
    copy.close()


def test_the_status_says_that_annotators_are_simulated(
    labelled: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("status", f"root={labelled.root}") == 0

    said = capsys.readouterr().out
    assert re.search(r"\d+ masks of simulated annotators", said)
    assert re.search(r"round 1 assisted: done; tasks \d+ done, by simulated annotators", said)


def test_what_was_made_is_copied_to_object_storage_and_kept_up_to_date(
    labelled: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = labelled.root, f"memory://{tmp_path.name}/engine"
    key = min(keys_of(min(root.glob("rounds/002/shards/*.tar"))))

    assert call("publish", f"root={root}", f"out={out}") == 0

    published = [str(path) for path in sorted(root.glob("rounds/*/shards/*.tar"))]
    there = ShardSource(path=f"{out}/rounds/*/shards/*.tar")
    assert [path.rpartition("/engine/")[2] for path in there.shards()] == [
        path.rpartition("/engine/")[2] for path in published
    ]
    assert keys_at(there) == keys_of(root)
    bucket = fsspec.filesystem("memory")
    assert bucket.exists(f"/{tmp_path.name}/engine/rounds/001/report.html")
    assert bucket.exists(f"/{tmp_path.name}/engine/models/first.ckpt")
    capsys.readouterr()
    assert call("publish", f"root={root}", f"out={out}") == 0
    assert "0 files copied" in capsys.readouterr().out
    assert call("remove", f"root={root}", f"image={key}", "reason=asked to") == 0
    assert call("publish", f"root={root}", f"out={out}") == 0
    assert keys_at(there) == keys_of(root) and key not in keys_of(root)


def test_an_audit_by_the_simulated_annotator_says_how_good_the_masks_are(
    labelled: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = "audit.pair=[anna,simulated-7]", "audit.num_pair_images=1"
    assert call("audit", f"root={labelled.root}", *toy_engine.ANNOTATOR, *pair) == 0

    said = capsys.readouterr().out
    assert "round 2: simulated: " in said and "over 0.90" in said
    assert "; 1 of " in said, "anna's task is hers: it waits, and nothing is refused"
    masks = sum(shard.num_masks for shard in labelled.store.shards(source="automatic"))
    assert len(labelled.store.reviews(round=2)) == masks > 0


def test_a_stores_password_may_stay_in_the_environment(
    begin: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINE_URL", str(tmp_path / "secret.sqlite"))
    root = begin(toy_engine.QUIET, overrides=["store.url=${oc.env:ENGINE_URL}"])
    assert (tmp_path / "secret.sqlite").exists() and call("status", f"root={root}") == 0
    assert not [path for path in root.rglob("*.yaml") if "secret" in path.read_text()]
