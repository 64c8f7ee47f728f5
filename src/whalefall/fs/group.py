"""File-system room: group commit — one thread makes everything that waits durable together.

A disk's flush costs the same for one writer as for many. Writers that were just answered tend to
come back at once, so the thread gives them a moment before it goes on without them; a writer that
is alone never waits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["GroupCommit"]
T = TypeVar("T")

# How long a group waits for the next writer, and for all of them.
GAP_S, GATHER_S = 0.0005, 0.004


class Waiter(Generic[T]):
    """One writer's work, and how it ended."""

    def __init__(self, work: T) -> None:
        self.work = work
        self.done = threading.Event()
        self.error: BaseException | None = None


class GroupCommit(Generic[T]):
    """Runs `commit` on the work of all writers that wait, in a thread of its own.

    Args:
        commit: makes a list of works durable; what it raises, all of these writers get.
    """

    def __init__(self, name: str, commit: Callable[[list[T]], None]) -> None:
        self._commit = commit
        self._waiting: list[Waiter[T]] = []
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: T) -> bool:
        """Return once the work is durable; False if this was closed before it came.

        Raises: what `commit` raised.
        """
        waiter = Waiter(work)
        with self._wake:
            if self._closed:
                return False
            self._waiting.append(waiter)
            self._wake.notify()
        waiter.done.wait()
        if waiter.error is not None:
            raise waiter.error
        return True

    def _run(self) -> None:
        expected = 1
        while group := self._gather(expected):
            error: BaseException | None = None
            try:
                self._commit([waiter.work for waiter in group])
            except Exception as failure:
                error = failure
            with self._wake:
                expected = len(group) + len(self._waiting)
            for waiter in group:
                waiter.error = error
                waiter.done.set()

    def _gather(self, expected: int) -> list[Waiter[T]]:
        """The next group: as many as are expected, or who came in time; none: closed."""
        with self._wake:
            while not self._waiting and not self._closed:
                self._wake.wait()
            end_s = time.monotonic() + GATHER_S
            while len(self._waiting) < expected and time.monotonic() < end_s:
                if self._closed or not self._wake.wait(GAP_S):
                    break
            group, self._waiting = self._waiting, []
        return group

    def close(self) -> None:
        """Commit what waits, then end."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()
