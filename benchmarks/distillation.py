"""How near students are to their teacher and to the ground truth, on all validation images of a set.

    python benchmarks/distillation.py TEACHER.ckpt STUDENT.ckpt CONTROL.ckpt --data nuclei

A row each: the error of the image embedding in units of the teacher's mean square (0 equal, 1 as bad as
zeros), the same after the best linear map from the student's channels to the teacher's, mean IoU with
the teacher's masks for the same clicks and boxes, and with the ground truth. Any student that has been
trained by itself has an embedding of its own, in other axes than the teacher's; the linear map, fitted
on the images it is then measured on, asks only whether it holds the same.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sam_train import allocator, config
from sam_train.checkpoints.load import load_model
from sam_train.data.source import Source, readable
from sam_train.losses.distillation import embedding_errors
from sam_train.metrics.agreement import TaughtMetrics, teacher_agreement
from sam_train.metrics.click_rollout import EncodedImage, click_rollout
from sam_train.models.sam import Sam
from sam_train.ops.coords import cells_inside
from sam_train.prompts.simulator import PromptSimulator
from sam_train.structures import ImageRecord

COLUMNS = {
    "embedding_error": "embedding",
    "mapped_embedding_error": "mapped",
    "teacher_mean_iou@1": "teacher@1",
    "teacher_mean_iou@3": "teacher@3",
    "teacher_box_mean_iou": "teacher box",
    "mean_iou@1": "truth@1",
    "mean_iou@3": "truth@3",
    "box_mean_iou": "truth box",
}
RIDGE = 1e-4
"""Of the linear map, as a share of the mean square of the student's channels."""


def scores_of(
    student: Sam, teacher: Sam, records: Sequence[ImageRecord], simulator: PromptSimulator
) -> dict[str, float]:
    """The scores of one student on these images."""
    metrics = TaughtMetrics(simulator.num_corrections + 1)
    for record in records:
        agreement = teacher_agreement(student, teacher, record, simulator)
        metrics.update_taught(click_rollout(student, record, simulator), agreement)
    return metrics.compute() | {"mapped_embedding_error": mapped_error(student, teacher, records)}


@torch.inference_mode()
def mapped_error(student: Sam, teacher: Sam, records: Sequence[ImageRecord]) -> float:
    """The embedding error after the best affine map from the student's tokens to the teacher's."""
    pairs = [tokens(student, teacher, record) for record in records]
    moments = sum(x.T @ x for x, _ in pairs), sum(x.T @ y for x, y in pairs)
    ridge = RIDGE * moments[0].diagonal().mean() * torch.eye(len(moments[0]))
    linear_map = torch.linalg.solve(moments[0] + ridge, moments[1])
    out_chans = teacher.image_encoder.out_chans
    errors = [
        embedding_errors(
            (x @ linear_map).T[None, :, None],
            y.T[None, :, None],
            torch.ones(1, 1, len(x), dtype=torch.bool),
            out_chans=out_chans,
        )
        for x, y in pairs
    ]
    return float(torch.cat(errors).mean())


def tokens(student: Sam, teacher: Sam, record: ImageRecord) -> tuple[Tensor, Tensor]:
    """The tokens of one image that are not padding: (T, C + 1) with a constant, and (T, C')."""
    found = []
    for model in (student, teacher):
        image = EncodedImage.encode(model, record.image)
        embeddings = image.features.image_embeddings
        sizes = torch.tensor([image.input_size])
        stride = model.image_encoder.stride
        inside = cells_inside(sizes, embeddings.shape[-1], stride)[0]
        found.append(embeddings[0, :, inside].T.double())
    return torch.cat([found[0], torch.ones(len(found[0]), 1)], dim=1), found[1]


def report(rows: dict[str, dict[str, float]]) -> str:
    """A table, a row a model."""
    width = max(map(len, rows))
    lines = [f"{'':{width}}  {'params':>7}  " + "  ".join(f"{c:>11}" for c in COLUMNS.values())]
    for name, scores in rows.items():
        cells = "  ".join(f"{scores[column]:>11.3f}" for column in COLUMNS)
        lines.append(f"{name:{width}}  {scores['parameters'] / 1e6:>6.2f}M  {cells}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", help="checkpoint")
    parser.add_argument("students", nargs="+", help="checkpoints")
    parser.add_argument("--data", default="nuclei", help="a name of conf/data; its val is measured")
    parser.add_argument("--clicks", type=int, default=3, help="clicks on each object")
    parser.add_argument("--images", type=int, help="look at no more than these")
    parser.add_argument("--json", type=Path, help="write the scores here, too")
    arguments = parser.parse_args()
    allocator.keep_freed_memory()
    cfg = config.compose("eval", [f"data={arguments.data}", "checkpoint=none"])
    source: Source = config.instantiate(cfg.data.val)
    simulator = config.instantiate(cfg.protocol.simulator, num_corrections=arguments.clicks - 1)
    stream = readable(source.records(epoch=0, reader=0, num_readers=1, shuffle=False))
    records = list(itertools.islice(stream, arguments.images))
    teacher = load_model(arguments.teacher)
    rows = {}
    for path in (arguments.teacher, *arguments.students):
        student = load_model(path)
        rows[str(path)] = scores_of(student, teacher, records, simulator) | {
            "parameters": float(sum(p.numel() for p in student.parameters()))
        }
    masks = sum(len(record.annotations) for record in records)
    print(f"{arguments.data}, val: {len(records)} images, {masks} masks")
    print(report(rows))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
