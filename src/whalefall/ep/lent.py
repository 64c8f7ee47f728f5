"""Ep room: the slot that a caller fills before it combines (zero-copy), and for which call."""

from __future__ import annotations

import weakref

from whalefall.errors import ConfigError

__all__ = ["Lent"]


class Lent:
    """The memory of one rank's next slot, while a caller has it: good for one tick, one handle."""

    def __init__(self) -> None:
        self._serial = self._tick = -1
        self._memory: list[weakref.ref[memoryview]] = []

    def lend(self, serial: int, tick: int, memory: memoryview) -> None:
        """The slot of `tick` is for the rows of the dispatch `serial`; twice is as good as once.

        Args:
            memory: what the caller's tensor is made of; it lives as long as that.
        Raises: ConfigError while the caller has it for another dispatch.
        """
        if (serial, tick) != (self._serial, self._tick):
            if tick == self._tick and any(lent() is not None for lent in self._memory):
                raise ConfigError(
                    "get_next_low_latency_combine_buffer: another handle has the buffer; combine "
                    "that one first, or drop its tensor"
                )
            self._serial, self._tick, self._memory = serial, tick, []
        self._memory.append(weakref.ref(memory))

    def check(self, serial: int, tick: int) -> None:
        """Raise ConfigError unless the slot of `tick` was lent for the dispatch `serial`."""
        if (serial, tick) != (self._serial, self._tick):
            raise ConfigError(
                "low_latency_combine: zero_copy=True, but its buffer was not taken for this "
                "handle, or another low-latency call came after that and took its memory; take "
                "get_next_low_latency_combine_buffer right before this call, and fill it again"
            )
