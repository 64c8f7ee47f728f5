"""Ep room: a thread that sends to another host, so that the rank itself goes on meanwhile."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable

from whalefall import comm
from whalefall.ep.library import KDEAD, KSILENT

__all__ = ["LOOK_S", "QUEUE", "Sender"]

QUEUE = 4  # blocks on their way between two threads
LOOK_S = 0.05  # how often a waiting thread looks whether the other host has failed


class Sender:
    """A thread that sends what is put into its bounded queue."""

    def __init__(
        self, channel: comm.Channel, name: str, timeout_s: float, failed: Callable[[int], None]
    ) -> None:
        self.channel, self._timeout_s, self._failed = channel, timeout_s, failed
        self.broken = False
        self._calls: queue.Queue[Callable[[comm.Channel], None] | None] = queue.Queue(QUEUE)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, call: Callable[[comm.Channel], None]) -> None:
        """Queue a call that sends; the other side has failed if it takes nothing for too long."""
        try:
            self._calls.put(call, timeout=self._timeout_s)
        except queue.Full:
            self.broken = True
            self._failed(KSILENT)

    def put_if_room(self, call: Callable[[comm.Channel], None]) -> None:
        """Queue a call, unless the other side is too far behind."""
        with contextlib.suppress(queue.Full):
            self._calls.put_nowait(call)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            if self.broken:
                continue
            try:
                call(self.channel)
            except (OSError, comm.CommError):
                self.broken = True
                time.sleep(LOOK_S)  # why it left may have come before; the one that receives reads
                self._failed(KDEAD)

    def close(self) -> None:
        """End after what is queued, and close the channel."""
        with contextlib.suppress(queue.Full):
            self._calls.put(None, timeout=5.0)
            self._thread.join(5.0)
        self.channel.close()
