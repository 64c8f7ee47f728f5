"""Grouped products: rows of A (or stretches of K) that each belong to one of G matrices.

In: A with its rows sorted by group ("contiguous", by an index or by cumulative ends), or padded to
a common height ("masked"); or operands whose K is divided among the groups (weight gradients).
Out: written to `d`. Rows of no group become zero, rows beyond a mask are left alone.
Source: DeepGEMM `csrc/apis/gemm.hpp`, `m_grouped_*` and `k_grouped_*`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from whalefall.arguments import flag, whole
from whalefall.dtypes import KnownCalls, Places, View, as_numpy, view
from whalefall.errors import ConfigError, ShapeError
from whalefall.gemm.calls import run
from whalefall.gemm.config import get_mk_alignment_for_contiguous_layout
from whalefall.gemm.dense import check_dims, check_k, product_of, scale_dtype
from whalefall.gemm.native_calls import product_library
from whalefall.gemm.operands import (
    BF16,
    Operand,
    Pair,
    Recipe,
    Target,
    bf16_operand,
    empty_segments,
    fp8_operand,
    int32_array,
    recipes,
    refuse_overlap,
    target,
)
from whalefall.gemm.structs import WHOSE, Grouped

__all__ = [
    "bf16_m_grouped_gemm_nt_masked",
    "fp8_m_grouped_gemm_nt_masked",
    "m_grouped_bf16_gemm_nn_contiguous",
    "m_grouped_bf16_gemm_nt_contiguous",
    "m_grouped_bf16_gemm_nt_masked",
    "m_grouped_fp8_fp4_gemm_nn_contiguous",
    "m_grouped_fp8_fp4_gemm_nt_contiguous",
    "m_grouped_fp8_fp4_gemm_nt_masked",
    "m_grouped_fp8_gemm_nn_contiguous",
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_masked",
]

Run = tuple[int, int, int]  # group, first row, last row + 1
Known = tuple[Grouped, Any]  # the struct of a call, and the entry that takes it
_PAIRS = {"a": 0, "a_scale": 1, "b": 2, "b_scale": 3, "d": 4, "whose": 5}
_OF_PAIRS = Places(Grouped, _PAIRS, status=True)
_OF_MATRICES = Places(Grouped, {"a": 0, "b": 1, "d": 2, "whose": 3}, status=True)
_FP8_CALLS = KnownCalls("sppaasssssssns", written=4)
_BF16_CALLS = KnownCalls("saaaasssns", written=2)
_FP8_MASKED = KnownCalls("sppaamsssss", written=4)
_BF16_MASKED = KnownCalls("saaaams", written=2)


def index_runs(where: str, layout: npt.NDArray[Any], groups: int, rows: int) -> list[Run]:
    """The stretches of equal group in an index layout [M]; group -1: rows to be zeroed."""
    if layout.shape != (rows,):
        raise ShapeError(
            f"{where}: grouped_layout has shape {list(layout.shape)}, wanted [M={rows}]; give each "
            "row of a its group, or use_psum_layout"
        )
    if rows == 0:
        return []
    if layout.max() >= groups or layout.min() < -1:
        wrong = int(layout.max()) if layout.max() >= groups else int(layout.min())
        raise ShapeError(
            f"{where}: grouped_layout holds {wrong}, wanted -1 to {groups - 1}; -1 is no group"
        )
    starts = np.flatnonzero(np.concatenate([[True], layout[1:] != layout[:-1]]))
    ends = np.append(starts[1:], rows)
    return [(int(layout[s]), int(s), int(e)) for s, e in zip(starts, ends, strict=True)]


def psum_runs(where: str, layout: npt.NDArray[Any], groups: int, rows: int) -> list[Run]:
    """The stretches of a layout of ends [G]: each starts at the aligned end before it."""
    if layout.shape != (groups,):
        raise ShapeError(
            f"{where}: grouped_layout has shape {list(layout.shape)}, wanted [{groups}]; with "
            "use_psum_layout give the end of each group"
        )
    alignment, start, runs = get_mk_alignment_for_contiguous_layout(), 0, []
    for group, end in enumerate(layout.tolist()):
        if end > rows:
            raise ShapeError(
                f"{where}: grouped_layout: group {group} ends at row {end}, wanted at most a's "
                f"{rows}; with use_psum_layout it holds ends, from aligned starts"
            )
        if end > start:
            runs.append((group, start, end))
        start = -(-max(start, end) // alignment) * alignment
    return runs


def _operands(
    where: str,
    a: Any,
    b: Any,
    swap: bool,
    dims_a: int,
    recipe: Recipe | None,
    recipe_a: Pair | None,
    recipe_b: Pair | None,
) -> tuple[Operand, Operand]:
    of_a, of_b = recipes(where, scale_dtype(where, b), recipe, recipe_a, recipe_b)
    if of_a[0] != 1:
        raise ConfigError(
            f"{where}: {of_a[0]} rows of a share a scale, wanted 1; per_token_cast_to_fp8 makes it"
        )
    left = fp8_operand(where, "a", a, of_a, dims=dims_a)
    if left.layout.packing == 2:
        raise ShapeError(
            f"{where}: a packs FP4 pairs along M, wanted along K (stride 1 along K); "
            "transpose_packed_fp4 turns it"
        )
    return left, fp8_operand(where, "b", b, of_b, swap=swap, dims=3)


def _fp8_contiguous(*args: Any) -> None:
    """Arguments of `m_grouped_fp8_fp4_gemm_nt_contiguous` behind the function's name."""
    call = (*args, _alignment(args[10]))
    if _FP8_CALLS.find(*call):
        return
    where, a, b, d, layout, *shares, compiled_dims, no_cast, psum, zero, expected = args
    check_dims(where, compiled_dims, no_cast)
    _check_expected(where, expected, psum)
    operands = _operands(where, a, b, "_nn_" in where, 2, *shares)
    if done := _contiguous(where, *operands, d, layout, psum, zero):
        _FP8_CALLS.keep(call, _OF_PAIRS, *done)


