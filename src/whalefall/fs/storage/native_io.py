"""File-system room: the native half of the chunk engine, `native/chunkio.cpp`, GIL released."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from whalefall.fs.core.effects import Refused
from whalefall.fs.core.messages import Code
from whalefall.jit import Library, build

__all__ = ["BLOCK_BYTES", "CORRUPT", "address", "checksum", "read_batch", "write"]

BLOCK_BYTES = 64 << 10
CORRUPT = -100000
_POINTER, _LONG = ctypes.c_void_p, ctypes.c_int64


@functools.cache
def library() -> Library:
    """The compiled unit."""
    native = build(Path(__file__).parent / "native" / "chunkio.cpp")
    native.wf_fs_crc32c.argtypes = [_POINTER, _LONG]
    native.wf_fs_crc32c.restype = ctypes.c_uint32
    native.wf_fs_write.argtypes = [ctypes.c_int, _LONG, _POINTER, _LONG, _LONG, _POINTER, _POINTER]
    native.wf_fs_read.argtypes = [
        _LONG, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _LONG, _POINTER, _POINTER
    ]  # fmt: skip
    native.wf_fs_read.restype = None
    return native


def address(data: Any) -> tuple[int, int]:
    """Address and byte length of any contiguous buffer (which the caller keeps alive)."""
    view = np.frombuffer(data, np.uint8) if len(data) else np.empty(0, np.uint8)
    return view.ctypes.data, view.nbytes


def checksum(data: Any) -> int:
    """CRC-32C of a buffer."""
    start, size = address(data)
    return int(library().wf_fs_crc32c(start, size))


def write(fd: int, place: int, data: Any) -> tuple[bytes, int]:
    """Write a chunk's content.

    Args:
        fd: the file; -1: compute only.
        place: where in it.
    Returns: CRC-32C of each block (uint32s as bytes) and of the whole.
    Raises: Refused(NO_SPACE); OSError.
    """
    start, size = address(data)
    crcs = np.empty(-(-size // BLOCK_BYTES), np.uint32)
    whole = ctypes.c_uint32()
    code = library().wf_fs_write(
        fd, place, start, size, BLOCK_BYTES, crcs.ctypes.data, ctypes.addressof(whole)
    )
    if code in (errno.ENOSPC, errno.EDQUOT):
        raise Refused(Code.NO_SPACE, f"the disk is full ({os.strerror(code)})")
    if code:
        raise OSError(code, os.strerror(code))
    return crcs.tobytes(), whole.value


def read_batch(
    fds: Sequence[int], places: Sequence[int], sizes: Sequence[int], offsets: Sequence[int],
    lengths: Sequence[int], crcs: Sequence[bytes], outs: Sequence[int],
) -> list[int]:  # fmt: skip
    """Read pieces of chunks into memory, every touched block's checksum verified.

    Args:
        fds, places, sizes: per piece, the chunk's file, its place there, its length in bytes.
        offsets, lengths: the piece inside the chunk.
        crcs: the chunk's block checksums.
        outs: addresses to write to.
    Returns: per piece 0, -errno or CORRUPT.
    """
    count = len(fds)
    columns = np.array([places, sizes, offsets, lengths], np.int64)
    descriptors = np.array(fds, np.int32)
    targets = np.array(outs, np.uint64)
    sums = (ctypes.c_char_p * count)(*crcs)
    status = np.empty(count, np.int32)
    at = columns.ctypes.data
    step = columns.strides[0]
    library().wf_fs_read(
        count, descriptors.ctypes.data, at, at + step, at + 2 * step, at + 3 * step, sums,
        BLOCK_BYTES, targets.ctypes.data, status.ctypes.data,
    )  # fmt: skip
    return status.tolist()
