"""Linear layers over weights as checkpoints hold them, and the experts of a step.

`fp8_linear` keeps activations as they are (W8A16) or quantises them as published (W8A8);
`linear` does the same for BF16 and FP32 weights; `fused_experts` runs gate, up, SiLU and down of
all selected experts in one native call. Within a form, a row's bits depend on nothing but the row.
Source: DeepSeek-V3 technical report 3.3; `native/linear.h`, `native/experts.h`.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from whalefall import jit
from whalefall.arguments import flag, shown
from whalefall.dtypes import KnownCalls, Places, Result, View, as_numpy, refuse_gradient, view
from whalefall.dtypes.written import written
from whalefall.errors import ConfigError, DtypeError, ShapeError
from whalefall.gemm.native_calls import library
from whalefall.gemm.operands import OUT_TYPES, refuse_dtype, refuse_overlap, result_or_new
from whalefall.gemm.structs import (
    ACTIVATIONS,
    FORMS,
    KINDS,
    PACKED,
    Expert,
    ExpertsCall,
    Input,
    LinearCall,
    Output,
    Weight,
)
from whalefall.jit import machine

__all__ = [
    "ExpertWeights",
    "fp8_linear",
    "fused_experts",
    "linear",
    "packed_width",
    "quantize_rows",
]

Form = Literal["few", "many"]
# From here on packing a panel pays: the default form of a call; with AMX, which gives the same bits
# in both.
MANY_ROWS, MANY_ROWS_OF_TILES = 32, 17


class ExpertWeights(NamedTuple):
    """One expert: gate `w1` and up `w3` [I, H], down `w2` [H, I], each with its block scales.

    The scales are [ceil(rows / 128), ceil(cols / 128)] fp32, or None for BF16 and FP32 weights.
    """

    w1: Any
    w3: Any
    w2: Any
    w1_scale: Any = None
    w3_scale: Any = None
    w2_scale: Any = None


def fp8_linear(
    x: Any,
    weight: Any,
    scale: Any,
    form: Form | None = None,
    *,
    quantize_activations: bool = False,
    out: Any = None,
    out_dtype: str | None = None,
) -> Any:
    """y = x · (weight · scale)ᵀ for a weight quantised in 128×128 blocks.

    Args:
        x: [M, K] float32 or bfloat16, stride 1 along K.
        weight: [N, K] float8_e4m3fn, contiguous, at any address.
        scale: [ceil(N/128), ceil(K/128)] float32, contiguous.
        form: "few" streams the weight once per 32 rows, "many" decodes panels for hundreds of rows;
            None: by M. A row's bits depend on the form, never on M.
        quantize_activations: make each 128 of a row E4M3 first (W8A8); False keeps them (W8A16).
        out: [M, N] float32 or bfloat16 to write; None allocates with the library of `x`.
        out_dtype: of the result, default x's; where `out` is given it must be `out`'s.
    Returns: `out`, without a gradient.
    Raises: ShapeError, DtypeError, ConfigError: one line each; UnsupportedError where a gradient
        would be wanted.
    """
    return _run_linear("fp8_linear", x, (weight, scale), form, quantize_activations, out, out_dtype)


def linear(
    x: Any,
    weight: Any,
    form: Form | None = None,
    *,
    out: Any = None,
    out_dtype: str | None = None,
) -> Any:
    """y = x · weightᵀ for a BF16 or FP32 weight [N, K]; arguments as `fp8_linear`'s."""
    return _run_linear("linear", x, (weight, None), form, False, out, out_dtype)


