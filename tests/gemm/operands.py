"""Operands for tests: random codes with scales, and what they mean in float64."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from whalefall.dtypes import float_to_e2m1, pack_ue8m0

E4M3, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16


def spread(scale: Any, rows: int, cols: int, shape: tuple[int, ...]) -> Any:
    """Block scales repeated to one a value, cut to the last two lengths of `shape`, float64."""
    wide = np.repeat(np.repeat(np.asarray(scale, np.float64), rows, -2), cols, -1)
    return wide[..., : shape[-2], : shape[-1]]


def fp8(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    gran: tuple[int, int] = (1, 128),
    ue8m0: bool = False,
) -> tuple[tuple[Any, Any], Any]:
    """((values, fp32 or packed int32 scales), the same in float64)."""
    codes = rng.integers(0, 256, shape).astype(np.uint8)
    codes[(codes & 127) == 127] = 1
    *lead, rows, k = shape
    blocks = -(-k // gran[1])
    if ue8m0:
        count = -(-blocks // 4) * 4
        scale = np.exp2(rng.integers(-4, 4, (*lead, rows, count))).astype(np.float32)
        given: Any = pack_ue8m0(scale)
        scale = scale[..., :blocks]
    else:
        scale = (rng.random((*lead, -(-rows // gran[0]), blocks)) + 0.5).astype(np.float32)
        given = scale
    values = codes.view(E4M3)
    return (values, given), values.astype(np.float64) * spread(scale, *gran, shape)


def fp4(rng: np.random.Generator, rows: int, k: int, gran_k: int) -> tuple[tuple[Any, Any], Any]:
    """The same for two E2M1 codes a byte along K."""
    from whalefall.dtypes import e2m1_to_float

    codes = float_to_e2m1(rng.standard_normal((rows, k)) * 3)
    packed = (codes[:, 0::2] | (codes[:, 1::2] << 4)).view(np.int8)
    scale = (rng.random((rows, -(-k // gran_k))) + 0.5).astype(np.float32)
    return (packed, scale), e2m1_to_float(codes).astype(np.float64) * spread(
        scale, 1, gran_k, (rows, k)
    )


def bf16(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """Normal values in bfloat16."""
    return rng.standard_normal(shape).astype(BF16)


def error(y: Any, a: Any, b: Any, c: Any = 0.0) -> float:
    """Largest error of y = c + a·bᵀ over the largest sum of magnitudes."""
    if np.size(y) == 0:
        return 0.0
    wanted = a @ b.swapaxes(-1, -2) + np.asarray(c, np.float64)
    size = np.abs(a) @ np.abs(b).swapaxes(-1, -2) + np.abs(np.asarray(c, np.float64))
    return float(np.abs(np.asarray(y, np.float64) - wanted).max() / max(size.max(), 1e-300))
