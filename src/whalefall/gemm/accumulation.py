"""Why sums are two-level: error against K for one level of accumulation and for two.

One level is what a GPU's FP8 tensor core does alone: partial sums kept to about 14 bits (Hopper
aligns addends and drops the rest). Two levels promote each 128 of K to fp32, as this room does.
Source: DeepSeek-V3 technical report 3.3.2 ("Increasing Accumulation Precision").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from whalefall.dtypes import e4m3_to_float
from whalefall.gemm.casts import per_token_cast_to_fp8
from whalefall.gemm.dense import fp8_gemm_nt

__all__ = ["Point", "errors_against_k"]

STEP = 32  # products that a tensor core adds at once
MANTISSA_BITS = 13  # kept of an accumulator: 14 bits with the leading one


class Point(NamedTuple):
    """Relative errors (root mean square, of the result's) of one K."""

    k: int
    one_level: float
    two_level: float


def _keep_bits(values: np.ndarray) -> np.ndarray:
    """Values cut (not rounded) to MANTISSA_BITS of mantissa."""
    mantissa, exponent = np.frexp(values)
    scale = float(1 << (MANTISSA_BITS + 1))
    return np.ldexp(np.trunc(mantissa * scale) / scale, exponent)


def errors_against_k(ks: Sequence[int], rows: int = 16, seed: int = 0) -> list[Point]:
    """Errors of x · wᵀ against float64 for each K (multiples of 128), random [rows, K] operands.

    Both use the same FP8 values; the emulated single level gets them with one scale a row, since
    it has no place where block scales could be applied.
    """
    rng = np.random.default_rng(seed)
    points = []
    for k in ks:
        x = np.abs(rng.standard_normal((rows, k))).astype(np.float32)
        w = np.abs(rng.standard_normal((rows, k))).astype(np.float32)
        points.append(Point(k, _one_level(x, w), _two_level(x, w)))
    return points


def _error(result: np.ndarray, exact: np.ndarray) -> float:
    return float(np.sqrt(((result - exact) ** 2).mean() / (exact**2).mean()))


def _one_level(x: np.ndarray, w: np.ndarray) -> float:
    k = x.shape[1]
    (xv, xs), (wv, ws) = per_token_cast_to_fp8(x, False, k), per_token_cast_to_fp8(w, False, k)
    xf, wf = e4m3_to_float(xv).astype(np.float64), e4m3_to_float(wv).astype(np.float64)
    total = np.zeros((x.shape[0], w.shape[0]))
    for start in range(0, k, STEP):
        total = _keep_bits(total + xf[:, start : start + STEP] @ wf[:, start : start + STEP].T)
    return _error(total * xs * ws.T, (xf * xs) @ (wf * ws).T)


def _two_level(x: np.ndarray, w: np.ndarray) -> float:
    a, b = per_token_cast_to_fp8(x, False), per_token_cast_to_fp8(w, False)
    d = np.empty((x.shape[0], w.shape[0]), np.float32)
    fp8_gemm_nt(a, b, d, recipe=(1, 1, 128))
    exact = [
        e4m3_to_float(v).astype(np.float64) * np.repeat(s, 128, 1).astype(np.float64)
        for v, s in (a, b)
    ]
    return _error(d.astype(np.float64), exact[0] @ exact[1].T)
