"""DeepGEMM's own grids at every ISA level: a sample made small, and (slow) all of them in full.

In full, about an hour on two cores; `-k avx512bf16`, `-k test_dense` and the like take a part.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.gemm.grids import (
    CUBLASLT_LIMIT,
    LIMIT,
    MAX_M,
    Dense,
    Grouped,
    KGrouped,
    Operand,
    beyond,
    check,
    cover,
    dense,
    dense_operands,
    grouped,
    grouped_operands,
    k_grouped,
    operand,
    short,
)
from whalefall import gemm, jit


def at_levels(cases: list[Any], full: Iterator[Any]) -> Any:
    """Small cases, and full ones marked slow, each at all levels in turn (operands are kept)."""
    values = [(case, level, ()) for case in cases for level in jit.levels()]
    values += [(case, level, (pytest.mark.slow,)) for case in full for level in jit.levels()]
    return pytest.mark.parametrize(
        ("case", "level"),
        [
            pytest.param(case, level, marks=marks, id=f"{name_of(case)}-{level}")
            for case, level, marks in values
        ],
    )


def name_of(case: Any) -> str:
    values = [str(v) for v in vars(case).values()]
    return "-".join(values).replace("True", "yes").replace("False", "no")


def sample(kind: type, full: Iterator[Any]) -> list[Any]:
    """The full list's axis values, made small, and the cases it lacks."""
    return [short(c) for c in cover(full)] + [c for c in beyond() if isinstance(c, kind)]


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """The test's level in force, and the alignment as it was afterwards."""
    callspec = getattr(request.node, "callspec", None)
    if callspec and "level" in callspec.params:
        monkeypatch.setenv("WHALEFALL_ISA", callspec.params["level"])
    yield
    gemm.set_mk_alignment_for_contiguous_layout(128)


def laid_out(given: Any, swap: bool, packed: bool) -> Any:
    """A matrix or pair as [K, rows], contiguous."""
    if not swap:
        return given
    if not isinstance(given, tuple):
        return given.T.copy()
    values, scales = given
    return (gemm.transpose_packed_fp4(values) if packed else values.T.copy()), scales.T


def dense_recipe(case: Dense) -> dict[str, Any]:
    if case.kind == "bf16":
        return {}
    if case.kind == "fp4":
        return {"recipe_a": (1, 128), "recipe_b": (1, 32)}
    return {"recipe": None if case.per_block else (1, 1, 128)}


@at_levels(sample(Dense, dense()), dense())
def test_dense(case: Dense, level: str) -> None:
    a, b = dense_operands(case.m, case.n, case.k, case.kind, case.per_block)
    rng = np.random.default_rng(1)
    c = None
    d = np.empty((case.m, case.n), ml_dtypes.bfloat16 if case.out == "bfloat16" else np.float32)
    if case.accumulate:
        d[:] = rng.standard_normal(d.shape, np.float32) * 32
        c = d.copy()
    name = "bf16_gemm" if case.kind == "bf16" else "fp8_fp4_gemm"
    left = laid_out(a.given, case.layout[0] == "t", packed=False)
    right = laid_out(b.given, case.layout[1] == "n", packed=case.kind == "fp4")
    before = d.copy() if case.accumulate else None
    call = getattr(gemm, f"{name}_{case.layout}")
    call(left, right, d, c=d if case.accumulate else None, **dense_recipe(case))
    tight = case.kind == "bf16" and not (case.accumulate and case.out == "bfloat16")
    check(d, a, b, CUBLASLT_LIMIT if tight else LIMIT[case.kind], before)
    if case.kind == "bf16" and d.size < 1 << 16:
        same = np.empty_like(d)
        getattr(gemm, f"cublaslt_gemm_{case.layout}")(left, right, same, c=before)
        assert same.tobytes() == d.tobytes()
    if case.layout != "nt" and d.size < 1 << 16:  # the same through nt and strides
        again = np.empty_like(d)
        turned = [
            g if not swap else (g[0].T, g[1].T) if isinstance(g, tuple) else g.T
            for g, swap in ((left, case.layout[0] == "t"), (right, case.layout[1] == "n"))
        ]
        getattr(gemm, f"{name}_nt")(*turned, again, c=c, **dense_recipe(case))
        assert again.tobytes() == d.tobytes()


SKIPPED = [Dense(m, n, 512, "fp8") for m in (128, 4096) for n in (32768, 8192)]