def _bf16_contiguous(*args: Any) -> None:
    """Arguments of `m_grouped_bf16_gemm_nt_contiguous` behind the function's name."""
    call = (*args, _alignment(args[6]))
    if _BF16_CALLS.find(*call):
        return
    where, a, b, d, layout, compiled_dims, psum, zero, expected = args
    check_dims(where, compiled_dims)
    _check_expected(where, expected, psum)
    left = bf16_operand(where, "a", a)
    right = bf16_operand(where, "b", b, swap="_nn_" in where, dims=3)
    if done := _contiguous(where, left, right, d, layout, psum, zero):
        _BF16_CALLS.keep(call, _OF_MATRICES, *done)


def _alignment(use_psum_layout: Any) -> int:
    """What a call depends on beside its arguments."""
    return get_mk_alignment_for_contiguous_layout() if use_psum_layout is not False else 0


def _contiguous(
    where: str,
    a: Operand,
    b: Operand,
    d: Any,
    grouped_layout: Any,
    use_psum_layout: bool,
    ensure_zero_padding: bool,
) -> Known | None:
    use_psum_layout = flag(f"{where}: use_psum_layout", use_psum_layout)
    ensure_zero_padding = flag(f"{where}: ensure_zero_padding", ensure_zero_padding)
    check_k(where, a, b)
    to = target(where, "d", d, (a.rows, b.rows))
    layout = int32_array(where, "grouped_layout", grouped_layout)
    refuse_overlap(where, to.seen, (*a.views, *b.views, view(layout)))
    if use_psum_layout:
        runs = psum_runs(where, layout, b.groups, a.rows)
        if ensure_zero_padding:
            _zero_gaps(as_numpy(d), runs)
    else:
        runs = index_runs(where, layout, b.groups, a.rows)
        for _, first, last in [run for run in runs if run[0] < 0]:
            as_numpy(d)[first:last] = 0
        runs = [run for run in runs if run[0] >= 0]
    _run(a, b, to, runs)
    form = "ends" if use_psum_layout else "index"
    return _described(a, b, to, view(grouped_layout), form, ensure_zero_padding)


def _described(
    a: Operand, b: Operand, to: Target, whose: View, form: str, zero_gaps: bool = False
) -> Known | None:
    """A grouped product for the native entry that reads `whose` itself, if it computes anything."""
    entry = getattr(product_library(), "wf_gemm_grouped", None)
    if entry is None or 0 in (a.rows, b.rows, b.groups):
        return None
    d_size, of_a = 2 if to.kind else 4, a.layout
    d_group = to.seen.strides[0] * d_size if len(to.seen.shape) == 3 else 0
    call = Grouped(
        *(product_of(a, b, to), a.address, a.scale_address or None, b.address),
        *(b.scale_address or None, to.seen.address, whose.address, whose.strides[0]),
        *(a.rows, b.groups, a.k, of_a.row_stride * (2 if of_a.kind == BF16 else 1)),
        *(of_a.scale_row_stride * 4, to.pitch * d_size, a.group_bytes, a.scale_group_bytes),
        *(b.group_bytes, b.scale_group_bytes, d_group),
        *(get_mk_alignment_for_contiguous_layout(), WHOSE[form], zero_gaps),
    )
    return call, entry