def fused_experts(
    x: Any,
    experts: Sequence[ExpertWeights] | ctypes.Array[Expert],
    topk_idx: Any,
    form: Form | None = None,
    *,
    topk_weights: Any = None,
    quantize_activations: bool = False,
    half_activations: bool = False,
    out: Any = None,
    out_dtype: str | None = None,
) -> Any:
    """rows[t, j] = w2 · (silu(w1 · x[t]) · (w3 · x[t])) of expert topk_idx[t, j].

    Args:
        x: [T, H] float32 or bfloat16; with `quantize_activations` also what `quantize_rows` made
            of them, which gives the same bits.
        experts: each expert's weights, or `expert_structs` of them (made once, kept).
        topk_idx: [T, top-k] int32 or int64; a negative index: none, its row is zero.
        form: as in `fp8_linear`; None: by the rows an expert gets on average.
        topk_weights: [T, top-k] float32; row (t, j) is multiplied by its weight before rounding.
        quantize_activations: W8A8 for both products.
        half_activations: round an fp32 x, and the hidden row silu(w1 · x) · (w3 · x), to bf16 where
            the machine's bf16 dots are fast; with a bf16 x the hidden row is rounded there anyhow.
        out: [T, top-k, H]; None allocates in `out_dtype` (default bfloat16).
    Returns: one row per selection in top-k order; adding them up is the caller's.
    Raises: as `fp8_linear`; DtypeError also where w1 and w3, or two experts, differ in dtype.
    """
    quantize_activations = flag("fused_experts: quantize_activations", quantize_activations)
    half_activations = flag("fused_experts: half_activations", half_activations)
    held = isinstance(experts, ctypes.Array) and experts._type_ is Expert
    refuse_gradient("fused_experts", (x, topk_weights, out), _TRAINED, _GIVEN_ROWS)
    structs: Any = experts if held else expert_structs(experts)  # type: ignore[arg-type]
    x_view, idx = view(x, "fused_experts: x"), view(topk_idx, "fused_experts: topk_idx")
    tokens, topk, hidden = _check_selection(structs, x_view, idx, quantize_activations)
    index = np.ascontiguousarray(_numpy_int32(topk_idx, idx, len(structs)))
    fresh, shape = out is None, (tokens, topk, hidden)
    out = result_or_new("fused_experts", x, shape, out, out_dtype, "bfloat16")
    rows = written(out, "fused_experts: out")
    if rows.shape != shape or not rows.contiguous or rows.dtype not in OUT_TYPES:
        raise ShapeError(
            f"fused_experts: out is {rows.dtype} {list(rows.shape)}, wanted contiguous float32 or "
            f"bfloat16 {[tokens, topk, hidden]}; leave it out for a new one"
        )
    if not fresh:
        refuse_overlap("fused_experts", rows, (x_view, idx), "out")
        _refuse_over_weights(rows, structs)
    call = ExpertsCall()
    call.experts, call.num_experts = ctypes.addressof(structs), len(structs)
    call.topk_idx, call.tokens, call.topk = index.ctypes.data, tokens, topk
    call.x = _input(x_view)
    call.rows = Output(rows.address, hidden, None, None, KINDS[rows.dtype], 0)
    if topk_weights is not None:
        factors = view(topk_weights, "fused_experts: topk_weights")
        if factors.shape != (tokens, topk) or factors.dtype != "float32" or not factors.contiguous:
            raise ShapeError(
                f"fused_experts: topk_weights is {factors.dtype} {list(factors.shape)}, wanted "
                f"contiguous float32 {[tokens, topk]}; convert or copy it"
            )
        refuse_overlap("fused_experts", rows, (factors,), "out")
        call.rows.factor = factors.address
    mean = tokens * topk / max(1, len(structs))
    call.form = _form(form, mean, "fused_experts")
    call.activations = ACTIVATIONS[
        "e4m3" if quantize_activations else "half" if half_activations else "keep"
    ]
    library().wf_experts(ctypes.addressof(call))
    return out


_KIND_NAMES = {kind: name for name, kind in KINDS.items()}


def expert_structs(experts: Sequence[ExpertWeights]) -> ctypes.Array[Expert]:
    """The native description of experts; keep the arrays alive as long as it is used."""
    where, listed = "fused_experts", isinstance(experts, (list, tuple))
    if not listed or not all(isinstance(e, ExpertWeights) for e in experts):
        raise DtypeError(
            f"{where}: experts is a {type(experts).__name__}, wanted a list of ExpertWeights; "
            "make one for each expert"
        )
    for i, e in enumerate(experts):
        refuse_gradient(where, e, _TRAINED, [f"expert {i}: {name}" for name in e._fields])
    structs = (Expert * len(experts))()
    for i, e in enumerate(experts):
        structs[i].w1 = weight_struct(e.w1, e.w1_scale, f"{where}: expert {i}: w1")
        structs[i].w3 = weight_struct(e.w3, e.w3_scale, f"{where}: expert {i}: w3")
        structs[i].w2 = weight_struct(e.w2, e.w2_scale, f"{where}: expert {i}: w2")
        shapes = [(w.rows, w.cols) for w in (structs[i].w1, structs[i].w3, structs[i].w2)]
        first = (structs[0].w1.rows, structs[0].w1.cols)
        if shapes != (wanted := [first, first, first[::-1]]):
            raise ShapeError(
                f"{where}: expert {i}: w1, w3, w2 are {shapes}, wanted {wanted}; "
                "w2 is [H, I], w1 and w3 [I, H]"
            )
    refuse_mixed_kinds(where, structs)
    return structs