@at_levels([Dense(m, n, 192, "fp8") for m, n in ((128, 512), (70, 256))], iter(SKIPPED))
def test_skip_head_mid(case: Dense, level: str) -> None:
    a, b = dense_operands(case.m, case.n, case.k, case.kind, True)
    heads = case.n // 256
    d = np.full((case.m, heads, 320), 7, ml_dtypes.bfloat16)
    gemm.fp8_gemm_nt_skip_head_mid(a.given, b.given, d.reshape(case.m, -1), (128, 64, 128))
    assert (d[:, :, 128:192] == 7).all()
    narrow = np.concatenate([d[:, :, :128], d[:, :, 192:]], axis=2).reshape(case.m, -1)
    check(narrow, a, b, LIMIT["fp8"])


def stacked(parts: list[Operand]) -> Any:
    """The groups' matrices on a first axis."""
    if not isinstance(parts[0].given, tuple):
        return np.stack([p.given for p in parts])
    return np.stack([p.given[0] for p in parts]), np.stack([p.given[1] for p in parts])


def padded(parts: list[Operand], starts: list[int], rows: int) -> Any:
    """The groups' rows at their starts of one matrix, zeros between."""

    def place(arrays: list[Any]) -> Any:
        whole = np.zeros((rows, *arrays[0].shape[1:]), arrays[0].dtype)
        for start, array in zip(starts, arrays, strict=True):
            whole[start : start + len(array)] = array
        return whole

    if not isinstance(parts[0].given, tuple):
        return place([p.given for p in parts])
    return place([p.given[0] for p in parts]), place([p.given[1] for p in parts])


