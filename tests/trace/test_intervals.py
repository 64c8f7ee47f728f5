"""Sets of intervals: what a collector joins block by block is the union of all it was given."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whalefall.trace.intervals import Collector, union

moments = st.integers(0, 80)


@pytest.mark.parametrize("block", [1, 2, 3, 1000])
@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(moments, moments), max_size=40))
def test_blocks_join_to_the_union_of_all(block: int, given: list[tuple[int, int]]) -> None:
    class Blocks(Collector):
        JOIN = block

    collector = Blocks()
    for start, end in given:
        collector.add(start, end)
    starts, ends = collector.spans()
    covered = {t for start, end in given for t in range(start, end)}
    found = [t for span in zip(starts, ends, strict=True) for t in range(*map(int, span))]
    assert found == sorted(covered)  # sorted, disjoint
    assert (starts[1:] > ends[:-1]).all()  # and as few as can be


def test_more_intervals_than_a_block_keep_every_start_and_end() -> None:
    random = np.random.default_rng(0)
    starts = random.permutation(70_000) * 10.0
    ends = starts + random.integers(1, 13, len(starts))  # a quarter touch or overlap the next
    collector = Collector()
    assert len(starts) > Collector.JOIN
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        collector.add(start, end)
    for found, wanted in zip(collector.spans(), union(starts, ends), strict=True):
        np.testing.assert_array_equal(found, wanted)
