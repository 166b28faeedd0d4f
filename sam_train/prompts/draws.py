"""Random numbers for prompts that do not depend on how masks are batched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Constants of the splitmix64 generator (Steele, Lea and Flood 2014), as signed 64-bit integers.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def _shift_right(values: Tensor, bits: int) -> Tensor:
    """The logical shift that torch lacks: its own keeps the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _absorb(state: Tensor, values: Tensor) -> Tensor:
    """Stirs `values` into 64-bit hash states; integer overflow wraps, on every device alike."""
    state = state + (values + 1) * _GOLDEN
    state = (state ^ _shift_right(state, 30)) * _MIX_1
    state = (state ^ _shift_right(state, 27)) * _MIX_2
    return state ^ _shift_right(state, 31)


@dataclass
class PassDraws:
    """The numbers of one pass; each call goes on where the one before it stopped.

    Attributes:
        state: (P,) int64, one hash state per mask.
    """

    state: Tensor
    _num_drawn: int = 0

    def uniform(self, k: int) -> Tensor:
        """Returns (P, k) float64, uniform in [0, 1) with 53 random bits."""
        start = self._num_drawn
        self._num_drawn += k
        columns = torch.arange(start, self._num_drawn, device=self.state.device)
        bits = _absorb(self.state[:, None], columns[None])
        return _shift_right(bits, 11).double() * 2.0**-53

    def normal(self, k: int) -> Tensor:
        """Returns (P, k) float64, standard normal."""
        return torch.special.ndtri(self.uniform(k).clamp_min(2.0**-54))


@dataclass(frozen=True)
class PromptDraws:
    """Every random number the prompts of P masks need, as a hash of where it is used.

    A number depends on its image's seed, the mask's place within the image, the pass and its column:
    never on the other images of the batch, the rank or the device. One process and many thus give the
    same prompts, with no generator to keep per image and no loop.

    Attributes:
        state: (P,) int64, the seed of each mask's image with the mask's index stirred in.
    """

    state: Tensor

    @classmethod
    def from_seeds(
        cls,
        seeds: Sequence[int],
        counts: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> PromptDraws:
        """Seeds each image by itself.

        Args:
            seeds: one integer per image, of any size (64 bits of it count).
            counts: masks per image; P is their sum.
            device: where the numbers are wanted.
        """
        if len(seeds) != len(counts):
            raise ValueError(
                f"expected a seed per image, got {len(seeds)} for {len(counts)} images"
            )
        signed = [((seed + (1 << 63)) % (1 << 64)) - (1 << 63) for seed in seeds]
        image_seeds = [seed for seed, n in zip(signed, counts, strict=True) for _ in range(n)]
        mask_index = [i for n in counts for i in range(n)]
        state = torch.tensor([image_seeds, mask_index], dtype=torch.int64).to(device)
        return cls(_absorb(_absorb(torch.zeros_like(state[0]), state[0]), state[1]))

    @classmethod
    def from_generator(
        cls,
        generator: torch.Generator,
        counts: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> PromptDraws:
        """Draws the seeds of the images from `generator` (on its own device)."""
        seeds = torch.randint(
            1 << 62, (len(counts),), generator=generator, device=generator.device
        ).tolist()
        return cls.from_seeds(seeds, counts, device)

    def for_pass(self, index: int) -> PassDraws:
        """The numbers of the pass with this index."""
        return PassDraws(_absorb(self.state, torch.full_like(self.state, index)))

    def variant(self, index: int) -> PromptDraws:
        """Other draws for the same masks, as if their images had other seeds."""
        return PromptDraws(_absorb(self.state, torch.full_like(self.state, ~index)))

    def select(self, rows: Tensor) -> PromptDraws:
        """The draws of some of the masks: an index (n,) or a mask (P,)."""
        return PromptDraws(self.state[rows])
