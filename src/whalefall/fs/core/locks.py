"""File-system room: chunk locks, first come first served, without threads of their own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable

__all__ = ["Locks"]


class Locks:
    """A FIFO lock per key; `acquire` calls `grant` once the key is held (at once, or later)."""

    def __init__(self) -> None:
        self._waiting: dict[Hashable, deque[Callable[[], None]]] = {}

    def acquire(self, key: Hashable, grant: Callable[[], None]) -> None:
        """Take `key`, or queue for it."""
        queue = self._waiting.get(key)
        if queue is None:
            self._waiting[key] = deque()
            grant()
        else:
            queue.append(grant)

    def release(self, key: Hashable) -> None:
        """Give `key` to the next in the queue."""
        queue = self._waiting[key]
        if queue:
            queue.popleft()()
        else:
            del self._waiting[key]

    def held(self) -> set[Hashable]:
        """The keys that somebody holds."""
        return set(self._waiting)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._waiting
