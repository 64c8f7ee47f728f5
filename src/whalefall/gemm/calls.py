"""The native product of `native/gemm.h`: its structs, mirrored, and one function that calls it."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from whalefall import jit

__all__ = ["Layout", "Prepared", "Product", "prepare", "run"]

_INT64, _INT32 = ctypes.c_int64, ctypes.c_int32


class Layout(ctypes.Structure):
    """`wf::gemm::Layout`."""

    _fields_ = (
        ("row_stride", _INT64),
        ("k_stride", _INT64),
        ("scale_row_stride", _INT64),
        ("scale_k_stride", _INT64),
        ("scale_rows", _INT64),
        ("scale_k", _INT64),
        ("kind", _INT32),
        ("packing", _INT32),
    )


class Product(ctypes.Structure):
    """`wf::gemm::Product`."""

    _fields_ = (
        ("segments", ctypes.c_void_p),
        ("num_segments", _INT64),
        ("n", _INT64),
        ("d_pitch", _INT64),
        ("c_pitch", _INT64),
        ("a", Layout),
        ("b", Layout),
        ("d_kind", _INT32),
        ("length", _INT32),
    )


@functools.cache
def _library(level: str) -> jit.Library:
    library = jit.build(Path(__file__).parent / "native" / "gemm.cpp", level=level)
    library.wf_gemm.argtypes = [ctypes.c_void_p]
    library.wf_gemm.restype = None
    return library


class Prepared(NamedTuple):
    """A checked product: calling it computes it; holds its structs, but not the arrays."""

    entry: Any
    address: int
    product: Product
    segments: npt.NDArray[np.int64]

    def __call__(self) -> None:
        """Compute all segments."""
        self.entry(self.address)


def prepare(product: Product, segments: npt.NDArray[np.int64]) -> Prepared:
    """A product and its segments: rows of `a, a_scale, b, b_scale, d, c` addresses, then `m, k`."""
    product.segments, product.num_segments = segments.ctypes.data, len(segments)
    entry = _library(jit.best_level()).wf_gemm
    return Prepared(entry, ctypes.addressof(product), product, segments)


def run(product: Product, segments: npt.NDArray[np.int64]) -> None:
    """Compute all segments; see `prepare`."""
    prepare(product, segments)()
