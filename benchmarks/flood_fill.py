"""Mean IoU of a flood fill by colour, from the first click of the evaluation, on any data set.

    python benchmarks/flood_fill.py                          # 100 synthetic scenes
    python benchmarks/flood_fill.py 'data/nuclei/val-*.tar'  # SA-1B shards

The best tolerance and range are chosen for the whole set with its ground truth in hand: the bar a
model has to clear. A row says what each tolerance reaches.
"""

from __future__ import annotations

import argparse
import itertools

from sam_train.data.sa1b import ShardSource
from sam_train.data.source import Source
from sam_train.data.synthetic import SyntheticSource
from sam_train.metrics.flood_fill import FloodFillScore, score_flood_fill


def report(title: str, score: FloodFillScore) -> str:
    """A table of one data set: a column for each kind of range, a row for each tolerance."""
    tolerances = sorted({tolerance for _, tolerance in score.table})
    kind = "fixed" if score.fixed_range else "floating"
    lines = [
        f"{title}: {score.num_images} images, {score.num_masks} masks",
        f"{'tolerance':>9}  {'fixed':>8}  {'floating':>8}",
        *(f"{t:>9}  {score.table[True, t]:8.3f}  {score.table[False, t]:8.3f}" for t in tolerances),
        f"best: mean IoU {score.mean_iou:.3f} at tolerance {score.tolerance}, {kind} range",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", nargs="*", help="shards; none: synthetic scenes")
    parser.add_argument("--images", type=int, default=100, help="look at no more than these")
    parser.add_argument("--size", type=int, default=256, help="side of synthetic scenes, in pixels")
    parser.add_argument("--seed", type=int, default=0, help="of synthetic scenes")
    arguments = parser.parse_args()
    sources: dict[str, Source] = {path: ShardSource(path=path) for path in arguments.path} or {
        "synthetic scenes": SyntheticSource(
            num_scenes=arguments.images, size=arguments.size, seed=arguments.seed, split="val"
        )
    }
    for title, source in sources.items():
        records = source.records(epoch=0, reader=0, num_readers=1, shuffle=False)
        print(report(title, score_flood_fill(itertools.islice(records, arguments.images))))


if __name__ == "__main__":
    main()
