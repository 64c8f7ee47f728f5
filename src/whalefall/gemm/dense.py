"""Dense products in all four layouts: D = C + A · B, after DeepGEMM's `gemm_{nt,nn,tn,tt}`.

In: FP8 (or FP4) pairs or BF16 matrices. Out: written to `d`, added to `c`.
`reference.py` is the definition; sums are two-level (see native/gemm.h).
Source: DeepGEMM `csrc/apis/gemm.hpp`.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from whalefall.arguments import flag, shown
from whalefall.dtypes import KnownCalls, Places, as_numpy, view
from whalefall.errors import ConfigError, DtypeError, ShapeError
from whalefall.gemm.native_calls import product_library
from whalefall.gemm.operands import (
    Operand,
    Pair,
    Recipe,
    Target,
    accumulator,
    all_whole,
    bf16_operand,
    fp8_operand,
    recipes,
    refuse_overlap,
    target,
)
from whalefall.gemm.structs import DenseCall, Product, Segment

__all__ = [
    "bf16_gemm_nn",
    "bf16_gemm_nt",
    "bf16_gemm_tn",
    "bf16_gemm_tt",
    "cublaslt_gemm_nn",
    "cublaslt_gemm_nt",
    "cublaslt_gemm_tn",
    "cublaslt_gemm_tt",
    "fp8_fp4_gemm_nn",
    "fp8_fp4_gemm_nt",
    "fp8_fp4_gemm_tn",
    "fp8_fp4_gemm_tt",
    "fp8_gemm_nn",
    "fp8_gemm_nt",
    "fp8_gemm_nt_skip_head_mid",
    "fp8_gemm_tn",
    "fp8_gemm_tt",
]


_SEGMENT = {"a": 0, "a_scale": 1, "b": 2, "b_scale": 3, "d": 4, "c": 5}
_TO_SEGMENT = {"product.segments": "segment"}
_OF_PAIRS = Places(DenseCall, {f"segment.{k}": i for k, i in _SEGMENT.items()}, None, _TO_SEGMENT)
_PLAIN = {"segment.a": 0, "segment.b": 1, "segment.d": 2, "segment.c": 3}
_OF_MATRICES = Places(DenseCall, _PLAIN, None, _TO_SEGMENT)
_FP8_CALLS = KnownCalls("sppaasssss", written=4, accumulator=5)
_BF16_CALLS = KnownCalls("saaaass", written=2, accumulator=3)


def check_dims(where: str, compiled_dims: str, disable_ue8m0_cast: bool = False) -> None:
    """ConfigError for what changes no result: letters outside "mnk", and a flag that is none."""
    flag(f"{where}: disable_ue8m0_cast", disable_ue8m0_cast)
    if not isinstance(compiled_dims, str) or not set(compiled_dims) <= set("mnk"):
        raise ConfigError(
            f"{where}: compiled_dims={shown(compiled_dims)}, wanted letters of 'mnk'; leave it out"
        )


def check_k(where: str, a: Operand, b: Operand) -> None:
    """ShapeError where the operands' K differ."""
    if a.k != b.k:
        raise ShapeError(
            f"{where}: b has K={b.k}, wanted K={a.k} as a has; give both the same K, or call the "
            "form (nt, nn, tn, tt) whose layout they have"
        )


def product_of(a: Operand, b: Operand, to: Target, add: Target | None = None) -> Product:
    """What all segments of a product of these operands share."""
    product = Product(n=b.rows, d_pitch=to.pitch, a=a.layout, b=b.layout, d_kind=to.kind)
    product.length = min(a.layout.scale_k, b.layout.scale_k)
    product.c_pitch = add.pitch if add else 0
    return product


def scale_dtype(where: str, b: Any) -> str:
    """The dtype of the scales of `b`, a (values, scales) pair; "" for anything else."""
    if isinstance(b, (tuple, list)) and len(b) == 2:
        return view(b[1], f"{where}: scale of b").dtype
    return ""


def multiply(where: str, a: Operand, b: Operand, d: Any, c: Any) -> tuple[Any, DenseCall] | None:
    """D = C + A · Bᵀ of two matrices. Returns: what computed it, if there was anything."""
    check_k(where, a, b)
    to, add = accumulator(where, d, c, (a.rows, b.rows))
    refuse_overlap(where, to.seen, a.views + b.views)
    if a.rows == 0 or b.rows == 0:
        return None
    segment = Segment(*a.at(), *b.at(), to.at(), add.at() if add else 0, a.rows, a.k)
    call = DenseCall(product_of(a, b, to, add), segment)
    call.product.segments = ctypes.addressof(call) + DenseCall.segment.offset
    call.product.num_segments = 1
    entry = product_library().wf_gemm
    entry(ctypes.addressof(call))
    return entry, call


