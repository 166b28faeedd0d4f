"""Random, best and worst masks of a round, to be shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from data_engine.mask_sample import SampledImage, SampledMask
from data_engine.records import Review, Rle

MAX_OF_ONE_IMAGE = 2


class Example(NamedTuple):
    """A mask to be shown.

    Attributes:
        image_id: of its image.
        rle: the mask.
        goodness: the larger, the better it is; of examples of one kind alone.
        caption: what that follows from.
        after: what an annotator made of it; None where that is nothing, or nobody looked.
    """

    image_id: str
    rle: Rle
    goodness: tuple[float, ...]
    caption: str
    after: Rle | None = None


class Examples(NamedTuple):
    """What is shown of a round.

    Attributes:
        random, best, worst: masks.
        measure: by what they are better or worse.
    """

    random: Sequence[Example]
    best: Sequence[Example]
    worst: Sequence[Example]
    measure: str

    def all(self) -> Iterator[Example]:
        """All of them."""
        yield from (*self.random, *self.best, *self.worst)


def choose_examples(
    images: Sequence[SampledImage], reviews: Sequence[Review], number: int, *, seed: int
) -> Examples:
    """Chooses masks: by their audit where there was one, else as sure as the model was or as costly as they were.

    Args:
        images: of the round.
        reviews: of its masks.
        number: of each kind.
        seed: of the draw, and of the order of equals.
    """
    found, measure = _examples(images, reviews)
    order = np.random.default_rng(seed).permutation(len(found))
    shuffled = [found[place] for place in order]
    ranked = sorted(shuffled, key=lambda own: own.goodness, reverse=True)
    lowest = sorted(shuffled, key=lambda own: own.goodness)
    return Examples(shuffled[:number], _first(ranked, number), _first(lowest, number), measure)


def _examples(
    images: Sequence[SampledImage], reviews: Sequence[Review]
) -> tuple[list[Example], str]:
    if reviews:
        return [_reviewed(own) for own in reviews], "IoU before and after the audit"
    masks = [(image.image_id, own) for image in images for own in image.masks]
    if any(own.num_clicks or own.seconds for _, own in masks):
        return [_hand_made(*own) for own in masks], "clicks and seconds that they took"
    return [_sure(*own) for own in masks if own[1].predicted_iou is not None], "predicted IoU"


def _reviewed(review: Review) -> Example:
    caption = "struck out" if review.after is None else f"IoU {review.iou:.2f}"
    return Example(review.image_id, review.before, (review.iou,), caption, review.after)


def _hand_made(image_id: str, mask: SampledMask) -> Example:
    clicks = f"{mask.num_clicks} click{'s' * (mask.num_clicks != 1)}"
    caption = f"{clicks}, {mask.seconds:.0f} s"
    return Example(image_id, mask.rle, (-mask.num_clicks, -mask.seconds), caption)


def _sure(image_id: str, mask: SampledMask) -> Example:
    assert mask.predicted_iou is not None
    return Example(
        image_id, mask.rle, (mask.predicted_iou,), f"predicted IoU {mask.predicted_iou:.2f}"
    )


def _first(ranked: Sequence[Example], number: int) -> list[Example]:
    """The first ones, of many images rather than of one."""
    of_image: Counter[str] = Counter()
    chosen: list[Example] = []
    others: list[Example] = []
    for own in ranked:
        of_image[own.image_id] += 1
        (chosen if of_image[own.image_id] <= MAX_OF_ONE_IMAGE else others).append(own)
    return [*chosen, *others][:number]
