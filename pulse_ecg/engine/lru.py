"""What was used lately, up to a number of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Lru(Generic[K, V]):
    """Keeps the latest entries; :meth:`get` and :meth:`put` make an entry the latest.  Not thread-safe."""

    def __init__(self, *, max_bytes: int, max_entries: int) -> None:
        self._max_bytes = max_bytes
        self._max_entries = max_entries
        self._entries: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._bytes = 0

    def get(self, key: K) -> V | None:
        """The entry, or None."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def make_room(self, size: int) -> bool:
        """Drop the oldest entries until ``size`` bytes fit; False, and nothing dropped, if they never will."""
        if size > self._max_bytes:
            return False
        while self._bytes + size > self._max_bytes or len(self._entries) >= self._max_entries:
            _, (_, dropped) = self._entries.popitem(last=False)
            self._bytes -= dropped
        return True

    def put(self, key: K, value: V, *, size: int) -> None:
        """Add an entry of ``size`` bytes in place of the oldest ones; one larger than everything is not kept."""
        if key in self._entries:
            self._bytes -= self._entries.pop(key)[1]
        if self.make_room(size):
            self._entries[key] = (value, size)
            self._bytes += size

    def clear(self) -> None:
        """Drop everything."""
        self._entries.clear()
        self._bytes = 0

    @property
    def bytes(self) -> int:
        """Size of all entries."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._entries)
