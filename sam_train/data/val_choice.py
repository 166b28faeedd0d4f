"""What is validated on: a share held out where no other images are given, and a choice of masks."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np

from sam_train.data.mixture import MixtureSource
from sam_train.data.source import HeldOut, Source, UnusableSourceError, readable, sample_seed
from sam_train.structures import ImageRecord

log = logging.getLogger(__name__)

HELD_OUT_SHARE = 0.1
"""Of the training images, validated on instead where no others are given."""


def choose_masks(
    source: Source, *, max_masks: int, max_masks_per_image: int, seed: int
) -> list[ImageRecord]:
    """A fixed choice of up to `max_masks` masks, spread over the images of a source.

    The same on every process, and no more of the source is read than is needed.
    """
    chosen: list[ImageRecord] = []
    missing = max_masks
    for record in readable(source.records(epoch=0, reader=0, num_readers=1, shuffle=True)):
        rng = np.random.default_rng(sample_seed(seed, 0, record.key))
        count = min(max_masks_per_image, missing)
        indices = np.sort(rng.permutation(len(record.annotations))[:count])
        if indices.size:
            annotations = tuple(record.annotations[index] for index in indices.tolist())
            chosen.append(replace(record, annotations=annotations))
            missing -= len(annotations)
        if missing == 0:
            break
    if not chosen:
        raise UnusableSourceError(f"there is no mask to validate on in {source}")
    return chosen


def hold_out(train: Source, val: Source, share: float = HELD_OUT_SHARE) -> tuple[Source, Source]:
    """The sources as they are, or, where they are the same images, each with its share of them.

    In a mixture that goes for each of its sources.
    """
    if isinstance(train, MixtureSource) and isinstance(val, MixtureSource):
        both = {
            name: hold_out(train.sources[name], source, share)
            for name, source in val.sources.items()
            if name in train.sources
        }
        rest, held = ({name: pair[i] for name, pair in both.items()} for i in (0, 1))
        return (
            replace(train, sources={**train.sources, **rest}),
            replace(val, sources={**val.sources, **held}),
        )
    if train != val:
        return train, val
    log.warning(
        "no other images%s are given to validate on: %.0f%% are held out of training",
        f" of {name}" if (name := getattr(train, "name", "")) else "",
        100 * share,
    )
    return (
        HeldOut(source=train, share=share, keep="rest"),
        HeldOut(source=train, share=share, keep="held_out"),
    )
