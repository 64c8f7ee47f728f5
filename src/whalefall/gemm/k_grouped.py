"""Products whose K is divided among groups: D[g] = C[g] + A_gᵀ · B_g, weight gradients.

Source: DeepGEMM `k_grouped_fp8_gemm_{tn,nt}_contiguous`, `k_grouped_bf16_gemm_tn_contiguous`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np

from whalefall.arguments import flag, shown
from whalefall.dtypes import View, as_numpy, refuse_gradient, unpack_ue8m0, view
from whalefall.errors import ConfigError, DtypeError, ShapeError
from whalefall.gemm.calls import run
from whalefall.gemm.config import get_mk_alignment_for_contiguous_layout
from whalefall.gemm.dense import check_dims
from whalefall.gemm.operands import (
    BF16,
    FP8,
    Recipe,
    Target,
    accumulator,
    all_whole,
    empty_segments,
    int32_array,
    refuse_overlap,
    value_pair,
)
from whalefall.gemm.structs import Layout, Product

__all__ = [
    "k_grouped_bf16_gemm_tn_contiguous",
    "k_grouped_fp8_gemm_nt_contiguous",
    "k_grouped_fp8_gemm_tn_contiguous",
]


_PARTS = ("a", "scale of a", "b", "scale of b")


def _unpacked(where: str, name: str, scales: Any, gran_k: int, counts: list[int]) -> Any:
    """Scales [sum of blocks, mn] in fp32; int32 rows hold four blocks, each group on a new row."""
    values = as_numpy(scales, f"{where}: scale of {name}")
    if values.ndim != 2:
        raise ShapeError(
            f"{where}: scale of {name} has shape {list(values.shape)}, wanted 2 axes; reshape it"
        )
    if values.dtype == np.float32:
        if values.shape[0] != sum(counts):
            raise ShapeError(
                f"{where}: scale of {name} has {values.shape[0]} rows, wanted {sum(counts)}: one "
                f"for each {gran_k} of every group's K; per_channel_cast_to_fp8 makes it"
            )
        return values
    if values.dtype != np.int32:
        raise DtypeError(
            f"{where}: scale of {name} is {values.dtype}, wanted float32 or int32; convert it"
        )
    rows = [-(-count // 4) for count in counts]
    if values.shape[0] < sum(rows):
        raise ShapeError(
            f"{where}: scale of {name} has {values.shape[0]} rows, wanted {sum(rows)} of int32; "
            "get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor makes it"
        )
    parts, at = [], 0
    for count, taken in zip(counts, rows, strict=True):
        wide = unpack_ue8m0(values[at : at + taken].T)  # [mn, 4 * taken]
        parts.append(wide.T[:count])
        at += taken
    return np.ascontiguousarray(np.concatenate(parts)) if parts else values.view(np.float32)


def k_grouped_fp8_gemm_tn_contiguous(
    a: Any,
    b: Any,
    d: Any,
    ks_cpu: Sequence[int] | None,
    grouped_layout: Any,
    c: Any = None,
    recipe: Recipe = (1, 1, 128),
    compiled_dims: str = "mn",
    use_psum_layout: bool = False,
) -> None:
    """D[g] = C[g] + A_gᵀ · B_g, the groups' K one after another.

    Args:
        a, b: (values [ΣK, M] and [ΣK, N], scales); scales float32 [Σ ceil(k_g / g_k), M or N], or
            int32 of four UE8M0 each, a group starting on a new row.
        d: [G, M, N] float32 or bfloat16, written. c: added (None: nothing); may be d itself.
        ks_cpu: each group's K. grouped_layout: the same as int32; with `use_psum_layout` the
            groups' ends along K, starts aligned.
        recipe: (1, 1, 32) or (1, 1, 128).
    Raises: ShapeError, DtypeError, ConfigError; UnsupportedError where a gradient would be wanted.
    """
    where = "k_grouped_fp8_gemm_tn_contiguous"
    check_dims(where, compiled_dims)
    gran_k = _gran(where, recipe)
    (av, asf), (bv, bsf) = value_pair(where, "a", a), value_pair(where, "b", b)
    refuse_gradient(where, (av, asf, bv, bsf), names=_PARTS)
    va, vb = _matrix(where, "a", av, "float8_e4m3fn"), _matrix(where, "b", bv, "float8_e4m3fn")
    stretches = k_stretches(where, ks_cpu, grouped_layout, va.shape[0], use_psum_layout)
    to, add = accumulator(where, d, c, (len(stretches), va.shape[1], vb.shape[1]))
    seen = (view(asf, f"{where}: scale of a"), view(bsf, f"{where}: scale of b"))
    refuse_overlap(where, to.seen, (va, vb, *seen, *_given(where, grouped_layout)))
    counts = [-(-k // gran_k) for _, k in stretches]
    scales_a = _unpacked(where, "a", asf, gran_k, counts)
    scales_b = _unpacked(where, "b", bsf, gran_k, counts)
    _run(where, va, vb, view(scales_a), view(scales_b), to, add, stretches, counts, gran_k)


def k_grouped_bf16_gemm_tn_contiguous(
    a: Any,
    b: Any,
    d: Any,
    ks_cpu: Sequence[int] | None,
    grouped_layout: Any,
    c: Any = None,
    compiled_dims: str = "mn",
    use_psum_layout: bool = False,
) -> None:
    """`k_grouped_fp8_gemm_tn_contiguous` of bfloat16 matrices."""
    where = "k_grouped_bf16_gemm_tn_contiguous"
    check_dims(where, compiled_dims)
    refuse_gradient(where, (a, b), names="ab")
    va, vb = _matrix(where, "a", a, "bfloat16"), _matrix(where, "b", b, "bfloat16")
    stretches = k_stretches(where, ks_cpu, grouped_layout, va.shape[0], use_psum_layout)
    to, add = accumulator(where, d, c, (len(stretches), va.shape[1], vb.shape[1]))
    refuse_overlap(where, to.seen, (va, vb, *_given(where, grouped_layout)))
    _run(where, va, vb, None, None, to, add, stretches, [0] * len(stretches), 128)


def k_grouped_fp8_gemm_nt_contiguous(
    a: Any,
    b: Any,
    d: Any,
    ks_cpu: Sequence[int] | None,
    grouped_layout: Any,
    c: Any = None,
    recipe: Recipe = (1, 1, 128),
    compiled_dims: str = "mn",
    use_psum_layout: bool = False,
) -> None:
    """`k_grouped_fp8_gemm_tn_contiguous` over flat operands: the groups' [M, k_g] blocks in a row.

    Args:
        a, b: (values, scales); values 1-D float8_e4m3fn of ΣK·M and ΣK·N; scales float32
            [M or N, ΣK / 128], any strides; every k_g a multiple of 128.
    """
    where = "k_grouped_fp8_gemm_nt_contiguous"
    check_dims(where, compiled_dims)
    if _gran(where, recipe, (128,)) and flag(f"{where}: use_psum_layout", use_psum_layout):
        raise ConfigError(
            f"{where}: use_psum_layout is True, wanted False for flat operands; "
            "call k_grouped_fp8_gemm_tn_contiguous"
        )
    groups, m, n = _shape3(where, d)
    (av, asf), (bv, bsf) = value_pair(where, "a", a), value_pair(where, "b", b)
    refuse_gradient(where, (av, asf, bv, bsf), names=_PARTS)
    va, vb = view(av, f"{where}: a"), view(bv, f"{where}: b")
    stretches = k_stretches(where, ks_cpu, grouped_layout, None, False)
    total = sum(k for _, k in stretches)
    if len(stretches) != groups or any(k % 128 for _, k in stretches):
        raise ShapeError(
            f"{where}: ks_cpu={shown(ks_cpu)}, wanted {groups} multiples of 128, one for each of "
            "d's groups; fill groups up with zeros"
        )
    for name, v, rows, sf in (("a", va, m, asf), ("b", vb, n, bsf)):
        _check_flat(where, name, v, view(sf, f"{where}: scale of {name}"), rows, total)
    to, add = accumulator(where, d, c, (groups, m, n))
    sa, sb = view(asf), view(bsf)
    refuse_overlap(where, to.seen, (va, vb, sa, sb, *_given(where, grouped_layout)))
    for g, (first, k) in enumerate(stretches):  # each group's rows are k apart: a layout of its own
        product = Product(n=n, d_pitch=to.pitch, d_kind=to.kind, length=128)
        product.a = Layout(k, 1, sa.strides[0], sa.strides[1], 1, 128, FP8, 0)
        product.b = Layout(k, 1, sb.strides[0], sb.strides[1], 1, 128, FP8, 0)
        product.c_pitch = add.pitch if add else 0
        segments = empty_segments(1)
        segments[0] = (
            va.address + first * m,
            sa.address + first // 128 * sa.strides[1] * 4,
            vb.address + first * n,
            sb.address + first // 128 * sb.strides[1] * 4,
            to.at(g),
            add.at(g) if add else 0,
            m,
            k,
        )
        if m and n:
            run(product, segments)


def _given(where: str, grouped_layout: Any) -> tuple[View, ...]:
    name = f"{where}: grouped_layout"
    return () if grouped_layout is None else (view(grouped_layout, name),)


def _check_flat(where: str, name: str, v: View, s: View, rows: int, total: int) -> None:
    if v.dtype != "float8_e4m3fn" or not v.contiguous or math.prod(v.shape) != total * rows:
        raise ShapeError(
            f"{where}: {name} is {v.dtype} {list(v.shape)}, wanted contiguous float8_e4m3fn of "
            f"{total} x {rows} elements; lay the groups' [rows, k] in a row"
        )
    if s.dtype != "float32" or s.shape != (rows, total // 128):
        raise ShapeError(
            f"{where}: scale of {name} is {s.dtype} {list(s.shape)}, wanted float32 "
            f"{[rows, total // 128]}; per_token_cast_to_fp8 makes it"
        )


def _gran(where: str, recipe: Recipe, allowed: tuple[int, ...] = (32, 128)) -> int:
    known = [(1, 1, size) for size in allowed]
    if not all_whole(recipe, 3) or tuple(recipe) not in known:
        raise ConfigError(
            f"{where}: recipe={shown(recipe)}, wanted {' or '.join(map(str, known))}; name the "
            "step of the cast"
        )
    return int(recipe[2])


def _matrix(where: str, name: str, array: Any, dtype: str) -> Any:
    v = view(array, f"{where}: {name}")
    if v.dtype != dtype or len(v.shape) != 2 or (0 not in v.shape and not v.contiguous):
        raise ShapeError(
            f"{where}: {name} is {v.dtype} {list(v.shape)} with strides {list(v.strides)}, wanted "
            f"contiguous {dtype} [sum of K, rows]; convert or copy it"
        )
    return v


def _shape3(where: str, d: Any) -> tuple[int, int, int]:
    shape = view(d, f"{where}: d").shape
    if len(shape) != 3:
        raise ShapeError(f"{where}: d has shape {list(shape)}, wanted [G, M, N]; make it so")
    return shape[0], shape[1], shape[2]


def _run(
    where: str,
    a: Any,
    b: Any,
    scales_a: Any,
    scales_b: Any,
    to: Target,
    add: Target | None,
    stretches: list[tuple[int, int]],
    counts: list[int],
    gran_k: int,
) -> None:
    if a.shape[0] != b.shape[0]:
        raise ShapeError(
            f"{where}: b has K={b.shape[0]}, wanted K={a.shape[0]} as a has; give both the same "
            "rows"
        )
    kind, size = (BF16, 2) if a.dtype == "bfloat16" else (FP8, 1)
    product = Product(n=b.shape[1], d_pitch=to.pitch, d_kind=to.kind, length=gran_k)
    product.c_pitch = add.pitch if add else 0
    for name, v, s in (("a", a, scales_a), ("b", b, scales_b)):
        if s is not None and s.shape[1] != v.shape[1]:
            raise ShapeError(
                f"{where}: scale of {name} has {s.shape[1]} columns, wanted {v.shape[1]}; "
                "per_channel_cast_to_fp8 makes it"
            )
        row, column = (s.strides[1], s.strides[0]) if s is not None else (0, 0)
        layout = Layout(1, v.shape[1], row, column, 1, gran_k, kind, 0)
        setattr(product, name, layout)
    segments = empty_segments(len(stretches))
    block = 0
    for g, ((first, k), count) in enumerate(zip(stretches, counts, strict=True)):
        segments[g] = (
            a.address + first * a.shape[1] * size,
            scales_a.address + block * scales_a.strides[0] * 4 if scales_a is not None else 0,
            b.address + first * b.shape[1] * size,
            scales_b.address + block * scales_b.strides[0] * 4 if scales_b is not None else 0,
            to.at(g),
            add.at(g) if add else 0,
            a.shape[1],
            k,
        )
        block += count
    if a.shape[1] and b.shape[1] and stretches:
        run(product, segments)


def k_stretches(
    where: str, ks_cpu: Sequence[int] | None, grouped_layout: Any, total: int | None, psum: bool
) -> list[tuple[int, int]]:
    """First K and length of each group's stretch; `total` None: what `ks_cpu` sums to."""
    if flag(f"{where}: use_psum_layout", psum):
        ends = int32_array(where, "grouped_layout", grouped_layout)
        alignment, start, stretches = get_mk_alignment_for_contiguous_layout(), 0, []
        for end in ends.tolist():
            stretches.append((start, max(0, end - start)))
            start = -(-max(start, end) // alignment) * alignment
    else:
        if not isinstance(ks_cpu, (list, tuple)) or not ks_cpu:
            raise ConfigError(
                f"{where}: ks_cpu={shown(ks_cpu)}, wanted a list of the groups' sizes along K; "
                "call .tolist() on an array"
            )
        if not all(isinstance(k, Integral) for k in ks_cpu):
            raise ConfigError(
                f"{where}: ks_cpu={shown(ks_cpu)}, wanted whole numbers; pass a list of ints"
            )
        if min(ks_cpu) < 0:
            raise ShapeError(
                f"{where}: ks_cpu holds {min(ks_cpu)}, wanted 0 or more; give an empty group 0"
            )
        if grouped_layout is not None:
            same = int32_array(where, "grouped_layout", grouped_layout)
            if same.tolist() != list(ks_cpu):
                raise ShapeError(
                    f"{where}: grouped_layout is {same.tolist()}, wanted ks_cpu={list(ks_cpu)}; "
                    "pass None, or the same as int32"
                )
        firsts = np.concatenate([[0], np.cumsum(ks_cpu)])[:-1]
        stretches = [(int(f), int(k)) for f, k in zip(firsts, ks_cpu, strict=True)]
        total = sum(ks_cpu) if total is None else total
        if sum(ks_cpu) != total:
            raise ShapeError(
                f"{where}: ks_cpu sums to {sum(ks_cpu)}, wanted the operands' K={total}; name each "
                "group's rows"
            )
    if stretches and max(f + k for f, k in stretches if k or not f) > total:
        raise ShapeError(
            f"{where}: grouped_layout: groups end at {max(f + k for f, k in stretches)}, wanted at "
            f"most K={total}; with use_psum_layout it holds ends, from aligned starts"
        )
    return stretches
