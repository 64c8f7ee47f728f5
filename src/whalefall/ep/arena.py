"""Ep room: memory for results, kept for the next call when the caller drops them.

Fresh memory from the kernel costs more than the copy into it (each 4 KiB page is cleared at its
first touch), so blocks are reused, as GPU allocators do. An array from `empty` gives its block
back when the last view of it is gone.
"""

from __future__ import annotations

import math
import mmap
import threading
import weakref
from typing import Any

import numpy as np

__all__ = ["Arena"]

SMALL_BYTES = 1 << 16  # below this numpy's own allocator is good enough
HUGE_BYTES = 1 << 21


class Arena:
    """A cache of memory blocks.

    Args:
        max_cached_bytes: how much may lie unused; more is given back to the system.
    """

    def __init__(self, max_cached_bytes: int = 1 << 30) -> None:
        self.max_cached_bytes = max_cached_bytes
        self.cached_bytes = 0
        self._free: dict[int, list[mmap.mmap]] = {}
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array with undefined contents, aligned to 64 bytes."""
        dtype = np.dtype(dtype)
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes < SMALL_BYTES:
            return np.empty(shape, dtype)
        size = _size_class(nbytes)
        block = self._take(size)
        owner = np.frombuffer(block, np.uint8)
        weakref.finalize(owner, self._give, size, block)
        return owner[:nbytes].view(dtype).reshape(shape)

    def _take(self, size: int) -> mmap.mmap:
        with self._lock:
            if blocks := self._free.get(size):
                self.cached_bytes -= size
                return blocks.pop()
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if size >= HUGE_BYTES:
            block.madvise(mmap.MADV_HUGEPAGE)
        return block

    def _give(self, size: int, block: mmap.mmap) -> None:
        with self._lock:
            if self.cached_bytes + size <= self.max_cached_bytes:
                self._free.setdefault(size, []).append(block)
                self.cached_bytes += size

    def clear(self) -> None:
        """Give all unused blocks back to the system."""
        with self._lock:
            self._free.clear()
            self.cached_bytes = 0


def _size_class(nbytes: int) -> int:
    # Eighths of a power of two, so that calls of about the same size share blocks.
    step = max(SMALL_BYTES, 1 << max(0, nbytes.bit_length() - 4))
    return -(-nbytes // step) * step
