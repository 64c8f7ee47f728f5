"""One function that calls the native product of `native/gemm.h`, now or again."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from whalefall.gemm.native_calls import product_library
from whalefall.gemm.structs import Product

__all__ = ["Prepared", "prepare", "run"]


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
    entry = product_library().wf_gemm
    return Prepared(entry, ctypes.addressof(product), product, segments)


def run(product: Product, segments: npt.NDArray[np.int64]) -> None:
    """Compute all segments; see `prepare`."""
    prepare(product, segments)()
