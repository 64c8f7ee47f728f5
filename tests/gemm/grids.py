"""DeepGEMM's own test grids (its SM90 lists).

`FULL` holds every case at its size, `short` makes one of them small, and `cover` picks, in order,
those that bring an axis value not seen yet. What only SM100 has (FP4, UE8M0, K alignments under
128, K by ends) is in `BEYOND`, at small sizes.
Source: DeepGEMM `tests/generators.py`, `test_fp8_fp4.py`, `test_bf16.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

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
