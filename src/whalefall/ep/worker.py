"""Ep room: the communication thread — work in order, events that say when it is done."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

__all__ = ["Event", "Worker", "holding"]


class Event:
    """Done or not; an error of the work is raised to whoever waits.

    Attributes:
        took_ns: when the work began and ended, in `time.perf_counter_ns`.
    """

    def __init__(self) -> None:
        self._flag = threading.Event()
        self.took_ns = (0, 0)
        self._error: BaseException | None = None

    def finish(self, error: BaseException | None = None) -> None:
        """Mark as done."""
        self._error = error
        self._flag.set()

    def is_done(self) -> bool:
        """Whether the work has ended."""
        return self._flag.is_set()

    def wait(self) -> None:
        """Return when the work has ended.

        Raises: what the work raised.
        """
        self._flag.wait()
        if self._error is not None:
            raise self._error


class Worker:
    """One thread that runs calls in order; it starts with the first and sleeps between them."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Event] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._last: Event | None = None

    def submit(self, call: Callable[[], Any]) -> Event:
        """Run `call` after what was submitted before; returns at once."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        self._last = event = Event()
        self._calls.put((call, event))
        return event

    def drain(self) -> None:
        """Return when everything submitted so far has ended, well or not."""
        if self._last is not None:
            self._last._flag.wait()

    def close(self) -> None:
        """End the thread after what was submitted; also from a finalizer that runs in it."""
        if self._thread is not None:
            self._calls.put(None)
            if self._thread is not threading.current_thread():
                self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (item := self._calls.get()) is not None:
            call, event = item
            start = time.perf_counter_ns()
            try:
                call()
                event.took_ns = (start, time.perf_counter_ns())
                event.finish()
            except BaseException as error:
                event.finish(error)
            del call, event, item


def holding(call: Callable[[], None], _: object) -> None:
    """`call()`; a partial of it keeps alive what the call works in."""
    call()
