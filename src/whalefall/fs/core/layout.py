"""File-system room: which chain holds which chunk of a file.

A file's stripe is a run of the chain table, shuffled after its first by a seed of the file's own;
chunk i lies on the stripe's chain i mod length. The shuffle is ours (splitmix64, Fisher-Yates): the
same everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

__all__ = ["chunk_id", "chunk_index", "chunk_prefix", "shuffled", "stripe"]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio
MAX_CHUNKS = 1 << 32


def _splitmix64(state: int) -> tuple[int, int]:
    state = (state + _GOLDEN) & _MASK
    z = state
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return state, z ^ (z >> 31)


def shuffled(items: Sequence[int], seed: int) -> list[int]:
    """The items in an order that only the seed decides."""
    order, state = list(items), seed & _MASK
    for last in range(len(order) - 1, 0, -1):
        state, value = _splitmix64(state)
        pick = value % (last + 1)
        order[last], order[pick] = order[pick], order[last]
    return order


def stripe(table: Sequence[int], width: int, number: int) -> tuple[int, ...]:
    """The chains of a new file's stripe; the file keeps them in its inode.

    The numbers of a server's files go up in steps, of two or of any other length. Multiples of the
    golden ratio lie evenly on the circle whatever the step, so the stripes' starts do too (Knuth,
    TAOCP 6.4).

    Args:
        table: all chains.
        width: how many the file is spread over.
        number: the file's number.
    """
    width = max(1, min(width, len(table)))
    start = ((number * _GOLDEN & _MASK) * len(table)) >> 64
    run = [table[(start + i) % len(table)] for i in range(width)]
    return (run[0], *shuffled(run[1:], number))  # a small file has no other than the first


@functools.lru_cache(1024)
def chunk_prefix(inode: int) -> bytes:
    """The first 12 bytes of all chunk ids of a file."""
    return b"\0\0" + inode.to_bytes(8, "big") + b"\0\0"


def chunk_id(inode: int, index: int) -> bytes:
    """The 16-byte id of a file's chunk: 0, 0, inode, track 0, index; big-endian."""
    return chunk_prefix(inode) + index.to_bytes(4, "big")


def chunk_index(chunk: bytes) -> int:
    """Which chunk of its file an id names."""
    return int.from_bytes(chunk[12:], "big")
