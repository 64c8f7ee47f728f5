"""Record room: zlib's CRC-32, by comm's native code or, without a compiler, by zlib."""

from __future__ import annotations

import zlib
from functools import cache
from typing import Any

from whalefall.errors import WhalefallError

__all__ = ["crc32", "native"]

# below this the call into native code costs more than zlib takes
_SMALL_BYTES = 256


@cache
def native() -> Any:
    """comm's library, or None on a machine that cannot compile it."""
    from whalefall.comm.library import library

    try:
        return library()
    except WhalefallError:
        return None


def crc32(data: Any) -> int:
    """CRC-32 of any contiguous buffer (a memoryview for what is longer than a few bytes)."""
    if len(data) < _SMALL_BYTES or native() is None:
        return zlib.crc32(data)
    from whalefall.comm import crc32 as fast

    return fast(data)
