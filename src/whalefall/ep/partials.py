"""Ep room: what another host sent back for this rank's tokens, until it is asked for."""

from __future__ import annotations

import threading
from typing import Any

__all__ = ["Partials"]


class Partials:
    """Blocks of one host by tick: hooks may be called in another order than the blocks come.

    Args:
        most: that wait here; who puts more waits.
        slots: of a stream: no block is asked for so many ticks after a later one.
    """

    def __init__(self, most: int, slots: int) -> None:
        self._most, self._slots = most, slots
        self._blocks: dict[int, Any] = {}
        self._changed = threading.Condition()
        self._closed = False

    def put(self, tick: int, block: Any) -> None:
        """Add the block of a tick, once there is room; or this is closed."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._blocks) < self._most or self._closed)
            self._blocks[tick] = block
            self._changed.notify_all()

    def take(self, tick: int, timeout_s: float) -> Any:
        """The block of a tick; None if it does not come in time."""
        with self._changed:
            for old in [t for t in self._blocks if t <= tick - self._slots]:
                del self._blocks[old]  # of a tick for which this host was masked
            self._changed.notify_all()
            self._changed.wait_for(lambda: tick in self._blocks, timeout_s)
            block = self._blocks.pop(tick, None)
            self._changed.notify_all()
            return block

    def close(self) -> None:
        """Nobody asks for blocks any more: whoever puts one goes on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def clear(self) -> None:
        """Drop all blocks, so that a host which is only masked can send on."""
        with self._changed:
            self._blocks.clear()
            self._changed.notify_all()
