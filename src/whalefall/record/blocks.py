"""Record room: memory for samples, used again once nobody holds a sample of it.

In: the sizes of a batch's samples. Out: one array a sample, and their addresses.
Fresh memory costs a page fault every 4 KiB, four times what reading and checking the bytes takes;
so blocks are kept, and one is given out again when no array refers to it any more.
"""

from __future__ import annotations

import sys
from collections import deque
from functools import lru_cache

import numpy as np

__all__ = ["allocate"]

# A batch up to this size gets memory of just its size, from the C library's own reuse.
_SMALL_BYTES = 64 << 10
# Samples share blocks of one of these sizes; a larger sample owns its memory.
_BLOCK_BYTES = [128 << 10, 256 << 10, 512 << 10, 1 << 20]
_KEPT_BYTES = 64 << 20
_TRIES = 8

_kept: dict[int, deque[np.ndarray]] = {size: deque() for size in _BLOCK_BYTES}
# a block that only `_take`'s own variable and getrefcount's argument refer to is free
_FREE = 2


def allocate(sizes: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """One uint8 array a sample, and where each begins ([n] uint64)."""
    lengths: list[int] = sizes.tolist()
    if (
        lengths
        and 0 < len(lengths) * lengths[0] <= _BLOCK_BYTES[-1]
        and (sizes == lengths[0]).all()
    ):
        return _allocate_equal(len(lengths), lengths[0])
    out: list[np.ndarray] = []
    where = np.empty(len(lengths), np.uint64)
    left = sum(lengths)
    first = 0
    while first < len(lengths):
        block = _block(left, lengths[first])
        base: int = block.__array_interface__["data"][0]
        room, at, i = len(block), 0, first
        while i < len(lengths) and at + lengths[i] <= room:
            where[i] = base + at
            out.append(block[at : at + lengths[i]])
            at += lengths[i]
            i += 1
        left -= at
        first = i
    return out, where


def _allocate_equal(count: int, size: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Samples of one size, in one block: numpy cuts rows faster than we cut pieces."""
    total = count * size
    block = _block(total, size)
    base: int = block.__array_interface__["data"][0]
    return list(block[:total].reshape(count, size)), np.uint64(base) + _steps(count, size)


@lru_cache(64)
def _steps(count: int, size: int) -> np.ndarray:
    return np.arange(count, dtype=np.uint64) * np.uint64(size)


def _block(left: int, sample: int) -> np.ndarray:
    """Memory for the next sample and those that fit behind it."""
    if left <= _SMALL_BYTES or sample > _BLOCK_BYTES[-1]:
        return np.empty(left if left <= _SMALL_BYTES else sample, np.uint8)
    return _take(next((size for size in _BLOCK_BYTES if size >= left), _BLOCK_BYTES[-1]))


def _take(size: int) -> np.ndarray:
    kept = _kept[size]
    for _ in range(min(_TRIES, len(kept))):
        try:
            block = kept.popleft()
        except IndexError:  # another thread took it
            break
        free = sys.getrefcount(block) == _FREE
        kept.append(block)
        if free:
            return block
    block = np.empty(size, np.uint8)
    if sum(bytes_ * len(blocks) for bytes_, blocks in _kept.items()) + size <= _KEPT_BYTES:
        kept.append(block)
    return block
