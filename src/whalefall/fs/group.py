"""File-system room: group commit — one thread makes everything that waits durable together.

A disk's flush costs the same for one writer as for many. Writers that were just answered tend to
come back at once, so the thread gives them a moment before it goes on without them: less than the
last group took, since waiting longer than a flush takes gains nothing. A writer that is alone never
waits. Work that nobody waits for goes with the next group, in its turn.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["GroupCommit"]
T = TypeVar("T")
log = logging.getLogger("whalefall.fs")

# How long a group waits for the next writer, and for all of them, at most; and in the time that
# the last group took to commit.
GAP_S, GATHER_S = 0.0005, 0.004
GAP_SHARE, GATHER_SHARE = 0.25, 1.0
# How long work that nobody waits for may lie before it makes a group of its own.
LEFT_S = 0.02


class Waiter(Generic[T]):
    """One writer's work, and how it ended.

    Args:
        then: nobody waits; this is called once the work is durable.
    """

    def __init__(self, work: T, then: Callable[[], None] | None = None) -> None:
        self.work, self.then = work, then
        self.error: BaseException | None = None
        self._done = threading.Lock()
        self._done.acquire()

    def wait(self) -> None:
        """Return once the work is done."""
        self._done.acquire()

    def finish(self, error: BaseException | None) -> None:
        """The work has ended so."""
        self.error = error
        self._done.release()


class GroupCommit(Generic[T]):
    """Runs `commit` on the work of all writers that wait, in a thread of its own.

    Args:
        commit: makes a list of works durable, in order; what it raises, all of these writers get.
    """

    def __init__(self, name: str, commit: Callable[[list[T]], None]) -> None:
        self._commit = commit
        self._queue: list[Waiter[T]] = []
        self._waiting = 0  # of the queue, those that somebody waits for
        self._left_s = 0.0  # when the queue's first work without a waiter came
        self._took_s = GATHER_S
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
            self._queue.append(waiter)
            self._waiting += 1
            self._wake.notify()
        waiter.wait()
        if waiter.error is not None:
            raise waiter.error
        return True

    def leave(self, work: T, then: Callable[[], None]) -> bool:
        """Return at once; the work becomes durable before any that is submitted later.

        If `commit` fails it is tried again with the next group, until `close`.

        Args:
            then: called in this object's thread once the work is durable.
        Returns: False if this was closed before it came.
        """
        with self._wake:
            if self._closed:
                return False
            if not self._queue:
                self._left_s = time.monotonic()
                self._wake.notify()
            self._queue.append(Waiter(work, then))
        return True

    def _run(self) -> None:
        expected = 1
        while group := self._gather(expected):
            error: BaseException | None = None
            began_s = time.monotonic()
            try:
                self._commit([waiter.work for waiter in group])
            except Exception as failure:
                error = failure
            self._took_s = time.monotonic() - began_s
            with self._wake:
                waited = sum(waiter.then is None for waiter in group)
                expected = waited + self._waiting
                if error is not None:
                    self._keep([waiter for waiter in group if waiter.then is not None], error)
            for waiter in group:
                if waiter.then is None:
                    waiter.finish(error)
                elif error is None:
                    waiter.then()

    def _keep(self, left: list[Waiter[T]], error: BaseException) -> None:
        """Put what nobody waits for back where it was, ahead of all that came since."""
        if self._closed:
            if left:
                log.error("fs: closed with %d records not written: %s", len(left), error)
            return
        self._queue[:0] = left
        self._left_s = time.monotonic()

    def _gather(self, expected: int) -> list[Waiter[T]]:
        """The next group: as many as are expected, or who came in time; none: closed."""
        with self._wake:
            while not self._waiting and not self._closed:
                rest_s = self._left_s + LEFT_S - time.monotonic() if self._queue else None
                if rest_s is not None and rest_s <= 0:
                    break
                self._wake.wait(rest_s)
            gap_s = min(GAP_S, GAP_SHARE * self._took_s)
            end_s = time.monotonic() + min(GATHER_S, GATHER_SHARE * self._took_s)
            while 0 < self._waiting < expected and time.monotonic() < end_s:
                if self._closed or not self._wake.wait(gap_s):
                    break
            group, self._queue, self._waiting = self._queue, [], 0
        return group

    def close(self) -> None:
        """Commit what waits, then end."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()
