"""`manifest.json` beside a conversion's shards: written last, told in a few lines, held against the shards."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sam_train.convert.tally import check_keys
from sam_train.convert.unit import Part, Unit, finished_parts, part_path
from sam_train.ops.files import write_atomically

MANIFEST = "manifest.json"


def put_in_place(
    units: Sequence[Unit], parts_folder: Path, out: Path, left_out: Mapping[str, Any]
) -> dict[str, Any]:
    """Gives finished shards their names, in the order of the units, and writes the manifest."""
    splits: dict[str, Any] = {}
    moves: list[tuple[Path, Path]] = []
    for split in dict.fromkeys(unit.split for unit in units):
        shards: list[dict[str, Any]] = []
        keys: Counter[str] = Counter()
        for unit in (unit for unit in units if unit.split == split):
            parts = finished_parts(parts_folder, unit)
            assert parts and parts[-1].is_last
            for number, part in enumerate(parts):
                if not part.keys:
                    continue
                name = f"{split}-{len(shards):06d}.tar"
                moves.append((part_path(parts_folder, unit, number, "tar"), out / name))
                shards.append(_entry(name, part))
                keys.update(part.keys)
        check_keys(keys)
        splits[split] = {
            "images": len(keys),
            "masks": sum(shard["masks"] for shard in shards),
            "shards": shards,
        }
    if not any(split["images"] for split in splits.values()):
        raise ValueError("there is no image with a mask in this data, so there is no shard")
    for old, new in moves:
        if old.is_file():  # else an earlier run got so far
            old.replace(new)
    manifest = {"splits": splits, **left_out}
    write_atomically(out / MANIFEST, partial(dump, manifest))
    return manifest


def summary(manifest: Mapping[str, Any], out: Path) -> str:
    """The manifest in a few lines."""
    lines = [
        f"{split}: {content['images']} images, {content['masks']} masks in "
        f"{len(content['shards'])} shards, {sum(s['bytes'] for s in content['shards']) / 2**20:.1f} MiB"
        for split, content in manifest["splits"].items()
    ]
    damaged = manifest["damaged"]
    lines.append(
        f"left out: {len(damaged)} damaged images, {manifest['images_without_masks']} without a mask, "
        f"{manifest['small_masks']} masks below min_area"
    )
    lines += [f"  {one['name']}: {one['reason']}" for one in damaged[:10]]
    if len(damaged) > 10:
        lines.append(f"  and {len(damaged) - 10} more, in manifest.json")
    return "\n".join([*lines, f"See {out / MANIFEST}; sam-convert check={out} verifies it"])


def _splits(folder: Path) -> dict[str, Any]:
    """The splits by the manifest in a folder, each with its `shards`; none if there is no such file."""
    try:
        splits = json.loads((folder / MANIFEST).read_text())["splits"]
        for split in splits.values():
            for entry in split["shards"]:
                entry["name"], entry["sha256"]  # else somebody else's
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return dict(splits)


def sums(folder: Path) -> dict[str, str]:
    """The shards' SHA-256 by the manifest beside them."""
    shards = [entry for split in _splits(folder).values() for entry in split["shards"]]
    return {entry["name"]: entry["sha256"] for entry in shards}


def manifest_faults(
    folder: Path, found: Mapping[str, tuple[int, int]]
) -> Iterator[tuple[str, str]]:
    """Shards that a folder's manifest names and that are gone, and splits of other totals than it states.

    Args:
        folder: of the manifest.
        found: numbers of images and masks, by the path of their shard.
    """
    counts = {Path(path): both for path, both in found.items()}
    for name, split in _splits(folder).items():
        paths = [folder / entry["name"] for entry in split["shards"]]
        absent = [path for path in paths if path not in counts]
        yield from ((str(path), "manifest.json names it, and it is absent") for path in absent)
        for number, what in enumerate(("images", "masks")):
            total = sum(counts[path][number] for path in paths if path in counts)
            if not absent and split.get(what, total) != total:
                reason = f"manifest.json states {split[what]} {what}, its shards hold {total}"
                yield f"{folder}: {name}", reason


def _entry(name: str, part: Part) -> dict[str, Any]:
    return {
        "name": name,
        "images": len(part.keys),
        "masks": part.num_masks,
        "bytes": part.num_bytes,
        "sha256": part.sha256,
    }


def dump(content: Any, path: Path) -> None:
    """Writes JSON."""
    path.write_text(json.dumps(content, indent=1) + "\n")
