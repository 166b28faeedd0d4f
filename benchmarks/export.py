"""The ONNX files of models of real size: how far from torch, how large, how fast.

    python benchmarks/export.py                              # ViT-B and MobileSAM at 1024 px
    python benchmarks/export.py --model mobile_sam --out benchmarks/results

Random weights leave through `sam-export format=onnx`, which asks both files in onnxruntime 4 pictures and 22
prompts and refuses what is further from torch than 1e-3. Then torch and onnxruntime take turns in one process.
"""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import onnxruntime
import side_by_side
import torch
from torch import Tensor

from sam_train.checkpoints.build import build_model, model_config
from sam_train.checkpoints.load import load_model
from sam_train.checkpoints.save import save_official
from sam_train.export import onnx_check
from sam_train.export.onnx_modules import OnnxEncoder
from sam_train.models.sam import Sam
from sam_train.ops.coords import preprocess_shape
from sam_train.structures import ImageFeatures, Prompts

EXPORT = "import sys; from sam_train.cli import run; sys.exit(run('export', sys.argv[1:]))"


def save_random(name: str, path: Path) -> None:
    """A model of random weights, of which none stays at the zeros it starts from."""
    torch.manual_seed(0)
    model = build_model(model_config(name))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    save_official(model, path)


def export(checkpoint: Path, out: Path) -> tuple[str, str]:
    """Runs the command in a process of its own: its report, and what it took."""
    command = [f"checkpoint={checkpoint}", "format=onnx", f"out={out}"]
    process = subprocess.Popen(
        [sys.executable, "-c", EXPORT, *command], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    report = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"sam-export ended with exit code {process.returncode}")
    seconds = used.ru_utime + used.ru_stime
    return report, f"{seconds:.0f} s of CPU time, {used.ru_maxrss / 2**20:.1f} GiB at the peak"


def session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@torch.no_grad()
def timings(model: Sam, folder: Path, threads: int, repeats: int) -> list[list[str]]:
    """Rows of both halves: an image of the full input, and a click and its padding."""
    side = model.image_encoder.img_size
    image = 255 * torch.rand(1, 3, side, side)
    embeddings = model.image_encoder(model.preprocess(image))
    case = next(c for c in onnx_check.cases(model, seed=0) if not c.has_mask)
    prompts = Prompts(case.coords, case.labels)
    input_size = preprocess_shape(*case.original_size, side)

    def decode() -> Tensor:
        found = model.decode(ImageFeatures(embeddings), prompts, multimask_output=True)
        best = found.low_res_masks[:, :1]
        return model.postprocess_masks(best, input_size, case.original_size)

    halves = {
        "encoder": (
            lambda: model.image_encoder(model.preprocess(image)),
            {OnnxEncoder.INPUTS[0]: image},
        ),
        "decoder": (
            decode,
            case.inputs(embeddings),
        ),
    }
    rows = []
    for name, (in_torch, inputs) in halves.items():
        opened = session(folder / f"{name}.onnx", threads)
        runs = {"torch": in_torch, "onnx": partial(onnx_check.run, opened, inputs)}
        seconds = side_by_side.medians(runs, repeats)
        megabytes = (folder / f"{name}.onnx").stat().st_size / 1e6
        rows.append([name, f"{megabytes:.1f}", f"{seconds['torch']:.2f}", f"{seconds['onnx']:.2f}"])
    return rows


def measure(name: str, threads: int, repeats: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, out = Path(folder) / f"{name}.pth", Path(folder) / "onnx"
        save_random(name, checkpoint)
        report, cost = export(checkpoint, out)
        rows = timings(load_model(checkpoint), out, threads, repeats)
    checked = [line.strip() for line in report.splitlines() if ".onnx:" in line]
    header = ["half", "MB", "torch, s", "onnxruntime, s"]
    return "\n".join(
        [
            f"## {name}",
            "",
            f"The export: {cost}. Largest differences, relative to the model's largest number:",
            "",
            *(f"- {line}" for line in checked),
            "",
            side_by_side.table(header, rows),
            "",
        ]
    )


def main() -> None:
    parser = side_by_side.parser(__doc__.splitlines()[0], repeats=3)
    parser.add_argument("--model", nargs="+", default=["sam_vit_b", "mobile_sam"])
    arguments = parser.parse_args()
    side_by_side.settle(arguments.threads, "cpu")
    parts = [measure(name, arguments.threads, arguments.repeats) for name in arguments.model]
    head = [
        f"# ONNX files of real size, {datetime.date.today()}",
        "",
        f"`sam-export format=onnx`, random weights, {side_by_side.machine('cpu')}, onnxruntime "
        f"{onnxruntime.__version__}; medians of {arguments.repeats} runs. Encoder: an image of 1024 x 1024 px. "
        "Decoder: a box and its candidate of highest predicted IoU, at 1536 x 1536 px.",
        "",
    ]
    side_by_side.publish("\n".join([*head, *parts]), "export", arguments.out)


if __name__ == "__main__":
    main()
