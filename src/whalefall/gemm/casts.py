"""Casts to FP8 and FP4 with block scales, and back, bit for bit as DeepGEMM defines them.

Every cast: the block's largest magnitude, at least 1e-4, over the format's maximum is the scale
(rounded up to a power of two for UE8M0); values are multiplied by its reciprocal and rounded.
A NaN makes its block's scale NaN, in UE8M0 too (there the original loses it).
Source: DeepGEMM `deep_gemm/utils/math.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from whalefall import dtypes
from whalefall.arguments import flag, whole, wholes
from whalefall.dtypes import as_numpy, restore
from whalefall.errors import DtypeError, ShapeError

__all__ = [
    "align",
    "cast_back_from_fp4",
    "ceil_div",
    "ceil_to_ue8m0",
    "pack_ue8m0_to_int",
    "per_block_cast_to_fp8",
    "per_channel_cast_to_fp8",
    "per_custom_dims_cast_to_fp8",
    "per_token_cast_to_fp4",
    "per_token_cast_to_fp8",
    "transpose_packed_fp4",
    "unpack_ue8m0_from_int",
]

Floats = npt.NDArray[np.float32]


def ceil_div(x: Any, y: Any) -> int:
    """x / y rounded up.

    Args:
        x, y: whole numbers, or integer arrays or tensors without axes, such as an element of one.
    Raises: ConfigError for anything else, and unless y >= 1.
    """
    x, y = whole("ceil_div: x", item(x)), whole("ceil_div: y", item(y), 1)
    return (x + y - 1) // y


def align(x: Any, y: Any) -> int:
    """x rounded up to a multiple of y; both as in `ceil_div`."""
    x, y = whole("align: x", item(x)), whole("align: y", item(y), 1)
    return ceil_div(x, y) * y


def item(value: Any) -> Any:
    """The element of an array or tensor without axes; anything else, and where there is none, as
    it is."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        with contextlib.suppress(RuntimeError):  # a tensor without memory
            return value.item()
    return value


def ceil_to_ue8m0(x: Any) -> Any:
    """The power of two at or above |x|, fp32; NaN stays NaN (the original gives 2^127)."""
    return restore(dtypes.ceil_to_ue8m0(_floats("ceil_to_ue8m0", x)), x)


def pack_ue8m0_to_int(x: Any) -> Any:
    """Four fp32 powers of two of the last axis as one int32, the first in the lowest byte."""
    return restore(dtypes.pack_ue8m0(_floats("pack_ue8m0_to_int", x), "pack_ue8m0_to_int"), x)


def unpack_ue8m0_from_int(packed_sf: Any) -> Any:
    """The four scales of each int32 as fp32: the last axis grows fourfold."""
    where = "unpack_ue8m0_from_int"
    packed = as_numpy(packed_sf, f"{where}: packed_sf")
    return restore(dtypes.unpack_ue8m0(packed, where), packed_sf)


def _floats(where: str, x: Any, axes: int | None = None) -> Floats:
    values = as_numpy(x, f"{where}: x")
    if axes is not None and values.ndim != axes:
        raise ShapeError(
            f"{where}: x has shape {list(values.shape)}, wanted {axes} axes; reshape it"
        )
    if values.dtype.name not in ("float32", "bfloat16", "float16", "float64"):
        raise DtypeError(f"{where}: x is {values.dtype}, wanted a floating-point array; convert it")
    return np.asarray(values, np.float32)


def _scale(largest: Floats, maximum: float, use_ue8m0: bool) -> Floats:
    scale = np.maximum(largest, np.float32(1e-4)) / np.float32(maximum)
    return dtypes.ceil_to_ue8m0(scale) if use_ue8m0 else np.asarray(scale, np.float32)


def _padded(x: Floats, rows: int, columns: int) -> Floats:
    """Zeros appended so that both lengths are multiples."""
    m, n = x.shape
    if m % rows == 0 and n % columns == 0:
        return x
    out = np.zeros((align(m, rows), align(n, columns)), np.float32)
    out[:m, :n] = x
    return out


def _quantize(x: Floats, scale: Floats) -> npt.NDArray[Any]:
    with np.errstate(invalid="ignore"):
        return dtypes.float_to_e4m3(x * (np.float32(1) / scale))


def _given_back(values: npt.NDArray[Any], scale: npt.NDArray[Any], x: Any) -> tuple[Any, Any]:
    """Values and scales with the library of x, row-major whatever the strides of x."""
    # not `ascontiguousarray`, which gives a scale without axes one
    return restore(np.asarray(values, order="C"), x), restore(np.asarray(scale, order="C"), x)


