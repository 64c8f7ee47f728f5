"""DeepGEMM's own grids at every ISA level: a sample made small, and (slow) all of them in full.

All of each result is compared with float64 (`pools.py`). In full, about an hour on two cores, most
of it in the kernels at `any`; `-k avx512bf16`, `-k test_dense` and the like take a part.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.gemm.grids import (
    CUBLASLT_LIMIT,
    LIMIT,
    MAX_M,
    Dense,
    Grouped,
    KGrouped,
    beyond,
    cover,
    dense,
    grouped,
    k_grouped,
    short,
)
from tests.gemm.operands import BF16
from tests.gemm.pools import Added, Operand, check, key, left, right, turned
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


def dense_recipe(case: Dense) -> dict[str, Any]:
    if case.kind == "bf16":
        return {}
    if case.kind == "fp4":
        return {"recipe_a": (1, 128), "recipe_b": (1, 32)}
    return {"recipe": None if case.per_block else (1, 1, 128)}


def cast_of_b(kind: str, per_block: bool) -> str:
    return kind if kind in ("bf16", "fp4") else "block" if per_block else "token"


def cast_of_a(kind: str) -> str:
    return "bf16" if kind == "bf16" else "token"


def laid_out(given: Any, swap: bool) -> Any:
    """A matrix or pair [rows, K], as [K, rows] if `swap`."""
    if not swap:
        return given
    if not isinstance(given, tuple):
        return turned(given)
    values, scales = given
    packed = values.dtype == np.int8
    return (gemm.transpose_packed_fp4(values) if packed else turned(values)), scales.T


@functools.lru_cache(maxsize=1)
def dense_operands(
    m: int, n: int, k: int, kind: str, per_block: bool, layout: str
) -> tuple[Operand, Operand, Any, Any]:
    """Both operands and how they lie; kept for the levels, which run one after the other."""
    rng, ue8m0 = np.random.default_rng(m + n + k), kind != "fp8"
    a = left(rng, key("a", m, k, cast_of_a(kind), ue8m0), m)
    b = right(rng, key("b", n, k, cast_of_b(kind, per_block), ue8m0), n)
    return a, b, laid_out(a.given, layout[0] == "t"), laid_out(b.given, layout[1] == "n")


def by_pools(cases: Iterator[Dense]) -> Iterator[Dense]:
    """In the order in which neighbours share pools, and their products."""
    return iter(sorted(cases, key=lambda c: (c.kind, c.per_block, c.k, c.layout, c.n, c.m)))


@at_levels(sample(Dense, dense()), by_pools(dense()))
def test_dense(case: Dense, level: str) -> None:
    a, b, first, second = dense_operands(
        case.m, case.n, case.k, case.kind, case.per_block, case.layout
    )
    dtype = BF16 if case.out == "bfloat16" else np.float32
    d = np.empty((case.m, case.n), dtype)
    c = Added(case.n, dtype) if case.accumulate else None
    before = c.fill(d).copy() if c and d.size < 1 << 16 else None
    name = "bf16_gemm" if case.kind == "bf16" else "fp8_fp4_gemm"
    call = getattr(gemm, f"{name}_{case.layout}")
    call(first, second, d, c=c.fill(d) if c else None, **dense_recipe(case))
    tight = case.kind == "bf16" and not (case.accumulate and case.out == "bfloat16")
    check(d, a, b, CUBLASLT_LIMIT if tight else LIMIT[case.kind], c)
    if case.kind == "bf16" and d.size < 1 << 16:
        same = np.empty_like(d)
        getattr(gemm, f"cublaslt_gemm_{case.layout}")(first, second, same, c=before)
        assert same.tobytes() == d.tobytes()
    if case.layout != "nt" and d.size < 1 << 16:  # the same through nt and strides
        again = np.empty_like(d)
        views = [
            g if not swap else (g[0].T, g[1].T) if isinstance(g, tuple) else g.T
            for g, swap in ((first, case.layout[0] == "t"), (second, case.layout[1] == "n"))
        ]
        getattr(gemm, f"{name}_nt")(*views, again, c=before, **dense_recipe(case))
        assert again.tobytes() == d.tobytes()


SKIPPED = [Dense(m, n, 512, "fp8") for m in (128, 4096) for n in (32768, 8192)]


@at_levels([Dense(m, n, 192, "fp8") for m, n in ((128, 512), (70, 256))], iter(SKIPPED))
def test_skip_head_mid(case: Dense, level: str) -> None:
    a, b, first, second = dense_operands(case.m, case.n, case.k, case.kind, True, "nt")
    heads = case.n // 256
    d = np.full((case.m, heads, 320), 7, BF16)
    gemm.fp8_gemm_nt_skip_head_mid(first, second, d.reshape(case.m, -1), (128, 64, 128))
    assert (d[:, :, 128:192] == 7).all()
    narrow = np.concatenate([d[:, :, :128], d[:, :, 192:]], axis=2).reshape(case.m, -1)
    check(narrow, a, b, LIMIT["fp8"])


class Groups(NamedTuple):
    """Each group's rows and matrix; the rows at `starts` of one array, the matrices stacked."""

    lefts: list[Operand]
    rights: list[Operand]
    starts: list[int]
    rows: int
    a: Any
    b: Any


