"""The 656-byte row of an FP8 latent cache, in numpy: what it means, and how it is made.

512 E4M3 codes, four fp32 scales for 128 columns each, 64 bfloat16 columns of rope.
Source: FlashMLA, the FP8 KV cache of DeepSeek-V3.2 (`tests/quant.py` defines how it is made).
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from whalefall.attention.structs import FP8_DTYPES, FP8_ROW_BYTES
from whalefall.dtypes import (
    E4M3_MAX,
    as_numpy,
    ceil_to_ue8m0,
    e4m3_to_float,
    float_to_e4m3,
    refuse_gradient,
    restore,
    view,
)
from whalefall.errors import DtypeError, ShapeError

__all__ = ["LATENT", "dequantize_kv_cache", "quantize_kv_rows"]

_HERE = "dequantize_kv_cache"
LATENT, TILE = 512, 128
LEAST_SCALE = 1e-4  # before it is rounded up to a power of two


def dequantize_kv_cache(rows: Any) -> Any:
    """What rows of 656 bytes mean: [..., 656] bytes → [..., 576] bfloat16 (products in fp32).

    Args:
        rows: uint8, int8 or float8_e4m3fn.
    Returns: an array of the caller's library.
    Raises: ShapeError; DtypeError for another dtype or what is no array; UnsupportedError for
        memory that is not the CPU's, and where a gradient would be wanted.
    Source: FlashMLA, the V3.2 layout.
    """
    refuse_gradient(_HERE, (rows,))
    seen = view(rows, f"{_HERE}: rows")
    if seen.dtype not in FP8_DTYPES:
        raise DtypeError(
            f"{_HERE}: rows is {seen.dtype}, wanted one of {', '.join(FP8_DTYPES)}; pass the bytes "
            "of an FP8 cache"
        )
    if seen.shape[-1:] != (FP8_ROW_BYTES,):
        raise ShapeError(
            f"{_HERE}: rows has shape {list(seen.shape)}, wanted [..., {FP8_ROW_BYTES}]; pass "
            "whole rows of an FP8 cache"
        )
    return restore(_meaning(as_numpy(rows)), rows)


def _meaning(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    data = np.ascontiguousarray(rows).view(np.uint8)
    end = LATENT + 4 * LATENT // TILE
    scale = np.ascontiguousarray(data[..., LATENT:end]).view(np.float32)
    values = e4m3_to_float(data[..., :LATENT]) * np.repeat(scale, TILE, axis=-1)
    rope = np.ascontiguousarray(data[..., end:]).view(ml_dtypes.bfloat16)
    return np.concatenate([values.astype(ml_dtypes.bfloat16), rope], axis=-1)


def quantize_kv_rows(latent: npt.NDArray[Any], rope: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Rows [T, 656] of latent [T, 512] and rope [T, 64], as `append_latent` makes them.

    A NaN becomes a NaN code, and has no say in its tile's scale. An infinity becomes one too, and
    its tile's scale is 1.
    """
    tiles = np.asarray(latent, np.float32).reshape(len(latent), -1, TILE)
    most = np.fmax.reduce(np.abs(tiles), axis=2, initial=0)
    scale = ceil_to_ue8m0(np.maximum(most / np.float32(E4M3_MAX), np.float32(LEAST_SCALE)))
    scale[np.isinf(most)] = 1
    with np.errstate(invalid="ignore"):
        codes = float_to_e4m3(tiles / scale[:, :, None])
    parts = (codes.reshape(latent.shape), scale, np.asarray(rope).astype(ml_dtypes.bfloat16))
    return np.concatenate([part.view(np.uint8) for part in parts], axis=1)
