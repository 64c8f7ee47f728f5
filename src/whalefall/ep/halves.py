"""Ep room: calls in two halves — the second is the caller's to run, once, in any order."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

from whalefall.errors import ConfigError, ShapeError

__all__ = ["Half", "Hooks"]


class Half:
    """The second half of a call, which runs once.

    Args:
        run: what it does.
    """

    def __init__(self, run: Callable[[], None]) -> None:
        self._run: Callable[[], None] | None = run
        self._error: BaseException | None = None

    @property
    def is_left(self) -> bool:
        """Whether it has still to run."""
        return self._run is not None

    def end(self) -> None:
        """Run it; from the second time on nothing happens, but that a failure is raised again."""
        run, self._run = self._run, None
        if run is None:
            if self._error is not None:
                raise self._error
            return
        try:
            run()
        except BaseException as error:
            self._error = error
            raise


class Hooks:
    """The calls of one fabric whose second half has not run; each keeps a slot of this rank's.

    Args:
        slots: of a stream.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._left: dict[int, tuple[weakref.ref[Any], Half]] = {}

    def leave(self, tick: int, hook: Any, half: Half) -> None:
        """Say that the call of this tick ends with `half`, which its caller runs by `hook`."""
        self._left[tick] = weakref.ref(hook), half

    def make_room(self, tick: int, where: str) -> None:
        """Have the slot of `tick` free of this rank's own calls; nothing has been said yet.

        A hook that nobody has any more is called here.

        Raises: ConfigError if the hook of the call that has the slot was not called.
        """
        if not self._left:
            return
        for its in [t for t, (_, half) in self._left.items() if not half.is_left]:
            del self._left[its]
        for its in [t for t in self._left if t <= tick - self._slots]:
            hook, half = self._left[its]
            if hook() is not None:
                raise ConfigError(
                    f"{where}: the hook of this rank's low-latency call {tick - its} before was "
                    f"not called, and {self._slots} may be under way; call it first"
                )
            with contextlib.suppress(ShapeError):  # of that call, which nobody asks for
                half.end()
            self._left.pop(its, None)
