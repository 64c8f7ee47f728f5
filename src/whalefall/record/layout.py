"""Record room: the bytes of an FFRecord file's header, and what may be wrong with them.

In: the first bytes of a file and its length. Out: an `Index`: where each sample lies, its CRC.
Layout, little-endian, packed: u32 crc_meta, i64 N, u32 crc[N], i64 offset[N], samples.
Source: FFRecord 1.4.0.
"""

from __future__ import annotations

import struct
import warnings
from dataclasses import dataclass

import numpy as np

from whalefall.errors import CorruptError, LimitError
from whalefall.record.checksum import crc32

__all__ = ["PREFIX_BYTES", "ChecksumError", "Index", "IndexRangeError", "header", "parse"]

_PREFIX = struct.Struct("<Iq")
PREFIX_BYTES = _PREFIX.size
_BYTES_PER_SAMPLE = 12


class ChecksumError(CorruptError, RuntimeError):
    """A sample's or a header's bytes do not match their CRC-32 (FFRecord raises RuntimeError)."""


class IndexRangeError(LimitError, IndexError, RuntimeError):
    """A sample's index is outside the data set (FFRecord raises RuntimeError)."""


@dataclass(frozen=True)
class Index:
    """Where the samples of one file lie.

    Attributes:
        name: the file, for messages.
        checksums: [N] uint32, zlib's CRC-32 of each sample.
        bounds: [N + 1] int64, sample i is the bytes bounds[i] … bounds[i + 1]; the last is the
            file's length.
        checked: whether the header carried a checksum (old files do not) and it held.
    """

    name: str
    checksums: np.ndarray
    bounds: np.ndarray
    checked: bool

    def __len__(self) -> int:
        return len(self.checksums)


def header(checksums: np.ndarray, sizes: np.ndarray) -> bytes:
    """The header of a file whose samples have these CRC-32s and sizes ([N] each)."""
    count = len(checksums)
    first = PREFIX_BYTES + _BYTES_PER_SAMPLE * count
    offsets = np.cumsum([first, *sizes[:-1]], dtype="<i8")[:count]
    body = struct.pack("<q", count) + checksums.astype("<u4").tobytes() + offsets.tobytes()
    return struct.pack("<I", crc32(body)) + body


def header_bytes(name: str, prefix: bytes, file_bytes: int) -> int:
    """How long the header is, from the file's first 12 bytes.

    Raises: CorruptError if the file is too short for what the prefix says.
    """
    if len(prefix) < PREFIX_BYTES:
        raise CorruptError(
            f"record: {name} has {file_bytes} bytes, wanted at least {PREFIX_BYTES}: no .ffr file"
        )
    crc_meta, count = _PREFIX.unpack(prefix)
    if crc_meta == 0 and count == 0:
        raise CorruptError(
            f"record: {name} has a header of zeros: its writer was stopped before close(); "
            "write it again"
        )
    longest = (file_bytes - PREFIX_BYTES) // _BYTES_PER_SAMPLE
    if not 0 <= count <= longest:
        raise CorruptError(
            f"record: {name}: N is {count}, wanted 0 … {longest} in a file of {file_bytes} bytes"
        )
    return PREFIX_BYTES + _BYTES_PER_SAMPLE * int(count)


def parse(name: str, raw: bytes, file_bytes: int, check: bool) -> Index:
    """Read and check a whole header.

    Args:
        name: the file, for messages.
        raw: the header, `header_bytes` long.
        file_bytes: length of the whole file.
        check: compare crc_meta (the offsets are looked at in any case).
    Raises: CorruptError, ChecksumError.
    """
    wanted = header_bytes(name, raw[:PREFIX_BYTES], file_bytes)
    if len(raw) < wanted:
        raise CorruptError(
            f"record: {name}: header has {len(raw)} bytes, wanted {wanted}: truncated"
        )
    crc_meta, count = _PREFIX.unpack_from(raw)
    checked = False
    if check and crc_meta == 0:
        warnings.warn(f"{name}: an old file without a checksum of its header", stacklevel=2)
    elif check:
        found = crc32(memoryview(raw)[4:wanted])
        if found != crc_meta:
            raise ChecksumError(
                f"record: {name}: checksum of the header is {found:08x}, it says {crc_meta:08x}: "
                "damaged, restore the file"
            )
        checked = True
    checksums = np.frombuffer(raw, "<u4", count, PREFIX_BYTES)
    bounds = np.empty(count + 1, np.int64)
    bounds[:count] = np.frombuffer(raw, "<i8", count, PREFIX_BYTES + 4 * count)
    bounds[count] = file_bytes
    _check_bounds(name, bounds, wanted)
    bounds.flags.writeable = False
    return Index(name, checksums, bounds, checked)


def _check_bounds(name: str, bounds: np.ndarray, first: int) -> None:
    if len(bounds) > 1 and bounds[0] != first:
        raise CorruptError(f"record: {name}: the first offset is {bounds[0]}, wanted {first}")
    falling = np.flatnonzero(bounds[1:] < bounds[:-1])
    if len(falling):
        at = int(falling[0])
        if at == len(bounds) - 2:
            raise CorruptError(
                f"record: {name} has {bounds[-1]} bytes, but sample {at} begins at "
                f"{bounds[at]}: truncated"
            )
        raise CorruptError(
            f"record: {name}: offset {at + 1} is {bounds[at + 1]}, wanted at least {bounds[at]}"
        )
