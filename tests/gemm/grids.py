"""DeepGEMM's own test grids (its SM90 lists), their operands, and what their products must be.

`FULL` holds every case at its size, `short` makes one of them small, and `cover` picks, in order,
those that bring an axis value not seen yet. What only SM100 has (FP4, UE8M0, K alignments under
128, K by ends) is in `BEYOND`, at small sizes.
Source: DeepGEMM `tests/generators.py`, `test_fp8_fp4.py`, `test_bf16.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np

from tests.gemm.operands import BF16, spread
from whalefall import gemm
from whalefall.dtypes import e2m1_to_float
from whalefall.testing.closeness import diff

NK = ((2112, 7168), (576, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168),
      (7168, 2048))  # fmt: skip
FP32_NK = ((256, 7168), (129280, 7168))  # BF16 operands, fp32 results
GROUPED_NK = ((6144, 7168), (7168, 3072), (4096, 4096), (4096, 2048))
LIMIT = {"fp8": 1e-3, "ue8m0": 1e-3, "fp4": 1e-2, "bf16": 1e-5}
CUBLASLT_LIMIT = 6e-7  # but where bf16 is added to
MAX_M = 4096  # rows of a masked group


@dataclass(frozen=True)
class Dense:
    """D[m, n] = C + A · B; `layout` as in the function's name, `per_block` the scales of b."""

    m: int
    n: int
    k: int
    kind: str
    layout: str = "nt"
    accumulate: bool = False
    out: str = "bfloat16"
    per_block: bool = True


@dataclass(frozen=True)
class Grouped:
    """Rows sorted by group, about `m` a group; `how`: an index, ends (psum) or a mask."""

    groups: int
    m: int
    n: int
    k: int
    kind: str
    how: str
    layout: str = "nt"
    zero: bool = True


@dataclass(frozen=True)
class KGrouped:
    """D[g] = C[g] + A_g · B_g over about `k` of K a group, the groups' starts aligned."""

    groups: int
    m: int
    n: int
    k: int
    kind: str
    empty: bool = False  # one group has no K
    gran_k: int = 128
    alignment: int = 128
    by_ends: bool = False


Case = TypeVar("Case", Dense, Grouped, KGrouped)


def dense() -> Iterator[Dense]:
    """Forward, dgrad and wgrad of the original's list."""
    for kind in ("fp8", "bf16"):
        shapes = [(n, k, "bfloat16") for n, k in NK]
        shapes += [(n, k, "float32") for n, k in FP32_NK if kind == "bf16"]
        for m in (1, 128, 4096):
            for n, k, out in shapes:
                yield Dense(m, n, k, kind, out=out)
                if out == "bfloat16" and kind == "bf16":
                    yield Dense(m, n, k, kind, accumulate=True)
        for n, k, _ in shapes:
            dgrad, wgrad = ("nt", "nt") if kind == "fp8" else ("nn", "tn")
            yield Dense(4096, k, n, kind, dgrad)
            yield Dense(n, 4096, k, kind, wgrad, True, "float32", per_block=False)
            yield Dense(n, 4096, k, kind, wgrad)


def grouped() -> Iterator[Grouped]:
    """Contiguous by index and by ends; masked, and the same rows by ends."""
    for kind in ("fp8", "bf16"):
        for groups, m in ((4, 8192), (8, 4096)):
            for n, k in GROUPED_NK:
                for layout in ("nt", "nn") if kind == "bf16" else ("nt",):
                    for how in ("psum", "index"):
                        yield Grouped(groups, m, n, k, kind, how, layout, zero=False)
        for groups, m in ((32, 192), (6, 1024), (32, 20), (6, 20)):
            for n, k in GROUPED_NK:
                for how in ("psum", "masked"):
                    yield Grouped(groups, m, n, k, kind, how, zero=False)


def k_grouped() -> Iterator[KGrouped]:
    """Weight gradients of 64, 32 and 16 experts a rank."""
    for kind in ("fp8", "bf16"):
        for groups, k in ((4, 8192), (8, 4096), (16, 2048)):
            for m, n in ((4096, 7168), (7168, 2048)):
                for empty in (False, True):
                    yield KGrouped(groups, m, n, k, kind, empty)


def beyond() -> Iterator[Dense | Grouped | KGrouped]:
    """What SM100 adds, small."""
    for kind in ("ue8m0", "fp4"):
        for layout in ("nt", "nn", "tn"):
            for out, accumulate in (("bfloat16", False), ("bfloat16", True), ("float32", True)):
                yield Dense(33, 112, 192, kind, layout, accumulate, out, layout != "tn")
        for how, zero in (("index", False), ("psum", False), ("psum", True), ("masked", False)):
            for layout in ("nt",) if how == "masked" or kind == "fp4" else ("nt", "nn"):
                yield Grouped(4, 24, 112, 192, kind, how, layout, zero)
    for gran_k, alignments in ((32, (32, 128, 160, 224)), (128, (128, 160, 224))):
        for alignment in alignments:
            for by_ends in (False, True):
                yield KGrouped(4, 48, 80, 160, "ue8m0", True, gran_k, alignment, by_ends)
    for alignment in (32, 128, 192):
        for by_ends in (False, True):
            yield KGrouped(4, 48, 80, 160, "bf16", True, 128, alignment, by_ends)