def _fp8(
    where: str,
    layout: str,
    a: Any,
    b: Any,
    d: Any,
    c: Any,
    given_recipes: tuple[Recipe | None, Pair | None, Pair | None],
    compiled_dims: str,
    disable_ue8m0_cast: bool,
) -> None:
    args = (where, a, b, d, c, *given_recipes, compiled_dims, disable_ue8m0_cast)
    if _FP8_CALLS.find(*args):
        return
    check_dims(where, compiled_dims, disable_ue8m0_cast)
    of_a, of_b = recipes(where, scale_dtype(where, b), *given_recipes)
    left = fp8_operand(where, "a", a, of_a, swap=layout[0] == "t")
    right = fp8_operand(where, "b", b, of_b, swap=layout[1] == "n")
    done = multiply(where, left, right, d, c)
    if done:
        _FP8_CALLS.keep(args, _OF_PAIRS, done[1], done[0])


def fp8_fp4_gemm_nt(
    a: Any,
    b: Any,
    d: Any,
    c: Any = None,
    recipe: Recipe | None = None,
    recipe_a: Pair | None = None,
    recipe_b: Pair | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
) -> None:
    """D[M, N] = C + A[M, K] · B[N, K]ᵀ with scaled FP8 (or FP4) operands.

    Args:
        a, b: pairs (values, scales). Values are float8_e4m3fn, contiguous along either axis, or
            int8 with two E2M1 codes a byte; scales float32 [ceil(rows/g), ceil(K/g_k)] with any
            strides, or int32 with four UE8M0 exponents along K.
        d: [M, N] bfloat16 or float32, written.
        c: added, dtype and shape of d; may be d itself.
        recipe: (rows of a, rows of b, k) that share a scale; default (1, 128, 128), with int32
            scales (1, 1, 128). `recipe_a` and `recipe_b` give (rows, k) of each instead.
        compiled_dims, disable_ue8m0_cast: accepted; they change no result here.
    Raises: ShapeError, DtypeError, ConfigError; UnsupportedError where a gradient would be wanted.
    Source: DeepGEMM `fp8_fp4_gemm_nt`, on either GPU generation.
    """
    shares = (recipe, recipe_a, recipe_b)
    _fp8("fp8_gemm_nt", "nt", a, b, d, c, shares, compiled_dims, disable_ue8m0_cast)


def fp8_fp4_gemm_nn(
    a: Any,
    b: Any,
    d: Any,
    c: Any = None,
    recipe: Recipe | None = None,
    recipe_a: Pair | None = None,
    recipe_b: Pair | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
) -> None:
    """D = C + A[M, K] · B[K, N]; `fp8_fp4_gemm_nt` with b and its scales transposed."""
    shares = (recipe, recipe_a, recipe_b)
    _fp8("fp8_gemm_nn", "nn", a, b, d, c, shares, compiled_dims, disable_ue8m0_cast)


def fp8_fp4_gemm_tn(
    a: Any,
    b: Any,
    d: Any,
    c: Any = None,
    recipe: Recipe | None = None,
    recipe_a: Pair | None = None,
    recipe_b: Pair | None = None,
    compiled_dims: str = "mn",
    disable_ue8m0_cast: bool = False,
) -> None:
    """D = C + A[K, M]ᵀ · B[K, N]; `fp8_fp4_gemm_nt` with both and their scales transposed."""
    shares = (recipe, recipe_a, recipe_b)
    _fp8("fp8_gemm_tn", "tn", a, b, d, c, shares, compiled_dims, disable_ue8m0_cast)


def fp8_fp4_gemm_tt(
    a: Any,
    b: Any,
    d: Any,
    c: Any = None,
    recipe: Recipe | None = None,
    recipe_a: Pair | None = None,
    recipe_b: Pair | None = None,
    compiled_dims: str = "mn",
    disable_ue8m0_cast: bool = False,
) -> None:
    """D = C + A[K, M]ᵀ · B[N, K]ᵀ; `fp8_fp4_gemm_nt` with a and its scales transposed."""
    shares = (recipe, recipe_a, recipe_b)
    _fp8("fp8_gemm_tt", "tt", a, b, d, c, shares, compiled_dims, disable_ue8m0_cast)


fp8_gemm_nt, fp8_gemm_nn = fp8_fp4_gemm_nt, fp8_fp4_gemm_nn
fp8_gemm_tn, fp8_gemm_tt = fp8_fp4_gemm_tn, fp8_fp4_gemm_tt


