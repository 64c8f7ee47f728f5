"""Comm room: CRC-32 (zlib's) and CRC-32C (Castagnoli's) of any buffer, native, GIL released."""

from __future__ import annotations

import numpy as np

from whalefall.comm.frames import Buffer
from whalefall.comm.library import library, span
from whalefall.errors import ConfigError

__all__ = ["crc32", "crc32c", "crc32c_blocks", "crc_combine"]


def crc32(data: Buffer, value: int = 0) -> int:
    """CRC-32 with zlib's polynomial; `value` continues an earlier one, as in zlib.crc32."""
    start, count = span(data)
    return int(library().wf_crc32(value, start, count, _table_only()))


def crc32c(data: Buffer, value: int = 0) -> int:
    """CRC-32C (iSCSI, ext4); `value` continues an earlier one."""
    start, count = span(data)
    return int(library().wf_crc32c(value, start, count, _table_only()))


def crc32c_blocks(data: Buffer, block_bytes: int) -> np.ndarray:
    """CRC-32C of each block of the data; the last block may be short.

    Args:
        data: any contiguous buffer.
        block_bytes: length of a block, > 0.
    Returns: [ceil(bytes / block_bytes)] uint32.
    """
    if block_bytes <= 0:
        raise ConfigError(f"crc32c_blocks: block_bytes is {block_bytes}, wanted > 0")
    start, count = span(data)
    out = np.empty(-(-count // block_bytes), np.uint32)
    library().wf_crc32c_blocks(start, count, block_bytes, out.ctypes.data)
    return out


def crc_combine(first: int, second: int, second_bytes: int, castagnoli: bool = True) -> int:
    """The CRC of two pieces together, from the CRC of each, without the data.

    Args:
        first: CRC of the first piece.
        second: CRC of the second piece.
        second_bytes: length of the second piece.
        castagnoli: CRC-32C; False for zlib's CRC-32.
    """
    return int(library().wf_crc_combine(castagnoli, first, second, second_bytes))


def _table_only() -> bool:
    # WHALEFALL_ISA=any asks for code without special instructions.
    return library().level == "any"