def per_token_cast_to_fp8(
    x: Any, use_ue8m0: bool, gran_k: int = 128, use_packed_ue8m0: bool = False
) -> tuple[Any, Any]:
    """Each `gran_k` of a row gets its own scale.

    Args:
        x: [m, n] floating point. use_ue8m0: scales are powers of two.
        use_packed_ue8m0: pack four scales in an int32 (their number must be a multiple of 4).
    Returns: values [m, n] float8_e4m3fn, scales [m, ceil(n / gran_k)] float32 (or int32 packed).
    Raises: ShapeError, DtypeError.
    """
    where = "per_token_cast_to_fp8"
    floats = _floats(where, x, 2)
    use_ue8m0, pack = _flags(where, use_ue8m0, use_packed_ue8m0)
    blocks = _blocks_of_rows(where, floats, gran_k)
    scale = _scale(_largest(blocks, 2), dtypes.E4M3_MAX, use_ue8m0)
    values = _unpadded(_quantize(blocks, scale[:, :, None]), floats.shape[1])
    return _given_back(values, dtypes.pack_ue8m0(scale, where) if pack else scale, x)


def _flags(where: str, use_ue8m0: Any, use_packed_ue8m0: Any) -> tuple[bool, bool]:
    return (
        flag(f"{where}: use_ue8m0", use_ue8m0),
        flag(f"{where}: use_packed_ue8m0", use_packed_ue8m0),
    )


