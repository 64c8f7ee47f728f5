"""The native side of the products: the structs of `native/*.h`, mirrored, and the loaded units."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from whalefall import jit

__all__ = ["KINDS", "Expert", "ExpertsCall", "Input", "LinearCall", "Output", "Weight", "library"]

KINDS = {"float32": 0, "bfloat16": 1, "float8_e4m3fn": 2}
PACKED = 2  # the kind of rows that `wf_pack` made
FORMS = {"few": 0, "many": 1}
ACTIVATIONS = {"keep": 0, "e4m3": 1, "half": 2}  # what a product does to fp32 activations first
_POINTER, _INT64, _INT32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class Weight(ctypes.Structure):
    """`wf::gemm::Weight`."""

    _fields_ = (
        ("data", _POINTER),
        ("scale", _POINTER),
        ("rows", _INT64),
        ("cols", _INT64),
        ("scale_pitch", _INT64),
        ("first_row", _INT64),
        ("kind", _INT32),
        ("unused", _INT32),
    )


class Input(ctypes.Structure):
    """`wf::gemm::Input`."""

    _fields_ = (("data", _POINTER), ("pitch", _INT64), ("kind", _INT32), ("unused", _INT32))


class Output(ctypes.Structure):
    """`wf::gemm::Output`."""

    _fields_ = (
        ("data", _POINTER),
        ("pitch", _INT64),
        ("index", _POINTER),
        ("factor", _POINTER),
        ("kind", _INT32),
        ("unused", _INT32),
    )


class LinearCall(ctypes.Structure):
    """`LinearCall` of native/linear.cpp."""

    _fields_ = (
        ("weight", Weight),
        ("x", Input),
        ("y", Output),
        ("count", _INT64),
        ("form", _INT32),
        ("activations", _INT32),
    )


class Expert(ctypes.Structure):
    """`wf::gemm::Expert`."""

    _fields_ = (("w1", Weight), ("w3", Weight), ("w2", Weight))


class ExpertsCall(ctypes.Structure):
    """`ExpertsCall` of native/linear.cpp."""

    _fields_ = (
        ("experts", _POINTER),
        ("num_experts", _INT64),
        ("topk_idx", _POINTER),
        ("tokens", _INT64),
        ("topk", _INT64),
        ("x", Input),
        ("rows", Output),
        ("form", _INT32),
        ("activations", _INT32),
        ("shared", _POINTER),
        ("shared_rows", Output),
    )


def library() -> jit.Library:
    """native/linear.cpp at the ISA level in force."""
    return _library(jit.best_level())


@functools.cache
def _library(level: str) -> jit.Library:
    loaded = jit.build(Path(__file__).parent / "native" / "linear.cpp", level=level)
    loaded.wf_linear.argtypes = [ctypes.c_void_p]
    loaded.wf_linear.restype = None
    loaded.wf_experts.argtypes = [ctypes.c_void_p]
    loaded.wf_experts.restype = None
    loaded.wf_pack.argtypes = [ctypes.c_void_p, _INT64, _INT64, ctypes.c_void_p]
    loaded.wf_pack.restype = None
    return loaded
