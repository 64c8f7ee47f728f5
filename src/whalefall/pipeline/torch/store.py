"""Pipeline room: weight gradients put aside, so that they can be computed later.

In: closures of a layer's backward. Out: they run when the schedule says W.
Source: DualPipe `WeightGradStore`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from whalefall.errors import ConfigError

__all__ = ["WeightGradStore"]


class WeightGradStore:
    """Class state, one per process: a layer's autograd function puts its weight gradient here.

    `enabled` is True only during a split backward. Layers that ignore it stay correct: their weight
    gradients are then computed with the input gradients, and W does nothing.
    """

    enabled: bool = False
    cache: list[Callable[[], None]] = []  # noqa: RUF012 - class state by design, as published
    funcs_queue: deque[list[Callable[[], None]]] = deque()  # noqa: RUF012

    @classmethod
    def put(cls, func: Callable[[], None]) -> None:
        """Put a weight gradient aside; only while `enabled`."""
        cls.cache.append(func)

    @classmethod
    def flush(cls) -> None:
        """Queue what was put since the last flush, even if that is nothing."""
        cls.funcs_queue.append(cls.cache)
        cls.cache = []

    @classmethod
    def pop(cls) -> None:
        """Compute the oldest queued weight gradients; ConfigError if there are none."""
        if not cls.funcs_queue:
            raise ConfigError("WeightGradStore.pop: the queue is empty; flush() comes first")
        for func in cls.funcs_queue.popleft():
            func()

    @classmethod
    def clear(cls) -> None:
        """Forget everything."""
        cls.cache = []
        cls.funcs_queue.clear()
