"""Ep room: the original's event types, over the communication thread instead of CUDA streams.

A CPU has no streams: what a caller's thread has called is done when the call returns, so an event
recorded there is done at once; an event of an asynchronous call is done when the communication
thread has finished it.
Source: DeepEP `EventHandle`, `EventOverlap`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from whalefall.ep.worker import Event
from whalefall.errors import ConfigError

__all__ = ["EventHandle", "EventOverlap"]


class EventHandle:
    """A point in a thread's work; `EventHandle()` is here and now."""

    def __init__(self, event: Event | None = None) -> None:
        self._event = event

    def current_stream_wait(self) -> None:
        """Return when the point is passed.

        Raises: what the asynchronous call raised (RankFailure, …).
        """
        if self._event is not None:
            self._event.wait()

    def is_done(self) -> bool:
        """Whether the point is passed, without waiting."""
        return self._event is None or self._event.is_done()


class EventOverlap:
    """An event that a call returns; as a context manager it waits at the end.

    Args:
        event: None where the call was synchronous.
        extra_tensors: kept alive with the event.
    """

    def __init__(
        self, event: EventHandle | None = None, extra_tensors: tuple[Any, ...] | None = None
    ) -> None:
        self.event = event
        self.extra_tensors = extra_tensors
        self.hook_after_wait: Callable[[], Any] | None = None

    def current_stream_wait(self, release_handle: bool = False) -> None:
        """Wait for the event, then run the registered hook, once.

        Args:
            release_handle: forget the event afterwards.
        Raises: ConfigError if there is no event; what the asynchronous call raised.
        """
        if self.event is None:
            raise ConfigError("ep: event is None, wanted that of a call with async_finish=True")
        self.event.current_stream_wait()
        if self.hook_after_wait is not None:
            hook, self.hook_after_wait = self.hook_after_wait, None
            hook()
        if release_handle:
            self.event = None

    def register_hook_after_wait(self, hook_after_wait: Callable[[], Any]) -> None:
        """Have `hook_after_wait` called after the next wait.

        Raises: ConfigError if one is registered already.
        """
        if self.hook_after_wait is not None:
            raise ConfigError("ep: a hook is registered already; it runs at the next wait")
        self.hook_after_wait = hook_after_wait

    def __call__(self, release_handle: bool = False) -> EventOverlap:
        return self

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        if self.event is not None:
            self.current_stream_wait()
