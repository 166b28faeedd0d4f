"""Claims in the store: how workers on several machines share what has a name, shards say."""

from __future__ import annotations

import time
from collections.abc import Callable

from data_engine.mask_store.store import Store


class StoreClaims:
    """One worker's claims.

    Args:
        store: that all the workers use.
        holder: the worker's name, no other's.
        clock: seconds since 1970, alike on all machines to within a fraction of `lease_s`.
        lease_s: how long a claim lives that is not made again.
    """

    def __init__(
        self,
        store: Store,
        holder: str,
        *,
        clock: Callable[[], float] = time.time,
        lease_s: float = 300.0,
    ) -> None:
        self.store = store
        self.holder = holder
        self.clock = clock
        self.lease_s = lease_s

    def claim(self, name: str) -> bool:
        """Takes something, or keeps it longer; False: it is another worker's."""
        return self.store.claim(name, self.holder, now=self.clock(), lease_s=self.lease_s)

    def release(self, name: str) -> None:
        """Gives it back; nothing happens where it is another's by now."""
        self.store.unclaim(name, self.holder)
