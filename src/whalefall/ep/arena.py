"""Ep room: memory for results, kept for the next call when the caller drops them.

Fresh memory from the kernel costs more than the copy into it (each 4 KiB page is cleared at its
first touch), so blocks are reused, as GPU allocators do. An array from `empty` gives its block
back when the last view of it is gone; of the last few blocks the count of holders tells sooner
and cheaper whether they are free (`Recent`).
"""

from __future__ import annotations

import math
import mmap
import sys
import threading
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Arena", "Part", "Recent"]

SMALL_BYTES = 1 << 16  # below this numpy's own allocator is good enough
HUGE_BYTES = 1 << 21
RECENT_PARTS, RECENT_BYTES = 8, 1 << 30


@dataclass
class Part:
    """A piece of memory.

    Attributes:
        offset: where it begins in its arena, in bytes.
        nbytes: its size.
        memory: [nbytes] uint8; as long as a view of it lives, nobody else gets the piece.
    """

    offset: int
    nbytes: int
    memory: np.ndarray


def _holders(part: Part) -> int:
    return sys.getrefcount(part.memory)


_NOBODY = _holders(Part(0, 1, np.empty(1, np.uint8)))


class Recent:
    """The last few pieces; one that nobody holds any more is handed out again at once.

    Not safe for threads: its owner has a lock.
    """

    def __init__(self) -> None:
        self._parts: list[Part] = []

    def take(self, nbytes: int) -> Part | None:
        """A free piece of at least so many bytes, and not far more."""
        part = self.free(nbytes)
        return None if part is None else Part(part.offset, part.nbytes, part.memory[:])

    def free(self, nbytes: int) -> Part | None:
        """The same without a holder: it stays free until a view of its memory is made."""
        for part in self._parts:
            if nbytes <= part.nbytes <= 2 * nbytes + HUGE_BYTES and _holders(part) == _NOBODY:
                return part
        return None

    def add(self, part: Part) -> Part:
        """Remember a new piece; the same piece for its first user."""
        self.keep(part)
        return Part(part.offset, part.nbytes, part.memory[:])

    def keep(self, part: Part) -> None:
        """Remember a new piece."""
        self._parts.insert(0, part)
        while len(self._parts) > RECENT_PARTS or (
            len(self._parts) > 1 and sum(p.nbytes for p in self._parts) > RECENT_BYTES
        ):
            self._parts.pop()

    def clear(self) -> None:
        """Forget all pieces."""
        self._parts.clear()


class Arena:
    """A cache of memory blocks.

    Args:
        max_cached_bytes: how much may lie unused; more is given back to the system.
    """

    def __init__(self, max_cached_bytes: int = 1 << 30) -> None:
        self.max_cached_bytes = max_cached_bytes
        self.cached_bytes = 0
        self._free: dict[int, list[mmap.mmap]] = {}
        self._recent = Recent()
        self._lock = threading.Lock()
        # A finalizer may run anywhere, also inside `block`: it only notes what came back.
        self._returned: deque[tuple[int, mmap.mmap]] = deque()

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array with undefined contents, aligned to 64 bytes."""
        dtype = np.dtype(dtype)
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes < SMALL_BYTES:
            return np.empty(shape, dtype)
        return self.block(nbytes)[:nbytes].view(dtype).reshape(shape)

    def block(self, nbytes: int) -> np.ndarray:
        """Memory of at least so many bytes [≥ nbytes] uint8, aligned to a page."""
        with self._lock:
            if part := self._recent.take(nbytes):
                return part.memory
            size = _size_class(nbytes)
            self._gather()
            block = self._take(size)
            owner = np.frombuffer(block, np.uint8)
            weakref.finalize(owner, self._returned.append, (size, block)).atexit = False
            return self._recent.add(Part(0, size, owner)).memory

    def _take(self, size: int) -> mmap.mmap:
        if blocks := self._free.get(size):
            self.cached_bytes -= size
            return blocks.pop()
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if size >= HUGE_BYTES:
            block.madvise(mmap.MADV_HUGEPAGE)
        return block

    def _gather(self) -> None:
        while self._returned:
            size, block = self._returned.popleft()
            if self.cached_bytes + size <= self.max_cached_bytes:
                self._free.setdefault(size, []).append(block)
                self.cached_bytes += size

    def clear(self) -> None:
        """Give all unused blocks back to the system."""
        with self._lock:
            self._recent.clear()
            self._returned.clear()
            self._free.clear()
            self.cached_bytes = 0


def _size_class(nbytes: int) -> int:
    # Eighths of a power of two, so that calls of about the same size share blocks.
    step = max(SMALL_BYTES, 1 << max(0, nbytes.bit_length() - 4))
    return -(-nbytes // step) * step
