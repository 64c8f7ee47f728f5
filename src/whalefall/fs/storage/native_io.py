"""File-system room: the native half of the chunk engine, `native/chunkio.cpp`, GIL released."""

from __future__ import annotations

import array
import ctypes
import errno
import functools
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from whalefall.comm.library import library as comm_library
from whalefall.fs.core.effects import Refused
from whalefall.fs.core.messages import Code
from whalefall.jit import Library, build

__all__ = ["BLOCK_BYTES", "CORRUPT", "address", "checksum", "content", "read_batch", "write"]

BLOCK_BYTES = 64 << 10
CORRUPT = -100000
_POINTER, _LONG = ctypes.c_void_p, ctypes.c_int64
_CONTENT = struct.Struct("<qqqQ")


@functools.cache
def library() -> Library:
    """The compiled unit, which takes its CRC-32C from comm's."""
    native = build(Path(__file__).parent / "native" / "chunkio.cpp")
    native.wf_fs_setup.argtypes = [_POINTER, _POINTER, ctypes.c_int]
    native.wf_fs_setup.restype = None
    native.wf_fs_write.argtypes = [
        ctypes.c_int, ctypes.c_int, _LONG, _POINTER, _LONG, _POINTER, _POINTER,
    ]  # fmt: skip
    native.wf_fs_read.argtypes = [_LONG, ctypes.c_char_p, _POINTER, _POINTER, _POINTER]
    native.wf_fs_read.restype = None
    comm = comm_library()
    crc, combine = (
        ctypes.cast(function, _POINTER) for function in (comm.wf_crc32c, comm.wf_crc_combine)
    )
    native.wf_fs_setup(crc, combine, comm.level == "any")
    return native


def address(data: Any) -> tuple[int, int]:
    """Address and byte length of any contiguous buffer (which the caller keeps alive)."""
    view = np.frombuffer(data, np.uint8) if len(data) else np.empty(0, np.uint8)
    return view.ctypes.data, view.nbytes


def checksum(data: Any) -> int:
    """CRC-32C of a buffer."""
    return write(-1, False, 0, data)[1]


def write(fd: int, direct: bool, place: int, data: Any) -> tuple[bytes, int]:
    """Write a chunk's content; it is on the disk after the next `os.fdatasync` of the file.

    Args:
        fd: the file; -1: compute only.
        direct: it was opened with O_DIRECT; memory that begins at a page is written as it is.
        place: where in it, a multiple of 4 KiB; the last 4 KiB are filled up with zeros.
    Returns: CRC-32C of each block (uint32s as bytes) and of the whole.
    Raises: Refused(NO_SPACE); OSError.
    """
    start, size = address(data)
    crcs = np.empty(-(-size // BLOCK_BYTES), np.uint32)
    whole = ctypes.c_uint32()
    code = library().wf_fs_write(
        fd, direct, place, start, size, crcs.ctypes.data, ctypes.addressof(whole)
    )
    if code in (errno.ENOSPC, errno.EDQUOT):
        raise Refused(Code.NO_SPACE, f"the disk is full ({os.strerror(code)})")
    if code:
        raise OSError(code, os.strerror(code))
    return crcs.tobytes(), whole.value


def content(fd: int, place: int, size: int, crcs: bytes) -> bytes:
    """What `read_batch` is told of a chunk.

    Args:
        fd, place, size: its file, where it begins there, its length in bytes.
        crcs: its blocks' checksums; the caller keeps them alive while the result is in use.
    """
    start = ctypes.cast(ctypes.c_char_p(crcs), _POINTER).value or 0
    return _CONTENT.pack(fd, place, size, start)


def read_batch(contents: Sequence[bytes], plan: array.array[int], out: int) -> list[int]:
    """Read pieces of chunks into memory, one after another, all bytes verified.

    Args:
        contents: per piece, the chunk's `content`.
        plan: int64s: offset and length of each piece in its chunk.
        out: address to write to, room for all lengths together.
    Returns: per piece 0, -errno or CORRUPT.
    """
    status = array.array("i", bytes(4 * len(contents)))
    library().wf_fs_read(
        len(contents), b"".join(contents), plan.buffer_info()[0], out, status.buffer_info()[0]
    )
    return status.tolist()
