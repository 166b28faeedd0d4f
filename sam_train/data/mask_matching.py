"""Which mask files belong to which image, by their names."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple


class Match(NamedTuple):
    """Images with their masks.

    Attributes:
        owned: the mask files of each image, in the order of their names.
        alone: mask files of no image, or of which it cannot be told.
    """

    owned: Mapping[str, Sequence[str]]
    alone: Sequence[str]


def match_masks(images: Sequence[str], masks: Sequence[str], root: str) -> Match:
    """Matches paths by name, wherever they lie.

    A mask belongs to the image whose stem is its own; else to that whose stem is the name of a folder it
    lies in below `root`, the folder of all masks, the nearest first; else to that with the longest stem
    which its own begins with, if what follows is neither a letter nor a digit. Of several images of that
    stem, it is the one that shares most folder names with the mask.
    """
    by_stem: dict[str, list[str]] = defaultdict(list)
    for image in images:
        by_stem[Path(image).stem].append(image)
    owned: dict[str, list[str]] = {image: [] for image in images}
    alone = []
    for mask in masks:
        named = next((name for name in _names(Path(mask), root) if name in by_stem), None)
        owner = None if named is None else _nearest(Path(mask), by_stem[named])
        if owner is None:
            alone.append(mask)
        else:
            owned[owner].append(mask)
    return Match(owned, alone)


def _names(mask: Path, root: str) -> Iterator[str]:
    """The stems that an image of this mask may have, the likeliest first."""
    stem = mask.stem
    yield stem
    yield from reversed(mask.parent.relative_to(root).parts)
    yield from (stem[:end] for end in range(len(stem) - 1, 0, -1) if not stem[end].isalnum())


def _nearest(mask: Path, images: Sequence[str]) -> str | None:
    if len(images) == 1:
        return images[0]
    folders = Counter(mask.parent.parts)
    shared = [(folders & Counter(Path(image).parent.parts)).total() for image in images]
    best = max(shared)
    return images[shared.index(best)] if shared.count(best) == 1 else None


def unique_keys(root: str, paths: Sequence[str]) -> Iterator[str]:
    """A name for each file: its path from `root` without its suffix, or with it where that comes twice."""
    names = [Path(path).relative_to(root) for path in paths]
    stems = Counter(name.with_suffix("") for name in names)
    for name in names:
        yield (name if stems[name.with_suffix("")] > 1 else name.with_suffix("")).as_posix()