def _blocks_of_rows(where: str, x: Floats, gran_k: Any) -> Floats:
    """[m, blocks, gran_k], no wider than x where one block holds a row."""
    gran_k = min(whole(f"{where}: gran_k", gran_k, 1), max(1, x.shape[1]))
    wide = _padded(x, 1, gran_k)
    return wide.reshape(x.shape[0], wide.shape[1] // gran_k, gran_k)


def _unpadded(blocks: npt.NDArray[Any], n: int) -> npt.NDArray[Any]:
    m, count, gran_k = blocks.shape
    return blocks.reshape(m, count * gran_k)[:, :n]


def per_channel_cast_to_fp8(x: Any, use_ue8m0: bool, gran_k: int = 128) -> tuple[Any, Any]:
    """Each `gran_k` rows of a column get their own scale.

    Returns: values [m, n] float8_e4m3fn, scales [m / gran_k, n] float32.
    Raises: ShapeError if m is no multiple of `gran_k`.
    """
    where = "per_channel_cast_to_fp8"
    floats = _floats(where, x, 2)
    use_ue8m0, gran_k = flag(f"{where}: use_ue8m0", use_ue8m0), whole(f"{where}: gran_k", gran_k, 1)
    m, n = floats.shape
    if m % gran_k:
        raise ShapeError(f"{where}: x has {m} rows, wanted a multiple of {gran_k}; append zeros")
    blocks = floats.reshape(m // gran_k, gran_k, n)
    scale = _scale(_largest(blocks, 1), dtypes.E4M3_MAX, use_ue8m0)
    return _given_back(_quantize(blocks, scale[:, None, :]).reshape(m, n), scale, x)


def per_block_cast_to_fp8(x: Any, use_ue8m0: bool, gran_k: int = 128) -> tuple[Any, Any]:
    """Each `gran_k` × `gran_k` block gets its own scale.

    Returns: values [m, n] float8_e4m3fn, scales [ceil(m / gran_k), ceil(n / gran_k)] float32.
    """
    where = "per_block_cast_to_fp8"
    floats = _floats(where, x, 2)
    use_ue8m0, gran_k = flag(f"{where}: use_ue8m0", use_ue8m0), whole(f"{where}: gran_k", gran_k, 1)
    m, n = floats.shape
    rows, columns = min(gran_k, max(1, m)), min(gran_k, max(1, n))
    wide = _padded(floats, rows, columns)
    blocks = wide.reshape(wide.shape[0] // rows, rows, wide.shape[1] // columns, columns)
    scale = _scale(_largest(blocks, (1, 3)), dtypes.E4M3_MAX, use_ue8m0)
    values = _quantize(blocks, scale[:, None, :, None]).reshape(wide.shape)[:m, :n]
    return _given_back(values, scale, x)


def per_custom_dims_cast_to_fp8(x: Any, dims: Sequence[int], use_ue8m0: bool) -> tuple[Any, Any]:
    """One scale for each index of the axes `dims`, over all others.

    Returns: values in the shape of x, scales with the other axes removed (lengths of 1 too).
    """
    where = "per_custom_dims_cast_to_fp8"
    floats = _floats(where, x)
    kept, use_ue8m0 = wholes(f"{where}: dims", dims, 0), flag(f"{where}: use_ue8m0", use_ue8m0)
    if any(d >= floats.ndim for d in kept):
        raise ShapeError(
            f"{where}: dims={tuple(kept)}, wanted axes 0 to {floats.ndim - 1}; name axes that x has"
        )
    others = tuple(i for i in range(floats.ndim) if i not in kept)
    largest = np.abs(floats).max(axis=others, keepdims=True, initial=0)
    scale = _scale(largest, dtypes.E4M3_MAX, use_ue8m0)
    return restore(_quantize(floats, scale), x), restore(np.asarray(scale.squeeze(), order="C"), x)


def per_token_cast_to_fp4(
    x: Any, use_ue8m0: bool, gran_k: int = 128, use_packed_ue8m0: bool = False
) -> tuple[Any, Any]:
    """Two E2M1 codes a byte, each `gran_k` of a row with its own scale; ties round to zero.

    Args:
        x: [m, n] floating point, n even.
    Returns: [m, n / 2] int8, the even column in the low half; scales [m, ceil(n / gran_k)] float32,
        or packed int32 (missing ones are 1.0).
    """
    where = "per_token_cast_to_fp4"
    floats = _floats(where, x, 2)
    use_ue8m0, pack = _flags(where, use_ue8m0, use_packed_ue8m0)
    m, n = floats.shape
    if n % 2:
        raise ShapeError(f"{where}: x has {n} columns, wanted an even number; append zeros")
    blocks = _blocks_of_rows(where, floats, gran_k)
    scale = _scale(_largest(blocks, 2), dtypes.FP4_MAX, use_ue8m0)
    with np.errstate(invalid="ignore"):
        scaled = blocks * (np.float32(1) / scale[:, :, None])
    codes = _unpadded(dtypes.float_to_e2m1(scaled), n)
    packed = (codes[:, 0::2] | (codes[:, 1::2] << 4)).view(np.int8)
    if pack:
        full = np.ones((m, align(scale.shape[1], 4)), np.float32)
        full[:, : scale.shape[1]] = scale
        return _given_back(packed, dtypes.pack_ue8m0(full, where), x)
    return _given_back(packed, scale, x)


def _codes(where: str, packed: Any) -> npt.NDArray[np.uint8]:
    pairs = as_numpy(packed, where)
    if pairs.dtype.itemsize != 1 or pairs.ndim != 2:
        raise ShapeError(
            f"{where}: a {pairs.dtype} array {list(pairs.shape)}, wanted int8 [m, n / 2]; "
            "per_token_cast_to_fp4 makes it"
        )
    pairs = np.ascontiguousarray(pairs).view(np.uint8)
    codes = np.empty((pairs.shape[0], pairs.shape[1] * 2), np.uint8)
    codes[:, 0::2] = pairs & 15
    codes[:, 1::2] = pairs >> 4
    return codes


def transpose_packed_fp4(a: Any) -> Any:
    """[m, n / 2] of two codes a byte becomes [n, m / 2]; m must be even."""
    codes = _codes("transpose_packed_fp4: a", a).T
    if codes.shape[1] % 2:
        raise ShapeError(
            f"transpose_packed_fp4: a has {codes.shape[1]} rows, wanted an even number; add zeros"
        )
    pairs = np.ascontiguousarray(codes[:, 0::2] | (codes[:, 1::2] << 4))
    return restore(pairs.view(np.int8), a)


def cast_back_from_fp4(
    packed: Any, sf: Any, gran_k: int = 128, use_packed_ue8m0: bool = False
) -> Any:
    """The fp32 values [m, n] of `per_token_cast_to_fp4`'s result."""
    where = "cast_back_from_fp4"
    codes = _codes(f"{where}: packed", packed)
    scale, gran_k = as_numpy(sf, f"{where}: sf"), whole(f"{where}: gran_k", gran_k, 1)
    if flag(f"{where}: use_packed_ue8m0", use_packed_ue8m0):
        scale = dtypes.unpack_ue8m0(scale, where)
    n = codes.shape[1]
    if (scale.ndim, scale.shape[:1]) != (2, codes.shape[:1]) or scale.shape[1] * gran_k < n:
        raise ShapeError(
            f"{where}: sf holds scales {list(scale.shape)}, wanted "
            f"{[len(codes), ceil_div(n, gran_k)]}; per_token_cast_to_fp4 makes them"
        )
    wide = np.repeat(scale, min(gran_k, n), axis=1)[:, :n]
    return restore((dtypes.e2m1_to_float(codes) * wide).astype(np.float32), packed)


def _largest(blocks: Floats, axes: int | tuple[int, ...]) -> Floats:
    """Largest magnitudes; NaN where there is one."""
    return np.abs(blocks).max(axis=axes, initial=0)  # type: ignore[no-any-return]