def _refuse_over_weights(rows: View, structs: ctypes.Array[Expert]) -> None:
    """ShapeError where a result meets an expert's weights or scales: all experts in a few steps,
    because hundreds of them one by one would take as long as a decode step."""
    words = np.frombuffer(memoryview(structs), np.int64).reshape(-1, ctypes.sizeof(Weight) // 8)
    data, scale, count, cols, pitch, first_row, kind = words.T
    size = np.where(kind == KINDS["float32"], 4, np.where(kind == KINDS["bfloat16"], 2, 1))
    starts = np.concatenate([data, scale])
    lengths = np.concatenate([count * cols * size, -(-(first_row + count) // 128) * pitch * 4])
    end = rows.address + math.prod(rows.shape) * (4 if rows.dtype == "float32" else 2)
    met = np.flatnonzero((starts < end) & (rows.address < starts + lengths) & (starts != 0))
    if len(met) and end > rows.address:
        part, number = ("weights", "scales")[met[0] // len(data)], met[0] % len(data) // 3
        raise ShapeError(
            f"fused_experts: out (bytes {rows.address:#x} to {end:#x}) overlaps an input: expert "
            f"{number}'s {part}; give it memory of its own"
        )


def refuse_mixed_kinds(where: str, structs: ctypes.Array[Expert]) -> None:
    """DtypeError where experts differ in dtype: rows are prepared once, for expert 0's weights."""
    for i, e in enumerate(structs):
        kinds = [w.kind for w in (e.w1, e.w3, e.w2)]
        wanted = [structs[0].w1.kind, structs[0].w1.kind, structs[0].w2.kind]
        if kinds != wanted:
            got, want = (", ".join(_KIND_NAMES[kind] for kind in of) for of in (kinds, wanted))
            raise DtypeError(
                f"{where}: expert {i}: w1, w3, w2 are {got}, wanted {want} as of expert 0; "
                "convert them to one dtype"
            )


def weight_struct(weight: Any, scale: Any, name: str, first_row: int = 0) -> Weight:
    """The native description of a weight matrix.

    Args:
        weight: [N, K] float8_e4m3fn, bfloat16 or float32, contiguous.
        scale: block scales of the whole matrix, for float8 only.
        first_row: where `weight` starts in that whole matrix.
    """
    w = view(weight, f"{name}: weight")
    refuse_dtype(f"{name}: weight", w, tuple(KINDS))
    if len(w.shape) != 2 or not w.contiguous:
        raise ShapeError(
            f"{name}: weight has shape {list(w.shape)} and strides {list(w.strides)}, wanted "
            "[N, K] without gaps; make it contiguous"
        )
    rows, cols = w.shape
    if (w.dtype == "float8_e4m3fn") != (scale is not None):
        raise DtypeError(
            f"{name}: weight is {w.dtype} and its scale {'missing' if scale is None else 'given'}; "
            "float8 weights have block scales, wanted none for others"
        )
    if scale is None:
        return Weight(w.address, None, rows, cols, 0, first_row, KINDS[w.dtype], 0)
    s = view(scale, f"{name}: scale")
    blocks = (-(-(first_row + rows) // 128), -(-cols // 128))
    fits = len(s.shape) == 2 and s.shape[1] == blocks[1] and s.shape[0] >= blocks[0]
    if not fits or s.dtype != "float32" or not s.contiguous:
        raise ShapeError(
            f"{name}: scale is {s.dtype} {list(s.shape)} with strides {list(s.strides)}, wanted "
            f"contiguous float32 {list(blocks)} = [ceil(N={rows} / 128), ceil(K={cols} / 128)]; "
            "per_block_cast_to_fp8 makes it"
        )
    return Weight(w.address, s.address, rows, cols, blocks[1], first_row, KINDS[w.dtype], 0)


_IN = {"x.data": 0, "weight.data": 1, "weight.scale": 2}
_GIVEN, _NEW = Places(LinearCall, {**_IN, "y.data": 3}), Places(LinearCall, _IN, {"y.data": 0})
_CALLS = KnownCalls("aaaasss", written=3, returns=3)
_GIVEN_ROWS = ("x", "topk_weights", "out")
_TRAINED = ", or train with whalefall.train, whose layers have one"


def _run_linear(
    name: str,
    x: Any,
    weight: tuple[Any, Any],
    form: Form | None,
    quantize: bool,
    out: Any,
    out_dtype: str | None,
) -> Any:
    args = (x, *weight, out, form, quantize, out_dtype)
    if (known := _CALLS.find(*args)) is not None:
        return known
    quantize = flag(f"{name}: quantize_activations", quantize)
    refuse_gradient(name, (x, *weight, out), _TRAINED, ("x", "weight", "scale", "out"))
    call = LinearCall(weight_struct(*weight, name))
    seen = view(x, f"{name}: x")
    rows, cols = call.weight.rows, call.weight.cols
    if len(seen.shape) != 2 or seen.shape[1] != cols or _gaps(seen):
        raise ShapeError(
            f"{name}: x has shape {list(seen.shape)} and strides {list(seen.strides)}, wanted "
            f"[M, K={cols}] with stride 1 along K; make it contiguous"
        )
    refuse_dtype(f"{name}: x", seen, OUT_TYPES)
    out = result_or_new(name, x, (seen.shape[0], rows), out, out_dtype, seen.dtype)
    y = written(out, f"{name}: out")
    if y.shape != (seen.shape[0], rows) or y.dtype not in OUT_TYPES or _gaps(y):
        raise ShapeError(
            f"{name}: out is {y.dtype} {list(y.shape)} with strides {list(y.strides)}, wanted "
            f"float32 or bfloat16 {[seen.shape[0], rows]} with stride 1 along N; leave it out"
        )
    refuse_overlap(name, y, tuple(view(a) for a in (x, *weight) if a is not None), "out")
    call.x = _input(seen)
    call.y = Output(y.address, y.strides[0], None, None, KINDS[y.dtype], 0)
    call.count = seen.shape[0]
    call.form = _form(form, seen.shape[0], name)
    call.activations = ACTIVATIONS["e4m3" if quantize else "keep"]
    (run := library().wf_linear)(ctypes.addressof(call))
    if args[3] is None:
        _CALLS.keep(args, _NEW, call, run, (Result(x, y.shape, y.dtype),))
    else:
        _CALLS.keep(args, _GIVEN, call, run)
    return out


def _gaps(seen: View) -> bool:
    return 0 not in seen.shape and seen.shape[1] > 1 and seen.strides[1] != 1


def _input(seen: View) -> Input:
    kind = PACKED if seen.dtype == "uint8" else KINDS[seen.dtype]
    return Input(seen.address, seen.strides[0], kind, 0)


def packed_width(hidden: int) -> int:
    """Bytes of a row of `quantize_rows`: E4M3 codes up to the next 128, then fp32 scales."""
    return -(-hidden // 128) * (128 + 4)


def quantize_rows(x: Any) -> np.ndarray[Any, Any]:
    """Rows as W8A8 products quantise them, packed: what `fused_experts` can be given instead of x.

    Args:
        x: [T, H] float32 or bfloat16, stride 1 along H.
    Returns: [T, packed_width(H)] uint8.
    Raises: ShapeError, DtypeError.
    """
    seen = view(x, "quantize_rows: x")
    if len(seen.shape) != 2 or _gaps(seen):
        raise ShapeError(
            f"quantize_rows: x has shape {list(seen.shape)} and strides {list(seen.strides)}, "
            "wanted [T, H] with stride 1 along H; make it contiguous"
        )
    refuse_dtype("quantize_rows: x", seen, OUT_TYPES)
    rows, hidden = seen.shape
    packed = np.empty((rows, packed_width(hidden)), np.uint8)
    given = _input(seen)
    library().wf_pack(ctypes.addressof(given), rows, hidden, packed.ctypes.data)
    return packed


def _form(form: str | None, rows: float, name: str) -> int:
    if form is None:
        tiles = machine.tile_is_fast(jit.best_level())
        return FORMS["many" if rows >= (MANY_ROWS_OF_TILES if tiles else MANY_ROWS) else "few"]
    if not isinstance(form, str) or form not in FORMS:
        raise ConfigError(f"{name}: form is {shown(form)}, wanted 'few', 'many' or None; omit it")
    return FORMS[form]


def _check_selection(
    structs: ctypes.Array[Expert], x: View, idx: View, quantize: bool
) -> tuple[int, int, int]:
    if len(structs) == 0:
        raise ShapeError("fused_experts: experts is empty, wanted at least one; add one")
    hidden = structs[0].w1.cols
    packed = x.dtype == "uint8" and quantize
    width = packed_width(hidden) if packed else hidden
    if len(x.shape) != 2 or x.shape[1] != width or _gaps(x):
        raise ShapeError(
            f"fused_experts: x has shape {list(x.shape)} and strides {list(x.strides)}, wanted "
            f"[T, {width}] of H={hidden} with stride 1 along H; make it contiguous"
        )
    refuse_dtype("fused_experts: x", x, ("uint8",) if packed else OUT_TYPES)
    if len(idx.shape) != 2 or idx.shape[0] != x.shape[0]:
        raise ShapeError(
            f"fused_experts: topk_idx has shape {list(idx.shape)}, wanted [T={x.shape[0]}, "
            "top-k]; give each row of x its experts"
        )
    refuse_dtype("fused_experts: topk_idx", idx, ("int32", "int64"))
    return x.shape[0], idx.shape[1], hidden


def _numpy_int32(topk_idx: Any, idx: View, num_experts: int) -> np.ndarray[Any, Any]:
    index = as_numpy(topk_idx)
    if index.size and int(index.max()) >= num_experts:
        raise ShapeError(
            f"fused_experts: topk_idx holds {int(index.max())}, wanted less than {num_experts} "
            "experts; a negative index means none"
        )
    # Any negative index means none: clamped first, because narrowing would wrap -2**32 to 0.
    return np.maximum(index, -1).astype(np.int32, copy=False)
