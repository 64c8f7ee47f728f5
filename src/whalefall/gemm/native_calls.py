"""The native units of this room, loaded; where there is no compiler, numpy in their place."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

from whalefall import jit
from whalefall.gemm import without_compiler

__all__ = ["library", "product_library"]

_NATIVE = Path(__file__).parent / "native"


def library() -> Any:
    """native/linear.cpp at the ISA level in force, or `without_compiler`."""
    return _library(jit.best_level())


def product_library() -> Any:
    """native/gemm.cpp at the ISA level in force, or `without_compiler`."""
    return _product_library(jit.best_level())


@functools.cache
def _library(level: str) -> Any:
    try:
        loaded = jit.build(_NATIVE / "linear.cpp", level=level)
    except jit.NoCompilerError as missing:
        jit.numpy_instead(missing)
        return without_compiler
    pointer, int64 = ctypes.c_void_p, ctypes.c_int64
    loaded.wf_linear.argtypes = loaded.wf_experts.argtypes = [pointer]
    loaded.wf_pack.argtypes = [pointer, int64, int64, pointer]
    loaded.wf_linear.restype = loaded.wf_experts.restype = loaded.wf_pack.restype = None
    return loaded


@functools.cache
def _product_library(level: str) -> Any:
    try:
        loaded = jit.build(_NATIVE / "gemm.cpp", level=level)
    except jit.NoCompilerError as missing:
        jit.numpy_instead(missing)
        return without_compiler
    loaded.wf_gemm.argtypes = loaded.wf_gemm_grouped.argtypes = [ctypes.c_void_p]
    loaded.wf_gemm.restype = None
    return loaded
