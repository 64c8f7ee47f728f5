"""One function that calls the native product of `native/gemm.h`."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt

from whalefall.gemm.native_calls import product_library
from whalefall.gemm.structs import Product

__all__ = ["run"]


def run(product: Product, segments: npt.NDArray[np.int64]) -> None:
    """Compute all segments: rows of `a, a_scale, b, b_scale, d, c` addresses, then `m, k`."""
    product.segments, product.num_segments = segments.ctypes.data, len(segments)
    product_library().wf_gemm(ctypes.addressof(product))
