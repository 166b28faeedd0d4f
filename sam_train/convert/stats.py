"""`sam-convert stats=PATH`: what shards hold, as a table, a file and a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sam_train.data.image_pairs import sa1b_source
from sam_train.ops.drawing import new_figure, save_figure
from sam_train.ops.files import write_atomically

QUANTILES = {"min": 0, "5%": 0.05, "median": 0.5, "95%": 0.95, "max": 1}
SMALL_PX, LARGE_PX = 32**2, 96**2
"""COCO's bounds of small, medium and large masks, in pixels of the original image."""


def stats(path: str | Sequence[str], out: Path) -> str:
    """Counts images and masks of shards or an unpacked folder, without decoding pixels.

    Writes `stats.json` and `stats.png`.

    Returns:
        The table.

    Raises:
        FileNotFoundError, ValueError: there are none.
    """
    source = sa1b_source(path=path, max_bad_fraction=1.0)
    sizes, counts, areas, shares = [], [], [], []
    for record in source.records(epoch=0, reader=0, num_readers=1, shuffle=False):
        height, width = record.size
        sizes.append((height, width))
        counts.append(len(record.annotations))
        own = [annotation.area for annotation in record.annotations]
        areas += own
        shares += [area / (height * width) for area in own]
    if not sizes:
        raise ValueError(f"{path}: none of its images can be read")
    columns = {
        "height, px": np.array(sizes)[:, 0],
        "width, px": np.array(sizes)[:, 1],
        "masks per image": np.array(counts),
        "mask area, px": np.array(areas),
        "mask area, % of the image": 100 * np.array(shares),
    }
    result = _summary(columns, np.array(areas))
    write_atomically(out / "stats.json", partial(_write_json, result))
    _plot(columns, out / "stats.png")
    return f"{_table(result)}\nSee {out}/stats.json and {out}/stats.png"


def _summary(columns: dict[str, np.ndarray], areas: np.ndarray) -> dict[str, Any]:
    return {
        "images": len(columns["height, px"]),
        "masks": len(areas),
        "images_without_masks": int((columns["masks per image"] == 0).sum()),
        "masks_by_size": {
            "small (< 32 x 32 px)": int((areas < SMALL_PX).sum()),
            "medium": int(((areas >= SMALL_PX) & (areas < LARGE_PX)).sum()),
            "large (>= 96 x 96 px)": int((areas >= LARGE_PX).sum()),
        },
        "quantiles": {
            name: {label: float(np.quantile(values, share)) for label, share in QUANTILES.items()}
            | {"mean": float(values.mean())}
            for name, values in columns.items()
            if len(values)
        },
    }


def _table(result: dict[str, Any]) -> str:
    labels = [*QUANTILES, "mean"]
    lines = [
        f"{result['images']} images, {result['masks']} masks; "
        f"{result['images_without_masks']} images without one",
        ", ".join(f"{count} {name}" for name, count in result["masks_by_size"].items()),
        f"{'':26}" + "".join(f"{label:>10}" for label in labels),
    ]
    lines += [
        f"{name:26}" + "".join(f"{values[label]:>10.4g}" for label in labels)
        for name, values in result["quantiles"].items()
    ]
    return "\n".join(lines)


def _plot(columns: dict[str, np.ndarray], path: Path) -> None:
    figure, axes = new_figure(2, 2, panel_in=(4.5, 3.0))
    axes[0, 0].scatter(columns["width, px"], columns["height, px"], s=8, alpha=0.4)
    axes[0, 0].set(title="sizes", xlabel="width, px", ylabel="height, px")
    axes[0, 1].hist(columns["masks per image"], bins=30)
    axes[0, 1].set(title="masks per image", xlabel="masks per image", ylabel="images")
    plots = (
        (axes[1, 0], "mask area, px"),
        (axes[1, 1], "mask area, % of the image"),
    )
    for plot, name in plots:
        values = columns[name][columns[name] > 0]
        plot.set(title=name, xlabel=name, ylabel="masks")
        if len(values):
            plot.hist(values, bins=_log_bins(values))
            plot.set_xscale("log")
    save_figure(path, figure)


def _log_bins(values: np.ndarray) -> np.ndarray:
    low, high = values.min(), values.max()
    return np.geomspace(low * 0.9, high * 1.1, 31)


def _write_json(content: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
