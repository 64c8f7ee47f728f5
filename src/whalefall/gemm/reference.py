"""The definitions, in numpy and float64: what every product of this room is measured against."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from whalefall.dtypes import as_numpy, e2m1_to_float, e4m3_to_float, unpack_ue8m0
from whalefall.errors import DtypeError, ShapeError

__all__ = ["calc_diff", "dequantize", "product"]

Doubles = npt.NDArray[np.float64]


def dequantize(values: Any, scales: Any, gran_rows: int, gran_k: int) -> Doubles:
    """[.., rows, k] in float64: values times the scale of their (gran_rows, gran_k) block.

    `values` are float8_e4m3fn, or int8 with two E2M1 codes a byte along k; `scales` float32 or
    packed int32.
    """
    codes, scale = as_numpy(values), as_numpy(scales)
    if codes.dtype == np.int8:
        pairs = np.ascontiguousarray(codes).view(np.uint8)
        both = np.stack([pairs & 15, pairs >> 4], axis=-1)
        floats = e2m1_to_float(both).reshape(*codes.shape[:-1], -1)
    else:
        floats = e4m3_to_float(np.ascontiguousarray(codes))
    scale = unpack_ue8m0(scale) if scale.dtype == np.int32 else scale
    wide = np.repeat(np.repeat(scale.astype(np.float64), gran_rows, -2), gran_k, -1)
    return floats.astype(np.float64) * wide[..., : floats.shape[-2], : floats.shape[-1]]


def product(a: Any, b: Any, c: Any = None) -> Doubles:
    """C + A[.., M, K] · B[.., N, K]ᵀ of dequantised operands."""
    result = np.asarray(a, np.float64) @ np.asarray(b, np.float64).swapaxes(-1, -2)
    return result if c is None else result + np.asarray(c, np.float64)


def _doubles(what: str, array: Any) -> Doubles:
    values = as_numpy(array, what)
    try:
        return np.asarray(values, np.float64)
    except (ValueError, TypeError):
        raise DtypeError(f"{what} is {values.dtype}, wanted numbers; convert it") from None


def calc_diff(x: Any, y: Any) -> float:
    """1 - 2 Σxy / Σ(x² + y²) in float64; 0.0 where both are zero.

    Source: DeepGEMM `deep_gemm/testing/numeric.py`.
    """
    a, b = (_doubles(f"calc_diff: {name}", v) for name, v in (("x", x), ("y", y)))
    try:
        np.broadcast_shapes(a.shape, b.shape)
    except ValueError:
        raise ShapeError(
            f"calc_diff: x is {list(a.shape)}, y {list(b.shape)}, wanted the same shape; "
            "reshape one of them"
        ) from None
    denominator = float((a * a + b * b).sum())
    return 0.0 if denominator == 0 else 1.0 - 2.0 * float((a * b).sum()) / denominator
