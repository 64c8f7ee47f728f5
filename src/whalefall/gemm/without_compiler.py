"""The native entries of this room in numpy, for machines without a C++ compiler.

In: the structs that the native units take, by address, checked already. Out: the same results, by
the float64 definitions of `reference.py`, rounded once. Slow; operands and results are float64
a few megabytes at a time. Last bits may depend on the shape of a call, as BLAS's do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from whalefall.dtypes import NUMPY_DTYPES, View, e4m3_to_float, over_memory
from whalefall.gemm.casts import per_token_cast_to_fp8
from whalefall.gemm.reference import dequantize, product
from whalefall.gemm.structs import (
    ACTIVATIONS,
    KINDS,
    PACKED,
    Expert,
    ExpertsCall,
    Input,
    Layout,
    LinearCall,
    Output,
    Product,
    Weight,
)

__all__ = ["wf_experts", "wf_gemm", "wf_linear", "wf_pack"]

Doubles = npt.NDArray[np.float64]
BLOCK = 128  # rows and columns of a weight that share a scale
_TILE = 1 << 22  # float64 values of an operand, or of a result, at a time
_NAMES = {kind: name for name, kind in KINDS.items()}
_PAIRS_ALONG_ROWS = 2


# NaN and infinity are results like others: no warnings
@np.errstate(all="ignore")
def wf_gemm(address: int) -> None:
    """All segments of a `Product`."""
    call = Product.from_address(address)
    segments = over_memory(View(call.segments, (call.num_segments, 8), (8, 1), "int64"))
    kind = _NAMES[call.d_kind]
    for a, a_scale, b, b_scale, d, c, m, k in segments.tolist():
        to = over_memory(View(d, (m, call.n), (call.d_pitch, 1), kind))
        add = over_memory(View(c, (m, call.n), (call.c_pitch, 1), kind)) if c else None
        for rows in _tiles(m, max(k, math.isqrt(_TILE))):
            left = _operand(call.a, a, a_scale, rows, k)
            for columns in _tiles(call.n, max(k, rows.stop - rows.start)):
                right = _operand(call.b, b, b_scale, columns, k)
                sums = product(left, right).astype(np.float32)
                if add is not None:
                    sums += add[rows, columns].astype(np.float32)
                to[rows, columns] = sums


def _tiles(rows: int, width: int) -> Iterator[slice]:
    """`rows` in pieces that begin at multiples of what shares a scale."""
    step = max(BLOCK, _TILE // max(1, width) // BLOCK * BLOCK)
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def _operand(layout: Layout, data: int, scales: int, rows: slice, k: int) -> Doubles:
    """Some rows of an operand in float64; `rows` begins at a multiple of `scale_rows`."""
    count, strides = rows.stop - rows.start, (layout.row_stride, layout.k_stride)
    if layout.kind == KINDS["bfloat16"]:
        begin = data + rows.start * layout.row_stride * 2
        return over_memory(View(begin, (count, k), strides, "bfloat16")).astype(np.float64)
    along_rows = layout.packing == _PAIRS_ALONG_ROWS
    shape = (-(-count // 2), k) if along_rows else (count, k // 2 if layout.packing else k)
    begin = data + rows.start // (2 if along_rows else 1) * layout.row_stride
    dtype = "int8" if layout.packing else "float8_e4m3fn"
    values = over_memory(View(begin, shape, strides, dtype))
    if not scales:
        return e4m3_to_float(np.ascontiguousarray(values)).astype(np.float64)
    gran, size = layout.scale_rows, (-(-count // layout.scale_rows), -(-k // layout.scale_k))
    begin = scales + rows.start // gran * layout.scale_row_stride * 4
    steps = (layout.scale_row_stride, layout.scale_k_stride)
    scale = over_memory(View(begin, size, steps, "float32"))
    if along_rows:
        return dequantize(values.T, scale.T, layout.scale_k, gran).T[:count]
    return dequantize(values, scale, gran, layout.scale_k)


@np.errstate(all="ignore")
def wf_linear(address: int) -> None:
    """A `LinearCall`: y = x · Wᵀ."""
    call = LinearCall.from_address(address)
    w, to = call.weight, _result(call.y, call.count, call.weight.rows)
    for rows in _tiles(call.count, max(w.rows, w.cols)):
        x = _activations(call.x, call.count, w.cols, rows, call.activations)
        to[rows] = _times(x, w).astype(np.float32)


@np.errstate(all="ignore")
def wf_experts(address: int) -> None:
    """An `ExpertsCall`: one chosen expert after another, over the rows that chose it."""
    call = ExpertsCall.from_address(address)
    total = call.tokens * call.topk
    experts = (Expert * call.num_experts).from_address(call.experts)
    hidden = experts[0].w1.cols
    chosen = over_memory(View(call.topk_idx, (total,), (1,), "int32"))
    to = _result(call.rows, total, hidden)
    to[chosen < 0] = 0
    factor = np.ones(total, np.float32)
    if call.rows.factor:
        factor = over_memory(View(call.rows.factor, (total,), (1,), "float32"))
    for expert in np.unique(chosen[chosen >= 0]).tolist():
        its_rows = np.flatnonzero(chosen == expert)
        for part in _tiles(len(its_rows), max(hidden, experts[expert].w1.rows)):
            rows = its_rows[part]
            x = _activations(call.x, call.tokens, hidden, rows // call.topk, call.activations)
            result = _expert(experts[expert], x, call.activations)
            to[rows] = (result * factor[rows, None]).astype(np.float32)


def _expert(of: Expert, x: Doubles, activations: int) -> Doubles:
    gate = _times(x, of.w1)
    middle = gate / (1 + np.exp(-gate)) * _times(x, of.w3)
    if activations == ACTIVATIONS["e4m3"]:
        middle = _quantized(middle.astype(np.float32))
    return _times(middle, of.w2)


def wf_pack(address: int, count: int, cols: int, to: int) -> None:
    """Rows of an `Input` quantised as W8A8 does: codes up to the next 128, then scales."""
    blocks = -(-cols // BLOCK)
    padded = np.zeros((count, blocks * BLOCK), np.float32)
    padded[:, :cols] = _plain(Input.from_address(address), count, cols)
    codes, scales = per_token_cast_to_fp8(padded, False, BLOCK)
    width = blocks * (BLOCK + 4)
    packed = over_memory(View(to, (count, width), (width, 1), "uint8"))
    packed[:, : blocks * BLOCK] = codes.view(np.uint8)
    packed[:, blocks * BLOCK :] = scales.view(np.uint8)


def _plain(x: Input, count: int, cols: int) -> npt.NDArray[Any]:
    return over_memory(View(x.data, (count, cols), (x.pitch, 1), _NAMES[x.kind]))


def _activations(x: Input, count: int, cols: int, rows: Any, activations: int) -> Doubles:
    """What some rows of x are to a product: kept, or of E4M3 codes.

    There is no rounding to bf16 here: native units round where bf16 dots make that pay.
    """
    if x.kind != PACKED:
        plain = _plain(x, count, cols)[rows]
        quantize = activations == ACTIVATIONS["e4m3"]
        return _quantized(plain) if quantize else plain.astype(np.float64)
    blocks = -(-cols // BLOCK)
    width = blocks * (BLOCK + 4)
    packed = over_memory(View(x.data, (count, width), (x.pitch, 1), "uint8"))[rows]
    scales = np.ascontiguousarray(packed[:, blocks * BLOCK :]).view(np.float32)
    return dequantize(packed[:, :cols].view(NUMPY_DTYPES["float8_e4m3fn"]), scales, 1, BLOCK)


def _quantized(x: npt.NDArray[Any]) -> Doubles:
    codes, scales = per_token_cast_to_fp8(x, False, BLOCK)
    return dequantize(codes, scales, 1, BLOCK)


def _result(y: Output, count: int, width: int) -> npt.NDArray[Any]:
    return over_memory(View(y.data, (count, width), (y.pitch, 1), _NAMES[y.kind]))


def _times(x: Doubles, weight: Weight) -> Doubles:
    """x · Wᵀ, a few rows of the weight at a time."""
    y = np.empty((len(x), weight.rows))
    for rows in _tiles(weight.rows, weight.cols):
        y[:, rows] = product(x, _weight(weight, rows))
    return y


def _weight(weight: Weight, rows: slice) -> Doubles:
    """Some rows in float64."""
    name, count, cols = _NAMES[weight.kind], rows.stop - rows.start, weight.cols
    begin = weight.data + rows.start * cols * NUMPY_DTYPES[name].itemsize
    values = over_memory(View(begin, (count, cols), (cols, 1), name))
    if name != "float8_e4m3fn":
        return values.astype(np.float64)
    block = (weight.first_row + np.arange(rows.start, rows.stop)) // BLOCK
    shape = (math.ceil((weight.first_row + weight.rows) / BLOCK), -(-cols // BLOCK))
    scales = over_memory(View(weight.scale, shape, (weight.scale_pitch, 1), "float32"))
    return dequantize(values, scales[block], 1, BLOCK)
