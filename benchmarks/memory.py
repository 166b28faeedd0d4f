"""Peak memory of a training step against masks, passes and size, with and without what bounds it.

    OMP_NUM_THREADS=1 python benchmarks/memory.py > docs/memory_table.md

Each row trains two real steps in a process of its own on one image and tells by how much the process
grew from before the first step to its peak.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from itertools import product

SETTINGS = {
    "as it is": [],
    "checkpoint_passes": ["task.checkpoint_passes=true"],
    "mask_chunk=16": ["task.mask_chunk=16"],
}
MIB = 2**20


def measure(img_size: int, num_masks: int, num_passes: int, overrides: list[str]) -> float:
    """Bytes that a step adds to a process that holds the model and its optimiser's state."""
    import torch

    from sam_train import config
    from sam_train.structures import ImageBatch

    cfg = config.compose(
        "train",
        [
            "model=sam_vit_b",
            "model.image_encoder.depth=4",
            "model.image_encoder.global_attn_indexes=[1,3]",
            f"model.image_encoder.img_size={img_size}",
            "prompts=few",
            f"prompts.num_corrections={num_passes - 1}",
            *overrides,
        ],
    )
    torch.manual_seed(0)
    training = config.instantiate(cfg.task)
    training.log = training.log_dict = lambda *args, **settings: None
    side = training.model.low_res_size
    masks = torch.zeros(num_masks, side, side, dtype=torch.bool)
    masks[:, side // 4 : side // 2, side // 4 : side // 2] = True
    batch = ImageBatch(
        images=torch.randint(0, 255, (1, 3, img_size, img_size), dtype=torch.uint8),
        input_sizes=torch.tensor([[img_size, img_size]]),
        masks=masks,
        boxes=torch.tensor([[img_size / 4, img_size / 4, img_size / 2, img_size / 2]]).repeat(
            num_masks, 1
        ),
        image_index=torch.zeros(num_masks, dtype=torch.long),
        keys=("made",),
        seeds=(1,),
    )
    before = resident_bytes()
    training._loss(batch).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def resident_bytes() -> int:
    """What the process holds now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--masks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--passes", type=int, nargs="+", default=[1, 4, 11])
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        size, masks, passes, name = args.one
        print(measure(int(size), int(masks), int(passes), SETTINGS[name]))
        return
    print("| input px | masks | passes | " + " | ".join(f"{name}, MiB" for name in SETTINGS) + " |")
    print("|" + "---|" * (3 + len(SETTINGS)))
    for row in product(args.sizes, args.masks, args.passes):
        cells = []
        for name in SETTINGS:
            command = [sys.executable, __file__, "--one", *map(str, row), name]
            found = subprocess.run(command, capture_output=True, text=True, check=False)
            last = found.stdout.strip().splitlines()[-1:] if found.returncode == 0 else []
            cells.append(f"{float(last[0]) / MIB:,.0f}" if last else "failed")
        print("| " + " | ".join([*map(str, row), *cells]) + " |", flush=True)


if __name__ == "__main__":
    main()
