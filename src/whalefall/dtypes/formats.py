"""The small formats, in numpy: E4M3 and E2M1 values, UE8M0 scales, and how four scales pack.

Rounding is to nearest even, but for E2M1, whose ties go to zero as DeepGEMM's do. NaN stays NaN.
Source: DeepGEMM `deep_gemm/utils/math.py`; OCP Microscaling formats 1.0.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from whalefall.errors import DtypeError, ShapeError

__all__ = [
    "E4M3_MAX",
    "FP4_MAX",
    "ceil_to_ue8m0",
    "e2m1_to_float",
    "e4m3_to_float",
    "float_to_e2m1",
    "float_to_e4m3",
    "float_to_ue8m0",
    "pack_ue8m0",
    "ue8m0_to_float",
    "unpack_ue8m0",
]

E4M3_MAX = 448.0
FP4_MAX = 6.0
Floats = npt.NDArray[np.float32]

_E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_E2M1_CODES = np.concatenate([_E2M1, -_E2M1])
_E2M1_STEPS = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)


def e4m3_to_float(codes: npt.NDArray[Any]) -> Floats:
    """Values of E4M3 codes (uint8, int8 or float8_e4m3fn), exact, NaN included."""
    if codes.dtype.itemsize != 1:
        raise DtypeError(
            f"e4m3_to_float: dtype {codes.dtype}, wanted one byte a value; view it as uint8"
        )
    return _E4M3[codes.view(np.uint8)]


def float_to_e4m3(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Nearest E4M3 (ties to even) as float8_e4m3fn; beyond 464, infinity and NaN become NaN."""
    return np.asarray(values, np.float32).astype(ml_dtypes.float8_e4m3fn)


def ceil_to_ue8m0(values: npt.NDArray[Any]) -> Floats:
    """The power of two at or above |x|, from 2^-126 to 2^127; NaN stays NaN.

    Source: DeepGEMM `ceil_to_ue8m0` (there NaN becomes 2^127).
    """
    x = np.ascontiguousarray(values, np.float32)
    bits = x.view(np.uint32)
    exponent = ((bits >> 23) & 0xFF).astype(np.int32) + ((bits & 0x7FFFFF) != 0)
    powers = (np.clip(exponent, 1, 254).astype(np.uint32) << 23).view(np.float32)
    return np.where(np.isnan(x), np.float32(np.nan), powers)


def float_to_ue8m0(
    values: npt.NDArray[Any], where: str = "float_to_ue8m0"
) -> npt.NDArray[np.uint8]:
    """The exponent byte of each fp32 power of two; NaN is 255. `where` begins a refusal.

    Raises: ShapeError where a value is negative or no power of two: its mantissa would be lost.
    """
    x = np.ascontiguousarray(values, np.float32)
    bits = x.view(np.uint32)
    wrong = ((bits & 0x807FFFFF) != 0) & ~np.isnan(x)
    if wrong.any():
        raise ShapeError(
            f"{where}: scale {x[wrong][0]} is no power of two, wanted one; ceil_to_ue8m0 makes it"
        )
    return np.where(np.isnan(x), 255, bits >> 23).astype(np.uint8)


def ue8m0_to_float(codes: npt.NDArray[np.uint8]) -> Floats:
    """2^(code - 127); code 0 gives 0.0 as DeepGEMM's unpacking does, 255 gives NaN."""
    values = (codes.astype(np.uint32) << 23).view(np.float32)
    return np.where(codes == 255, np.float32(np.nan), values)


def pack_ue8m0(values: npt.NDArray[Any], where: str = "pack_ue8m0") -> npt.NDArray[np.int32]:
    """Four fp32 powers of two of the last axis in one int32, the first in the lowest byte."""
    if values.ndim == 0 or values.shape[-1] % 4:
        raise ShapeError(
            f"{where}: scales {list(values.shape)}, wanted a last axis that is a multiple of 4; "
            "append 1.0"
        )
    codes = np.ascontiguousarray(float_to_ue8m0(values, where))
    return codes.view("<i4").astype(np.int32, copy=False)


def unpack_ue8m0(packed: npt.NDArray[Any], where: str = "unpack_ue8m0") -> Floats:
    """The four scales of each int32, lowest byte first: the last axis grows fourfold."""
    if packed.dtype.itemsize != 4:
        raise DtypeError(
            f"{where}: packed scales are {packed.dtype}, wanted int32; pack_ue8m0_to_int makes them"
        )
    return ue8m0_to_float(np.ascontiguousarray(packed).view(np.uint8))


def float_to_e2m1(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """E2M1 codes 0..15, one a byte: ties to zero, no negative zero; NaN becomes 0.

    Source: DeepGEMM `_quantize_to_fp4_e2m1`.
    """
    x = np.asarray(values, np.float32)
    code = np.searchsorted(_E2M1_STEPS, np.abs(x), side="left").astype(np.uint8)
    code = np.where(np.isnan(x), np.uint8(0), code)
    return np.where((x < 0) & (code != 0), code | 8, code).astype(np.uint8)


def e2m1_to_float(codes: npt.NDArray[np.uint8]) -> Floats:
    """Values of E2M1 codes 0..15, one a byte."""
    return _E2M1_CODES[codes & 15]
