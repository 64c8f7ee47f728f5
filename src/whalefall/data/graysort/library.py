"""The native file of GraySort, compiled at first use."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from whalefall import jit

__all__ = ["library"]

VOID, I64, U64, INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64, ctypes.c_int
SIGNATURES = {
    "wf_graysort_generate": [VOID, U64, I64, INT, INT],
    "wf_graysort_check": [VOID, I64, VOID],
    "wf_graysort_order": [VOID, I64, VOID, VOID],
    "wf_graysort_gather": [VOID, VOID, I64, I64, VOID],
    "wf_graysort_deal": [VOID, I64, VOID, I64, VOID, VOID],
}


@cache
def library() -> jit.Library:
    """The compiled `native/graysort.cpp`; calls release the GIL."""
    lib = jit.build(Path(__file__).parent / "native" / "graysort.cpp")
    for name, arguments in SIGNATURES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = None, arguments
    return lib