def _check_expected(where: str, expected: Any, use_psum_layout: Any) -> None:
    if expected is None:
        return
    whole(f"{where}: expected_m_for_psum_layout", expected, 0)
    if not flag(f"{where}: use_psum_layout", use_psum_layout):
        raise ConfigError(
            f"{where}: expected_m_for_psum_layout without use_psum_layout; leave it out"
        )


def _zero_gaps(d: npt.NDArray[Any], runs: list[Run]) -> None:
    alignment = get_mk_alignment_for_contiguous_layout()
    for _, _, end in runs:
        d[end : -(-end // alignment) * alignment] = 0


def _run(a: Operand, b: Operand, to: Target, runs: list[Run]) -> None:
    """One segment for each run of rows of a matrix A."""
    if not runs or b.rows == 0:
        return
    segments = empty_segments(len(runs))
    for i, (group, first, last) in enumerate(runs):
        segments[i] = (*a.at(row=first), *b.at(group), to.at(row=first), 0, last - first, a.k)
    run(product_of(a, b, to), segments)


def m_grouped_fp8_fp4_gemm_nt_contiguous(
    a: Any,
    b: Any,
    d: Any,
    grouped_layout: Any,
    recipe: Recipe | None = None,
    recipe_a: Pair | None = None,
    recipe_b: Pair | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
    expected_m_for_psum_layout: int | None = None,
) -> None:
    """D[m] = A[m] · B[group of row m]ᵀ, rows sorted by group.

    Args:
        a: (values [M, K], scales); b: (values [G, N, K], scales), as in `fp8_fp4_gemm_nt`.
        d: [M, N], written; rows of group -1 become 0.
        grouped_layout: int32 [M], each row's group or -1; or with `use_psum_layout` int32 [G], the
            end of each group, the next starting at that end rounded up to
            `get_mk_alignment_for_contiguous_layout()`.
        ensure_zero_padding: with psum, write 0 between an end and the next start.
        expected_m_for_psum_layout: accepted with psum only; it changes no result.
    Raises: ShapeError, DtypeError, ConfigError; UnsupportedError where a gradient would be wanted.
    Source: DeepGEMM (there, rows of -1 hold whatever their tile's group gives).
    """
    _fp8_contiguous(
        *("m_grouped_fp8_gemm_nt_contiguous", a, b, d, grouped_layout, recipe, recipe_a, recipe_b),
        *(compiled_dims, disable_ue8m0_cast, use_psum_layout, ensure_zero_padding),
        expected_m_for_psum_layout,
    )


def m_grouped_fp8_fp4_gemm_nn_contiguous(
    a: Any,
    b: Any,
    d: Any,
    grouped_layout: Any,
    recipe: Recipe | None = None,
    recipe_a: Pair | None = None,
    recipe_b: Pair | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
) -> None:
    """`m_grouped_fp8_fp4_gemm_nt_contiguous` with b [G, K, N] and its scales transposed."""
    _fp8_contiguous(
        *("m_grouped_fp8_gemm_nn_contiguous", a, b, d, grouped_layout, recipe, recipe_a, recipe_b),
        *(compiled_dims, disable_ue8m0_cast, use_psum_layout, ensure_zero_padding, None),
    )


def m_grouped_bf16_gemm_nt_contiguous(
    a: Any,
    b: Any,
    d: Any,
    grouped_layout: Any,
    compiled_dims: str = "nk",
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
    expected_m_for_psum_layout: int | None = None,
) -> None:
    """D[m] = A[m] · B[group of row m]ᵀ in bfloat16; see `m_grouped_fp8_fp4_gemm_nt_contiguous`."""
    _bf16_contiguous(
        *("m_grouped_bf16_gemm_nt_contiguous", a, b, d, grouped_layout, compiled_dims),
        *(use_psum_layout, ensure_zero_padding, expected_m_for_psum_layout),
    )


def m_grouped_bf16_gemm_nn_contiguous(
    a: Any,
    b: Any,
    d: Any,
    grouped_layout: Any,
    compiled_dims: str = "nk",
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
) -> None:
    """`m_grouped_bf16_gemm_nt_contiguous` with b [G, K, N]."""
    _bf16_contiguous(
        *("m_grouped_bf16_gemm_nn_contiguous", a, b, d, grouped_layout, compiled_dims),
        *(use_psum_layout, ensure_zero_padding, None),
    )


def _masked(
    where: str, a: Operand, b: Operand, d: Any, masked_m: Any, expected_m: int
) -> Known | None:
    check_k(where, a, b)
    if a.groups != b.groups:
        raise ShapeError(
            f"{where}: b has {b.groups} groups, wanted {a.groups} as a has; stack a matrix a group"
        )
    whole(f"{where}: expected_m", expected_m, 1)
    to = target(where, "d", d, (a.groups, a.rows, b.rows))
    counts = int32_array(where, "masked_m", masked_m)
    if counts.shape != (a.groups,):
        raise ShapeError(
            f"{where}: masked_m has shape {list(counts.shape)}, wanted [G={a.groups}]; reshape it"
        )
    if a.groups and (counts.min() < 0 or counts.max() > a.rows):
        wrong = int(counts.min()) if counts.min() < 0 else int(counts.max())
        raise ShapeError(f"{where}: masked_m holds {wrong}, wanted 0 to M={a.rows}; clamp it")
    refuse_overlap(where, to.seen, (*a.views, *b.views, view(counts)))
    busy = [g for g in range(a.groups) if counts[g] > 0]
    if busy and b.rows:
        segments = empty_segments(len(busy))
        for i, g in enumerate(busy):
            segments[i] = (*a.at(g), *b.at(g), to.at(g), 0, int(counts[g]), a.k)
        run(product_of(a, b, to), segments)
    return _described(a, b, to, view(masked_m), "counts")


def m_grouped_fp8_fp4_gemm_nt_masked(
    a: Any,
    b: Any,
    d: Any,
    masked_m: Any,
    expected_m: int,
    recipe: Recipe | None = None,
    recipe_a: Pair | None = None,
    recipe_b: Pair | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
) -> None:
    """D[g, m] = A[g, m] · B[g]ᵀ for the first masked_m[g] rows of each group.

    Args:
        a: (values [G, M, K], scales); b: (values [G, N, K], scales).
        d: [G, M, N]; rows from masked_m[g] on are not touched.
        masked_m: int32 [G]. expected_m: accepted (above 0); it changes no result.
    Source: DeepGEMM (there, M off the tile spills into the next group).
    """
    where, shares = "m_grouped_fp8_gemm_nt_masked", (recipe, recipe_a, recipe_b)
    args = (where, a, b, d, masked_m, expected_m, *shares, compiled_dims, disable_ue8m0_cast)
    if _FP8_MASKED.find(*args):
        return
    check_dims(where, compiled_dims, disable_ue8m0_cast)
    left, right = _operands(where, a, b, False, 3, *shares)
    if done := _masked(where, left, right, d, masked_m, expected_m):
        _FP8_MASKED.keep(args, _OF_PAIRS, *done)


def m_grouped_bf16_gemm_nt_masked(
    a: Any, b: Any, d: Any, masked_m: Any, expected_m: int, compiled_dims: str = "nk"
) -> None:
    """`m_grouped_fp8_fp4_gemm_nt_masked` in bfloat16."""
    where = "m_grouped_bf16_gemm_nt_masked"
    args = (where, a, b, d, masked_m, expected_m, compiled_dims)
    if _BF16_MASKED.find(*args):
        return
    check_dims(where, compiled_dims)
    left, right = bf16_operand(where, "a", a, dims=3), bf16_operand(where, "b", b, dims=3)
    if done := _masked(where, left, right, d, masked_m, expected_m):
        _BF16_MASKED.keep(args, _OF_MATRICES, *done)


m_grouped_fp8_gemm_nt_contiguous = m_grouped_fp8_fp4_gemm_nt_contiguous
m_grouped_fp8_gemm_nn_contiguous = m_grouped_fp8_fp4_gemm_nn_contiguous
m_grouped_fp8_gemm_nt_masked = m_grouped_fp8_fp4_gemm_nt_masked
fp8_m_grouped_gemm_nt_masked = m_grouped_fp8_fp4_gemm_nt_masked
bf16_m_grouped_gemm_nt_masked = m_grouped_bf16_gemm_nt_masked