def short(case: Case) -> Case:
    """The case with its sizes beyond 128 made small, different ones different."""
    small = {
        name: value if value <= 128 else 48 + 16 * (value // 128 % 13)
        for name, value in vars(case).items()
        if name in ("m", "n", "k")
    }
    return dataclasses.replace(case, **small)


def cover(cases: Iterable[Case]) -> list[Case]:
    """Those of the cases that are the first with a value of an axis (N and K being one)."""
    seen: set[Any] = set()
    picked = []
    for case in cases:
        values = {**vars(case), "n": (getattr(case, "n", 0), getattr(case, "k", 0)), "k": 0}
        new = {(type(case).__name__, case.kind, *item) for item in values.items()} - seen
        if new:
            seen |= new
            picked.append(case)
    return picked


class Operand(NamedTuple):
    """What a product gets, the values before the cast, and after it as fp32 (rows `part`)."""

    given: Any
    plain: Any  # [rows, k] bfloat16
    values: Any
    scales: Any
    gran: tuple[int, int]

    def exact(self, part: slice) -> Any:
        """Rows of what the codes stand for, float64; `part` starts at a multiple of 128."""
        if self.scales is None:
            return self.plain[part].astype(np.float64)
        if self.values.dtype == np.int8:
            packed = self.values[part].view(np.uint8)
            codes = np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)
            wide: Any = e2m1_to_float(codes).astype(np.float64)
        else:
            wide = self.values[part].astype(np.float32).astype(np.float64)
        rows = slice(part.start // self.gran[0], -(-part.stop // self.gran[0]))
        return wide * spread(self.scales[rows], *self.gran, wide.shape)


def operand(rng: np.random.Generator, rows: int, k: int, kind: str, cast: str) -> Operand:
    """Normal values, cast: "token" or "block" scales of 128, "fp4" tokens of 32, or "bf16"."""
    plain = np.empty((rows, k), BF16)
    for at in range(0, rows, 512):
        part = plain[at : at + 512]
        part[:] = rng.standard_normal(part.shape, np.float32)
    if cast == "bf16":
        return Operand(plain, plain, plain, None, (1, 1))
    ue8m0 = kind != "fp8"
    if cast == "fp4":
        pair = gemm.per_token_cast_to_fp4(plain, ue8m0, 32)
        return Operand(pair, plain, *pair, (1, 32))
    to_fp8 = gemm.per_block_cast_to_fp8 if cast == "block" else gemm.per_token_cast_to_fp8
    pair = to_fp8(plain, ue8m0)
    return Operand(pair, plain, *pair, (128 if cast == "block" else 1, 128))


def cast_of_b(kind: str, per_block: bool) -> str:
    """How `operand` casts b."""
    return kind if kind in ("bf16", "fp4") else "block" if per_block else "token"


@functools.lru_cache(maxsize=1)
def dense_operands(m: int, n: int, k: int, kind: str, per_block: bool) -> tuple[Operand, Operand]:
    """Both operands; kept for the levels, which run one after the other."""
    rng = np.random.default_rng(m + n + k)
    a = operand(rng, m, k, kind, "bf16" if kind == "bf16" else "token")
    return a, operand(rng, n, k, kind, cast_of_b(kind, per_block))


@functools.lru_cache(maxsize=1)
def grouped_operands(
    groups: int, m: int, n: int, k: int, kind: str
) -> tuple[list[Operand], list[Operand]]:
    """Each group's rows (0.7 to 1.3 times m) and matrix."""
    rng, sizes = np.random.default_rng(m + n + k), random.Random(groups)
    cast = "bf16" if kind == "bf16" else "token"
    rows = [int(m * sizes.uniform(0.7, 1.3)) for _ in range(groups)]
    left = [operand(rng, count, k, kind, cast) for count in rows]
    return left, [operand(rng, n, k, kind, cast_of_b(kind, True)) for _ in range(groups)]


def check(d: Any, a: Operand, b: Operand, limit: float, c: Any = None) -> None:
    """A block of `d` is the product of the values before the casts, rounded as `d` is, within the
    original's limit; and, times signs, all of it is the product of the codes."""
    rng = np.random.default_rng(0)
    m, n = d.shape
    if m == 0:
        return
    rows = np.unique(np.concatenate([[0, m - 1], rng.integers(0, m, 94)]))
    columns = np.unique(np.concatenate([[0, n - 1], rng.integers(0, n, 254)]))
    wanted = a.plain[rows].astype(np.float64) @ b.plain[columns].astype(np.float64).T
    block = np.ix_(rows, columns)
    if c is not None:
        wanted += c[block].astype(np.float64)
    found = diff(d[block], wanted.astype(d.dtype))
    assert found < limit, f"diff {found:.2g}, wanted below {limit:g}"

    signs = rng.choice([-1.0, 1.0], n)
    mixed = np.zeros(b.plain.shape[1])
    for at in range(0, n, 1024):
        part = slice(at, min(at + 1024, n))
        mixed += signs[part] @ b.exact(part)
    got, want = np.empty(m), np.empty(m)
    for at in range(0, m, 1024):
        part = slice(at, min(at + 1024, m))
        got[part] = d[part].astype(np.float64) @ signs
        want[part] = a.exact(part) @ mixed
        if c is not None:
            want[part] += c[part].astype(np.float64) @ signs
    # bf16 rounds each of N values by 2^-9 at most, which add up as sqrt(N), as the values do
    size = np.sqrt(np.mean(want**2)) + 1e-30
    worst = np.abs(got - want).max() / size
    assert worst < (0.02 if d.dtype == BF16 else 1e-4), f"a row is off by {worst:.2g} of its size"
