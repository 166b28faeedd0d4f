"""A simulated annotator with a given model on a real set: its pace, and how near its masks are to the truth.

    python benchmarks/simulated_annotator.py --data nuclei --images 10

Images are labelled from nothing (assisted), then once more with ready-made masks (semi-automatic) of the true
boxes of a share of the objects. Everything but the wall time follows from the seed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask

from data_engine.annotator_settings import AnnotatorSettings
from data_engine.image_finding import find_images
from data_engine.images import register
from data_engine.mask_store.store import Store, open_store
from data_engine.records import Image
from data_engine.simulated_annotator import SimulatedAnnotator, WorkDone
from data_engine.stages.assisted import assisted_tasks
from data_engine.stages.semi_automatic import semi_automatic_tasks
from data_engine.tasks import Desk
from data_engine.truth import known_truth
from sam_train import config
from sam_train.checkpoints.load import load_model
from sam_train.inference.predictor import SamPredictor
from sam_train.ops import rle
from sam_train.ops.boxes import xywh_to_xyxy
from sam_train.structures import DetectedBoxes


class SomeTrueBoxes:
    """Stands in for a good detector: the true boxes of a share of the objects."""

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, image: Image, pixels: np.ndarray, predictor: SamPredictor) -> DetectedBoxes:
        generator = np.random.default_rng(int(image.id[:8], 16))
        found = [rle.bbox(one) for one in known_truth(image) if generator.random() < self.share]
        boxes = xywh_to_xyxy(torch.tensor(found, dtype=torch.float).reshape(-1, 4))
        return DetectedBoxes(boxes, torch.ones(len(boxes)))


def measured(store: Store, round_number: int, done: WorkDone, wall_s: float) -> dict[str, Any]:
    """The figures of a round."""
    masks = list(store.masks(round=round_number))
    shown = {task.id: task.payload.get("masks", ()) for task in store.tasks(round=round_number)}
    ready = {(name, m["id"]): m["rle"]["counts"] for name, own in shown.items() for m in own}
    drawn = [m for m in masks if ready.get((m.task_id, m.corrects)) != m.rle["counts"]]
    events = [event.kind for own in store.submissions(round=round_number) for event in own.events]
    ious = np.array([_best_iou(store, mask) for mask in masks])
    return {
        "images": done.num_tasks,
        "masks": len(masks),
        "kept ready-made": len(masks) - len(drawn),
        "clicks a mask drawn": np.mean([m.num_clicks for m in drawn]),
        "seconds a mask drawn": np.mean([m.seconds for m in drawn]),
        "seconds an image": done.seconds / done.num_tasks,
        "seconds a mask, all in": done.seconds / len(masks),
        "left out": done.num_left_out,
        "given up": done.num_given_up,
        "strokes": events.count("brush") + events.count("eraser"),
        "undone": events.count("undo"),
        "mean IoU with the truth": ious.mean(),
        "over 0.90": (ious > 0.9).mean(),
        "over 0.75": (ious > 0.75).mean(),
        "wall s a mask": wall_s / len(masks),
    }


def _best_iou(store: Store, mask: Any) -> float:
    truth = [rle.compress(one) for one in known_truth(store.image(mask.image_id))]
    return float(coco_mask.iou([dict(mask.rle)], truth, [0] * len(truth)).max())


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """Both rounds."""
    shard = Path(config.data_root()) / arguments.data / "val-000000.tar"
    store = open_store(folder / "engine.sqlite", create=True)
    register(store, islice(find_images(str(shard)), arguments.images))
    images: Sequence[Image] = sorted(store.images(), key=lambda image: image.key)
    desk, predictor = Desk(store), SamPredictor(load_model(arguments.checkpoint))
    annotator = SimulatedAnnotator(
        desk, store, None, predictor, AnnotatorSettings(seed=arguments.seed)
    )
    found = {}
    desk.add_tasks(assisted_tasks(store, 1, images))
    start = time.perf_counter()
    done = annotator.work("assisted")
    found["assisted"] = measured(store, 1, done, time.perf_counter() - start)
    boxes = SomeTrueBoxes(arguments.share)
    desk.add_tasks(semi_automatic_tasks(store, 2, images, predictor=predictor, boxes=boxes))
    start = time.perf_counter()
    done = annotator.work("semi_automatic")
    found["semi_automatic"] = measured(store, 2, done, time.perf_counter() - start)
    store.close()
    return found


def main() -> None:
    """Prints a table, and writes it as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="nuclei")
    parser.add_argument("--images", type=int, default=10)
    parser.add_argument("--checkpoint", default="sam_tiny")
    parser.add_argument("--share", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run(arguments, Path(folder))
    for name in found["assisted"]:
        print(f"| {name} | " + " | ".join(f"{own[name]:.4g}" for own in found.values()) + " |")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2, default=float) + "\n")


if __name__ == "__main__":
    main()