@at_levels(sample(Grouped, grouped()), grouped())
def test_grouped(case: Grouped, level: str) -> None:
    lefts, rights = grouped_operands(case.groups, case.m, case.n, case.k, case.kind)
    sizes = [len(a.plain) for a in lefts]
    alignment = gemm.get_theoretical_mk_alignment_for_contiguous_layout(int(case.m * 1.2))
    gemm.set_mk_alignment_for_contiguous_layout(alignment)
    ends = np.cumsum([-(-size // alignment) * alignment for size in sizes])
    starts = [0, *(int(e) for e in ends[:-1])]
    high = min(MAX_M, 2 * max(sizes))
    if case.how == "masked":
        starts, rows = [g * high for g in range(case.groups)], case.groups * high
    else:
        rows = int(ends[-1])
    a, b = padded(lefts, starts, rows), stacked(rights)
    d: Any = np.full((rows, case.n), 7, ml_dtypes.bfloat16)
    extra: dict[str, Any] = {}
    if case.kind == "fp4":
        extra = {"recipe_a": (1, 128), "recipe_b": (1, 32)}
    if case.layout == "nn":
        turn = [x.swapaxes(1, 2) for x in (b if isinstance(b, tuple) else (b,))]
        b = (turn[0].copy(), turn[1]) if isinstance(b, tuple) else turn[0].copy()
    name = "bf16" if case.kind == "bf16" else "fp8_fp4"
    if case.how == "masked":
        cut = [x.reshape(case.groups, high, -1) for x in (a if isinstance(a, tuple) else (a,))]
        given = tuple(cut) if isinstance(a, tuple) else cut[0]
        call = getattr(gemm, f"m_grouped_{name}_gemm_nt_masked")
        call(given, b, d.reshape(case.groups, high, -1), np.array(sizes, np.int32), case.m, **extra)
    else:
        call = getattr(gemm, f"m_grouped_{name}_gemm_{case.layout}_contiguous")
        layout = np.full(rows, -1, np.int32)
        for g, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            layout[start : start + size] = g
        if case.how == "psum":
            layout = np.array([s + n for s, n in zip(starts, sizes, strict=True)], np.int32)
            extra |= {"use_psum_layout": True, "ensure_zero_padding": case.zero}
        call(a, b, d, layout, **extra)
    gap = 0 if case.how == "index" or case.zero else 7
    for i, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        check(d[start : start + size], lefts[i], rights[i], LIMIT[case.kind])
        following = [*starts[1:], rows][i]
        assert (d[start + size : following] == gap).all()


@at_levels(sample(KGrouped, k_grouped()), k_grouped())
def test_k_grouped(case: KGrouped, level: str) -> None:
    sizes = random.Random(case.groups)
    gemm.set_mk_alignment_for_contiguous_layout(case.alignment)
    reals = [max(1, int(case.k * sizes.uniform(0.7, 1.3))) for _ in range(case.groups)]
    if case.empty:
        reals[1] = 0
    wides = [-(-k // case.alignment) * case.alignment for k in reals]
    ks = reals if case.by_ends else wides
    c = np.random.default_rng(1).standard_normal((case.groups, case.m, case.n), np.float32) * 32
    d = c.copy()
    pairs = k_operands(case, tuple(ks))
    starts = [int(s) for s in np.cumsum([0, *(wides if case.by_ends else ks)])]
    if case.kind == "fp8":
        sides = [flat(side) for side in pairs]
        gemm.k_grouped_fp8_gemm_nt_contiguous(*sides, d, ks, np.array(ks, np.int32), c=d)
    else:
        layout = np.array([s + k for s, k in zip(starts, ks, strict=False)], np.int32)
        extra: dict[str, Any] = {"use_psum_layout": True} if case.by_ends else {}
        if case.kind != "bf16":
            extra["recipe"] = (1, 1, case.gran_k)
        sides = [along_k(side, starts) for side in pairs]
        name = "bf16" if case.kind == "bf16" else "fp8"
        call = getattr(gemm, f"k_grouped_{name}_gemm_tn_contiguous")
        call(*sides, d, None if case.by_ends else ks,
             layout if case.by_ends else np.array(ks, np.int32), c=d, **extra)  # fmt: skip
    for g, k in enumerate(ks):
        if k:
            check(d[g], pairs[0][g], pairs[1][g], LIMIT[case.kind], c[g])
        else:
            assert (d[g] == c[g]).all()


@functools.lru_cache(maxsize=1)
def k_operands(case: KGrouped, ks: tuple[int, ...]) -> tuple[list[Operand], list[Operand]]:
    """Each group's A and B as [rows, k], tokens' scales."""
    rng = np.random.default_rng(case.m + case.n)
    made: list[list[Operand]] = []
    for rows in (case.m, case.n):
        side = []
        for k in ks:
            if case.kind == "bf16":
                side.append(operand(rng, rows, k, case.kind, "bf16"))
                continue
            plain = rng.standard_normal((rows, k), np.float32).astype(ml_dtypes.bfloat16)
            pair = gemm.per_token_cast_to_fp8(plain, case.kind == "ue8m0", case.gran_k)
            side.append(Operand(pair, plain, *pair, (1, case.gran_k)))
        made.append(side)
    return made[0], made[1]


def flat(side: list[Operand]) -> Any:
    """The groups' [rows, k] in a row, and scales [rows, sum of blocks]."""
    values = np.concatenate([x.given[0].reshape(-1) for x in side])
    return values, np.concatenate([x.given[1] for x in side], axis=1)


def along_k(side: list[Operand], starts: list[int]) -> Any:
    """The groups' [k, rows] at their starts of [sum of K, rows], and scales a row a block."""
    pairs = [x.given if isinstance(x.given, tuple) else (x.given, None) for x in side]
    rows = len(side[0].plain)
    values = np.zeros((starts[-1], rows), pairs[0][0].dtype)
    for (v, _), start in zip(pairs, starts, strict=False):
        values[start : start + v.shape[1]] = v.T
    if pairs[0][1] is None:
        return values
    return values, np.ascontiguousarray(np.concatenate([s.T for _, s in pairs]))


@pytest.mark.parametrize("size", ["short", pytest.param("full", marks=pytest.mark.slow)])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("k", [128, 7168, 7296])
@pytest.mark.parametrize("mn", [4096, 4097, 8192])
@pytest.mark.parametrize("use_ue8m0", [False, True])
@pytest.mark.parametrize("rows_first", [False, True])
def test_scale_layouts(
    mn: int, k: int, groups: int, use_ue8m0: bool, rows_first: bool, size: str
) -> None:
    mn = mn if size == "full" else mn // 128 + mn % 2
    rng = np.random.default_rng(mn)
    for gran_k in (32, 128):
        shape = (groups, mn, -(-k // gran_k)) if groups > 1 else (mn, -(-k // gran_k))
        scales = rng.random(shape, np.float32) + 0.5
        if use_ue8m0:
            scales = np.exp2(np.round(scales * 20)).astype(np.float32)
        if rows_first:
            scales = np.swapaxes(np.swapaxes(scales, -1, -2).copy(), -1, -2)
        pitch = -(-mn // 4) * 4
        if use_ue8m0:
            packed = gemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(scales)
            wide = gemm.unpack_ue8m0_from_int(packed)[..., : shape[-1]]
            assert (wide == scales).all()
            result, count = packed, -(-shape[-1] // 4)
        else:
            result, count = gemm.get_mn_major_tma_aligned_tensor(scales), shape[-1]
            assert (result == scales).all()
        assert result.shape == (*shape[:-1], count)
        assert result.strides[-2:] == (4, 4 * pitch)
        if groups > 1:
            assert result.strides[0] == 4 * pitch * count