@functools.lru_cache(maxsize=1)
def groups_of(
    groups: int, m: int, n: int, k: int, kind: str, masked: bool, layout: str, alignment: int
) -> Groups:
    """0.7 to 1.3 times m rows a group; kept for the levels and for the ways to name the groups."""
    rng, sizes, ue8m0 = np.random.default_rng(m + n + k), random.Random(groups), kind != "fp8"
    counts = [int(m * sizes.uniform(0.7, 1.3)) for _ in range(groups)]
    tokens = key("a", sum(counts), k, cast_of_a(kind), ue8m0)
    weights = key("b", groups * n, k, cast_of_b(kind, True), ue8m0)
    lefts = [left(rng, tokens, count) for count in counts]
    rights = [right(rng, weights, n) for _ in counts]
    high = min(MAX_M, 2 * max(counts))
    ends = [int(e) for e in np.cumsum([0, *(-(-c // alignment) * alignment for c in counts)])]
    starts, rows = ends[:-1], ends[-1]
    if masked:
        starts, rows = [g * high for g in range(groups)], groups * high
    a, b = padded(lefts, starts, rows), stacked(rights, layout == "nn")
    if masked:
        cut = [x.reshape(groups, high, -1) for x in (a if isinstance(a, tuple) else (a,))]
        a = tuple(cut) if isinstance(a, tuple) else cut[0]
    return Groups(lefts, rights, starts, rows, a, b)


def stacked(parts: list[Operand], swap: bool) -> Any:
    """The groups' matrices on a first axis, each [K, rows] if `swap`."""
    pairs = [p.pair for p in parts]
    values = np.stack([v for v, _ in pairs])
    values = turned(values) if swap else values
    if pairs[0][1] is None:
        return values
    scales = np.stack([s for _, s in pairs])
    return values, scales.swapaxes(1, 2) if swap else scales


def padded(parts: list[Operand], starts: list[int], rows: int) -> Any:
    """The groups' rows at their starts of one matrix, zeros between."""
    whole: list[Any] = []
    for start, part in zip(starts, parts, strict=True):
        pair = [x for x in part.pair if x is not None]
        whole = whole or [np.zeros((rows, *x.shape[1:]), x.dtype) for x in pair]
        for to, x in zip(whole, pair, strict=True):
            to[start : start + len(x)] = x
    return tuple(whole) if len(whole) == 2 else whole[0]


@at_levels(sample(Grouped, grouped()), grouped())
def test_grouped(case: Grouped, level: str) -> None:
    alignment = gemm.get_theoretical_mk_alignment_for_contiguous_layout(int(case.m * 1.2))
    gemm.set_mk_alignment_for_contiguous_layout(alignment)
    masked = case.how == "masked"
    given = groups_of(
        case.groups, case.m, case.n, case.k, case.kind, masked, case.layout, alignment
    )
    sizes = [len(a.index) for a in given.lefts]
    d: Any = np.full((given.rows, case.n), 7, BF16)
    extra: dict[str, Any] = {}
    if case.kind == "fp4":
        extra = {"recipe_a": (1, 128), "recipe_b": (1, 32)}
    name = "bf16" if case.kind == "bf16" else "fp8_fp4"
    if masked:
        call = getattr(gemm, f"m_grouped_{name}_gemm_nt_masked")
        result = d.reshape(case.groups, -1, case.n)
        call(given.a, given.b, result, np.array(sizes, np.int32), case.m, **extra)
    else:
        call = getattr(gemm, f"m_grouped_{name}_gemm_{case.layout}_contiguous")
        layout = np.full(given.rows, -1, np.int32)
        for g, (start, size) in enumerate(zip(given.starts, sizes, strict=True)):
            layout[start : start + size] = g
        if case.how == "psum":
            layout = np.array([s + n for s, n in zip(given.starts, sizes, strict=True)], np.int32)
            extra |= {"use_psum_layout": True, "ensure_zero_padding": case.zero}
        call(given.a, given.b, d, layout, **extra)
    gap = 0 if case.how == "index" or case.zero else 7
    for i, (start, size) in enumerate(zip(given.starts, sizes, strict=True)):
        check(d[start : start + size], given.lefts[i], given.rights[i], LIMIT[case.kind])
        following = [*given.starts[1:], given.rows][i]
        assert (d[start + size : following] == gap).all()


class KGroups(NamedTuple):
    """Each group's A and B as [rows, K of the group], and both as the function takes them."""

    lefts: list[Operand]
    rights: list[Operand]
    a: Any
    b: Any


@functools.lru_cache(maxsize=1)
def k_groups_of(case: KGrouped, ks: tuple[int, ...], starts: tuple[int, ...]) -> KGroups:
    """Each group has columns of its own of a pool; tokens' scales."""
    rng = np.random.default_rng(case.m + case.n)
    offset = 3 * 128
    width = max(ks) + offset
    begins = [128 * int(rng.integers(0, 4)) for _ in ks]
    sides: list[list[Operand]] = []
    for side, rows, draw in (("a", case.m, left), ("b", case.n, right)):
        named = key(side, rows, width, cast_of_a(case.kind), case.kind == "ue8m0", case.gran_k)
        sides.append([draw(rng, named, rows, b, b + k) for b, k in zip(begins, ks, strict=True)])
    if case.kind == "fp8":
        return KGroups(*sides, *map(flat, sides))
    return KGroups(*sides, *(along_k(side, starts) for side in sides))


def flat(side: list[Operand]) -> Any:
    """The groups' [rows, k] in a row, and scales [rows, sum of blocks]."""
    pairs = [x.pair for x in side]
    values = np.concatenate([v.reshape(-1) for v, _ in pairs])
    return values, np.concatenate([s for _, s in pairs], axis=1)


def along_k(side: list[Operand], starts: tuple[int, ...]) -> Any:
    """The groups' [k, rows] at their starts of [sum of K, rows], and scales a row a block."""
    pairs = [x.pair for x in side]
    values = np.zeros((starts[-1], len(side[0].index)), pairs[0][0].dtype)
    for (v, _), start in zip(pairs, starts, strict=False):
        values[start : start + v.shape[1]] = turned(v)
    if pairs[0][1] is None:
        return values
    return values, np.ascontiguousarray(np.concatenate([s.T for _, s in pairs]))


@at_levels(sample(KGrouped, k_grouped()), k_grouped())
def test_k_grouped(case: KGrouped, level: str) -> None:
    sizes = random.Random(case.groups)
    gemm.set_mk_alignment_for_contiguous_layout(case.alignment)
    reals = [max(1, int(case.k * sizes.uniform(0.7, 1.3))) for _ in range(case.groups)]
    if case.empty:
        reals[1] = 0
    wides = [-(-k // case.alignment) * case.alignment for k in reals]
    ks = reals if case.by_ends else wides
    starts = [int(s) for s in np.cumsum([0, *(wides if case.by_ends else ks)])]
    given = k_groups_of(case, tuple(ks), tuple(starts))
    c = [Added(case.n, np.float32, g) for g in range(case.groups)]
    d = np.empty((case.groups, case.m, case.n), np.float32)
    for g in range(case.groups):
        c[g].fill(d[g])
    if case.kind == "fp8":
        gemm.k_grouped_fp8_gemm_nt_contiguous(given.a, given.b, d, ks, np.array(ks, np.int32), c=d)
    else:
        layout = np.array([s + k for s, k in zip(starts, ks, strict=False)], np.int32)
        extra: dict[str, Any] = {"use_psum_layout": True} if case.by_ends else {}
        if case.kind != "bf16":
            extra["recipe"] = (1, 1, case.gran_k)
        name = "bf16" if case.kind == "bf16" else "fp8"
        call = getattr(gemm, f"k_grouped_{name}_gemm_tn_contiguous")
        call(given.a, given.b, d, None if case.by_ends else ks,
             layout if case.by_ends else np.array(ks, np.int32), c=d, **extra)  # fmt: skip
    for g, k in enumerate(ks):
        if k:
            check(d[g], given.lefts[g], given.rights[g], LIMIT[case.kind], c[g])
        else:
            assert (d[g] == c[g].part(0, case.m).numpy()).all()


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