def fp8_gemm_nt_skip_head_mid(
    a: Any,
    b: Any,
    d: Any,
    head_splits: tuple[int, int, int],
    recipe: Recipe | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
) -> None:
    """A · Bᵀ, written around a gap in each head.

    Column n goes to n + (n + right) // (left + right) · mid.

    Args:
        a, b, recipe, compiled_dims, disable_ue8m0_cast: as in `fp8_fp4_gemm_nt`.
        d: [M, N + N / (left + right) · mid]; columns of the gaps are left alone.
        head_splits: (left, mid, right), N a multiple of left + right.
    Source: DeepGEMM `fp8_gemm_nt_skip_head_mid`.
    """
    where = "fp8_gemm_nt_skip_head_mid"
    check_dims(where, compiled_dims, disable_ue8m0_cast)
    of_a, of_b = recipes(where, scale_dtype(where, b), recipe, None, None)
    left_operand = fp8_operand(where, "a", a, of_a)
    right_operand = fp8_operand(where, "b", b, of_b)
    if not all_whole(head_splits, 3):
        raise ConfigError(
            f"{where}: head_splits={shown(head_splits)}, wanted (left, mid, right); pass three "
            "whole numbers"
        )
    left, mid, right = head_splits
    n = right_operand.rows
    if min(head_splits) < 0 or left + right < 1 or n % (left + right):
        raise ShapeError(
            f"{where}: head_splits={head_splits}, wanted N={n} % (left + right) == 0; left + right "
            "is the width of a head of b"
        )
    wide = (left_operand.rows, n + n // (left + right) * mid)
    to = target(where, "d", d, wide)
    refuse_overlap(where, to.seen, left_operand.views + right_operand.views)
    out = as_numpy(d)
    narrow = np.empty((left_operand.rows, n), out.dtype)
    multiply(where, left_operand, right_operand, narrow, None)
    columns = np.arange(n)
    out[:, columns + (columns + right) // (left + right) * mid] = narrow


def _bf16(
    where: str,
    layout: str,
    a: Any,
    b: Any,
    d: Any,
    c: Any,
    compiled_dims: str = "",
    plain_fp8: bool = False,
) -> None:
    args = (where, a, b, d, c, compiled_dims, plain_fp8)
    if _BF16_CALLS.find(*args):
        return
    check_dims(where, compiled_dims)
    left = bf16_operand(where, "a", a, swap=layout[0] == "t", plain_fp8=plain_fp8)
    right = bf16_operand(where, "b", b, swap=layout[1] == "n", plain_fp8=plain_fp8)
    if left.layout.kind != right.layout.kind:
        raise DtypeError(
            f"{where}: a is {left.views[0].dtype} and b {right.views[0].dtype}, wanted one "
            "dtype; convert one of them"
        )
    done = multiply(where, left, right, d, c)
    if done:
        _BF16_CALLS.keep(args, _OF_MATRICES, done[1], done[0])


def bf16_gemm_nt(a: Any, b: Any, d: Any, c: Any = None, compiled_dims: str = "nk") -> None:
    """D[M, N] = C + A[M, K] · B[N, K]ᵀ of bfloat16 matrices, summed in fp32.

    Args:
        a, b: bfloat16, contiguous along either axis.
        d, c: bfloat16 or float32, as in `fp8_fp4_gemm_nt`.
    Source: DeepGEMM `bf16_gemm_nt`.
    """
    _bf16("bf16_gemm_nt", "nt", a, b, d, c, compiled_dims)


def bf16_gemm_nn(a: Any, b: Any, d: Any, c: Any = None, compiled_dims: str = "nk") -> None:
    """D = C + A[M, K] · B[K, N]; see `bf16_gemm_nt`."""
    _bf16("bf16_gemm_nn", "nn", a, b, d, c, compiled_dims)


def bf16_gemm_tn(a: Any, b: Any, d: Any, c: Any = None, compiled_dims: str = "mn") -> None:
    """D = C + A[K, M]ᵀ · B[K, N]; see `bf16_gemm_nt`."""
    _bf16("bf16_gemm_tn", "tn", a, b, d, c, compiled_dims)


def bf16_gemm_tt(a: Any, b: Any, d: Any, c: Any = None, compiled_dims: str = "mn") -> None:
    """D = C + A[K, M]ᵀ · B[N, K]ᵀ; see `bf16_gemm_nt`."""
    _bf16("bf16_gemm_tt", "tt", a, b, d, c, compiled_dims)


def cublaslt_gemm_nt(a: Any, b: Any, d: Any, c: Any = None) -> None:
    """`bf16_gemm_nt` by the name of the original's cuBLASLt path; a and b also E4M3, unscaled."""
    _bf16("cublaslt_gemm_nt", "nt", a, b, d, c, plain_fp8=True)


def cublaslt_gemm_nn(a: Any, b: Any, d: Any, c: Any = None) -> None:
    """`bf16_gemm_nn` by the name of the original's cuBLASLt path; a and b also E4M3, unscaled."""
    _bf16("cublaslt_gemm_nn", "nn", a, b, d, c, plain_fp8=True)


def cublaslt_gemm_tn(a: Any, b: Any, d: Any, c: Any = None) -> None:
    """`bf16_gemm_tn` by the name of the original's cuBLASLt path; a and b also E4M3, unscaled."""
    _bf16("cublaslt_gemm_tn", "tn", a, b, d, c, plain_fp8=True)


def cublaslt_gemm_tt(a: Any, b: Any, d: Any, c: Any = None) -> None:
    """`bf16_gemm_tt` by the name of the original's cuBLASLt path; a and b also E4M3, unscaled."""
    _bf16("cublaslt_gemm_tt", "tt", a, b, d, c, plain_fp8=True)
