"""How workers, on one or many machines, share shards without one that tells them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

RENEW_S = 30.0
"""A worker asks so often for the shard that it has."""


class ShardClaims(Protocol):
    """Gives each shard to one worker at a time, for as long as that asks for it."""

    def claim(self, name: str) -> bool:
        """Takes a shard, or keeps it longer; False: it is another worker's."""
        ...

    def release(self, name: str) -> None:
        """Gives back a shard that was claimed, whether it is finished or not."""
        ...


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which shards a worker takes: every `num_workers`-th, of these what it can claim.

    Attributes:
        worker, num_workers: its number, from 0, and how many there are; as in a job array.
        claims: asked before each shard, and every `RENEW_S` seconds.
    """

    worker: int = 0
    num_workers: int = 1
    claims: ShardClaims | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.worker < self.num_workers:
            raise ValueError(
                f"worker is from 0 to num_workers - 1, got {self.worker} of {self.num_workers}"
            )

    def claim(self, name: str) -> bool:
        """Takes a shard, or keeps it longer."""
        return self.claims is None or self.claims.claim(name)

    def release(self, name: str) -> None:
        """Gives it back."""
        if self.claims is not None:
            self.claims.release(name)
