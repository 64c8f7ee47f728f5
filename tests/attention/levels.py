"""One problem at every ISA level, compared with one reference as that is made, in parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest

from tests.attention.closeness import Closeness
from whalefall import jit

# |Δ|, |Δ| / |want|, 1 - cos of each result
Tolerances = tuple[tuple[float, float, float], ...]
LSE_DECODE, LSE_PREFILL = (1e-6, 8.01 / 65536, 1e-7), (1e-6, 2.01 / 65536, 1e-7)
DENSE_DECODE: Tolerances = ((8e-4, 2.01 / 128, 5e-6), LSE_DECODE)
SPARSE_DECODE: Tolerances = ((1e-3, 2.01 / 128, 5e-6), LSE_DECODE)
SPARSE_PREFILL: Tolerances = ((8e-4, 3.01 / 128, 7e-6), LSE_PREFILL, LSE_PREFILL)
MHA_PREFILL: Tolerances = ((1e-3, 8.01 / 128, 7e-6), LSE_PREFILL)


def agree_at_every_level(
    call: Callable[[], tuple[Any, ...]],
    reference: Iterable[tuple[Any, tuple[Any, ...]]],
    tolerances: Tolerances,
    levels: Sequence[str] = (),
) -> None:
    """`call` gives its results; `reference` pairs of an index into each of them and their part;
    `levels`: all of the machine's if empty."""
    results = {level: call() for level in forced_levels(levels)}
    measures = {level: [Closeness(*t) for t in tolerances] for level in results}
    for where, wanted in reference:
        for level, got in results.items():
            parts = zip(measures[level], got, wanted, strict=True)
            for measure, whole, want in parts:
                measure.add(whole[where], want)
    for each in measures.values():
        for measure in each:
            measure.finish()


def forced_levels(levels: Sequence[str]) -> Iterator[str]:
    """Each level, in force while it is the loop's."""
    with pytest.MonkeyPatch.context() as patch:
        for level in levels or jit.levels():
            patch.setenv("WHALEFALL_ISA", level)
            yield level
