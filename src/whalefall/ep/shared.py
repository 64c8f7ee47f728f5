"""Ep room: memory of this rank that its neighbours on the host see: they write a dispatch's rows
where the caller will read them, and read a combine's rows where the caller has left them.

A part is taken by `take` and comes back by itself when the last array over it is gone.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque

import numpy as np

from whalefall import comm
from whalefall.ep.arena import Part, Recent
from whalefall.errors import LimitError

__all__ = ["SharedArena"]

STEP = 1 << 16  # parts are multiples of it
MAX_IDLE_BYTES = 1 << 30  # more unused memory at the end goes back to the host


class SharedArena:
    """Pieces of one region, lowest address first; memory of the host is taken as it is needed.

    Args:
        region: where; address space only.
        offset: where the arena begins in it.
        nbytes: how much of it.
    """

    def __init__(self, region: comm.Region, offset: int, nbytes: int) -> None:
        self._region, self._first, self.nbytes = region, offset, nbytes
        self._base = np.frombuffer(region.view, np.uint8, nbytes, offset).ctypes.data
        self._holes = [(0, nbytes)]  # by offset, never touching each other
        self._recent, self._offers = Recent(), Recent()
        self._reserved = 0  # below this the host's memory is ours
        self._lock = threading.Lock()
        # A finalizer may run anywhere, also inside `take`: it only notes what came back.
        self._returned: deque[tuple[int, int]] = deque()

    def take(self, nbytes: int) -> Part | None:
        """A piece of at least so many bytes; None where neither space nor memory is left."""
        with self._lock:
            if part := self._recent.take(nbytes):
                return part
            new = self._new(nbytes)
            return None if new is None else self._recent.add(new)

    def offer(self, nbytes: int) -> Part | None:
        """A piece that neighbours may fill; it stays free until a view of its memory is made.

        So it is offered again where nothing came of it.
        """
        with self._lock:
            part = self._offers.free(nbytes)
            if part is None and (part := self._new(nbytes)):
                self._offers.keep(part)
            return part

    def _new(self, nbytes: int) -> Part | None:
        nbytes = -(-max(nbytes, 1) // STEP) * STEP
        self._gather()
        i = next((i for i, (_, room) in enumerate(self._holes) if room >= nbytes), None)
        if i is None or not self._reserve(self._holes[i][0] + nbytes):
            return None
        offset, room = self._holes[i]
        self._holes[i : i + 1] = [(offset + nbytes, room - nbytes)] if room > nbytes else []
        memory = np.frombuffer(self._region.view, np.uint8, nbytes, self._first + offset)
        weakref.finalize(memory, self._returned.append, (offset, nbytes)).atexit = False
        return Part(offset, nbytes, memory)

    def clear(self) -> None:
        """Let go of pieces that nobody uses; the region can be closed then."""
        with self._lock:
            self._recent.clear()
            self._offers.clear()

    def find(self, address: int, nbytes: int) -> int:
        """The offset of memory at this address, −1 if it is not all in here."""
        offset = address - self._base
        return offset if offset >= 0 and offset + nbytes <= self.nbytes else -1

    def _reserve(self, end: int) -> bool:
        if end > self._reserved:
            try:
                self._region.reserve(self._first + self._reserved, end - self._reserved)
            except LimitError:
                return False
            self._reserved = end
        return True

    def _gather(self) -> None:
        """Make holes of what came back; a large one at the end returns to the host."""
        if not self._returned:
            return
        holes = self._holes
        while self._returned:
            holes.append(self._returned.popleft())
        holes.sort()
        joined = holes[:1]
        for offset, room in holes[1:]:
            last, size = joined[-1]
            if last + size == offset:
                joined[-1] = (last, size + room)
            else:
                joined.append((offset, room))
        self._holes = joined
        begin = joined[-1][0]
        if self._reserved - begin > MAX_IDLE_BYTES:
            self._region.release(self._first + begin, self._reserved - begin)
            self._reserved = begin
