"""What a conversion left out, and whether that is too much."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from sam_train.convert.unit import Part
from sam_train.data.source import DamageTally, UnusableSourceError

log = logging.getLogger(__name__)


@dataclass
class Tally:
    """What was left out, and how many images were not.

    Attributes:
        kept_share: of the images read for "train" that are its own; where that is less than 1, "val" is
            read from the same files and meets the same damage.
        damaged: how often each name came with each reason, by split.
        keys: of the images, by split.
    """

    kept_share: float = 1
    num_images: int = 0
    num_small: int = 0
    num_empty: int = 0
    damaged: dict[str, Counter[tuple[str, str]]] = field(default_factory=dict)
    keys: dict[str, set[str]] = field(default_factory=dict)

    def add(self, part: Part) -> None:
        """Counts a finished shard; raises a ValueError if a name in it has come before."""
        known = self.keys.setdefault(part.split, set())
        check_keys(Counter(part.keys) + Counter(known.intersection(part.keys)))
        known.update(part.keys)
        self.num_images += len(part.keys)
        self.num_small += part.num_small
        self.num_empty += part.num_empty
        found = [(name, reason) for name, reason in part.damaged]
        self.damaged.setdefault(part.split, Counter()).update(found)

    def all_damaged(self) -> list[tuple[str, str]]:
        """Names and reasons, sorted; what two splits met in the same files counts once."""
        total: Counter[tuple[str, str]] = Counter()
        for counts in self.damaged.values():
            total = total | counts if self.kept_share < 1 else total + counts
        return sorted(total.elements())

    def left_out(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {
            "small_masks": self.num_small,
            "images_without_masks": self.num_empty,
            "damaged": [{"name": name, "reason": reason} for name, reason in self.all_damaged()],
        }


class Judge:
    """Says what is damaged, and ends the conversion when it is too much."""

    def __init__(self, max_bad_fraction: float, tally: Tally) -> None:
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction is in [0, 1], got {max_bad_fraction}")
        self.max_bad_fraction = max_bad_fraction
        self.tally = tally
        self.damaged = tally.all_damaged()

    @property
    def num_met(self) -> int:
        """Images that are in one of the splits, or damaged."""
        return self.tally.num_images + self.tally.num_empty + len(self.damaged)

    def add(self, part: Part) -> None:
        """Counts a finished shard, and says what is damaged in it."""
        before = Counter(self.damaged)
        self.tally.add(part)
        if part.damaged:
            self.damaged = self.tally.all_damaged()
            for name, reason in (Counter(self.damaged) - before).elements():
                log.warning("%s is damaged and left out: %s", name, reason)
        # Until "val" has been read, its images are not met, but what is damaged among them is.
        self._check(max(self.num_met / self.tally.kept_share, DamageTally.GRACE))

    def finish(self) -> None:
        """Judges the whole conversion."""
        self._check(self.num_met)

    def _check(self, num_met: float) -> None:
        if len(self.damaged) > self.max_bad_fraction * num_met:
            names = [name for name, _ in self.damaged]
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise UnusableSourceError(
                f"{len(names)} of {self.num_met} images are damaged ({shown}), more than "
                f"max_bad_fraction={self.max_bad_fraction} allows; each is named with its reason in the "
                "log. Mend the data, or raise max_bad_fraction and start again: what is done is kept"
            )


def check_keys(keys: Counter[str]) -> None:
    """Raises a ValueError where a name is that of several images."""
    if twice := [key for key, count in keys.items() if count > 1]:
        raise ValueError(
            f"{len(twice)} names are those of several images ({', '.join(twice[:5])}): with "
            "keys=numbered each image gets one of its own; choose another out=DIR for it"
        )
