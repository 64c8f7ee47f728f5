"""Comm room: the native file, compiled at first use, and addresses of any buffer."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from whalefall import jit
from whalefall.errors import DtypeError

__all__ = ["address", "library", "span"]

_VOID, _I32, _U32, _I64, _U64 = (
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_uint32,
    ctypes.c_int64,
    ctypes.c_uint64,
)
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "wf_crc32": (_U32, [_U32, _VOID, _U64, _I32]),
    "wf_crc32c": (_U32, [_U32, _VOID, _U64, _I32]),
    "wf_crc32c_blocks": (None, [_VOID, _U64, _U64, _VOID]),
    "wf_crc_combine": (_U32, [_I32, _U32, _U32, _U64]),
    "wf_gather_rows": (_I64, [_VOID, _U64, _U64, _VOID, _U64, _U64, _VOID, _U64]),
    "wf_scatter_rows": (_I64, [_VOID, _U64, _VOID, _U64, _U64, _VOID, _U64, _U64]),
    "wf_ring_header": (_U64, []),
    "wf_ring_create": (None, [_VOID, _U64]),
    "wf_ring_send": (_I32, [_VOID, _VOID, _VOID, _I32, _I64]),
    "wf_ring_next": (_I64, [_VOID, _I64]),
    "wf_ring_take": (None, [_VOID, _VOID, _U64]),
    "wf_word_wait": (_I32, [_VOID, _U32, _I64]),
    "wf_word_store": (None, [_VOID, _U32]),
}


@cache
def library() -> jit.Library:
    """The compiled `native/bytes.cpp`; calls release the GIL."""
    lib = jit.build(Path(__file__).parent / "native" / "bytes.cpp")
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def address(buffer: Any, writable: bool = False) -> int:
    """Where a buffer's memory begins: a numpy array, a torch tensor, or anything of the protocol.

    Raises: DtypeError if it must be written and cannot be.
    """
    if (pointer := getattr(buffer, "data_ptr", None)) is not None:
        return int(pointer())
    if not isinstance(buffer, np.ndarray):
        buffer = np.frombuffer(buffer, np.uint8)
    start, read_only = buffer.__array_interface__["data"]
    if writable and read_only:
        raise DtypeError("comm: a read-only buffer, wanted a writable one")
    return int(start)


def span(buffer: Any) -> tuple[int, int]:
    """Address and length in bytes of a contiguous buffer.

    Raises: DtypeError if it is not contiguous.
    """
    if (pointer := getattr(buffer, "data_ptr", None)) is not None:
        if not buffer.is_contiguous():
            raise DtypeError("comm: a tensor that is not contiguous; .contiguous() makes it so")
        return int(pointer()), int(buffer.numel() * buffer.element_size())
    if not isinstance(buffer, np.ndarray):
        buffer = np.frombuffer(buffer, np.uint8)
    elif not buffer.flags.c_contiguous:
        raise DtypeError("comm: an array that is not C-contiguous; np.ascontiguousarray makes it")
    return int(buffer.__array_interface__["data"][0]), int(buffer.nbytes)
