"""Model room: a batch cut in two micro-batches, and how much communication the cut hid.

In: a `StepBatch`. Out: two of about equally many tokens. A prompt may be cut in the middle: its
earlier part goes to micro-batch 1, whose attention comes first in the prefill order; generated
tokens are cut between sequences.
Source: SGLang's two-batch overlap (balanced token sums, one sequence in two chunks).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import numpy as np

from whalefall.model.step import StepBatch
from whalefall.trace import intervals

__all__ = ["OverlapClock", "split"]


def split(batch: StepBatch) -> tuple[StepBatch, StepBatch, np.ndarray]:
    """Micro-batches 0 and 1, and where their logits (0's, then 1's) lie in the batch's order."""
    T = len(batch.tokens)
    cut = T // 2
    if not batch.in_prompt:  # to the border of sequences nearest to the middle
        cut = int(batch.starts[np.abs(batch.starts - T / 2).argmin()])
    head, tail = _part(batch, 0, cut), _part(batch, cut, T)
    first, second = (tail, head) if batch.in_prompt else (head, tail)
    in_head = batch.logit_rows < cut
    wanted = np.concatenate([np.flatnonzero(~in_head), np.flatnonzero(in_head)])
    if not batch.in_prompt:
        wanted = np.concatenate([np.flatnonzero(in_head), np.flatnonzero(~in_head)])
    return first, second, np.argsort(wanted)


def _part(batch: StepBatch, first: int, last: int) -> StepBatch:
    """Tokens [first, last) of a batch."""
    starts = batch.starts
    low, high = np.searchsorted(starts, [first, last], side="right") - 1
    if last > starts[high]:
        high += 1
    if first == last:
        high = low
    rows = batch.logit_rows[(batch.logit_rows >= first) & (batch.logit_rows < last)] - first
    return StepBatch(
        tokens=np.ascontiguousarray(batch.tokens[first:last]),
        positions=np.ascontiguousarray(batch.positions[first:last]),
        starts=(np.clip(starts[low : high + 1], first, last) - first).astype(np.int32),
        block_tables=np.ascontiguousarray(batch.block_tables[low:high]),
        logit_rows=rows.astype(np.int32),
        in_prompt=batch.in_prompt,
    )


class OverlapClock:
    """Adds up communication, and the part of it during which this rank computed.

    Attributes:
        communication_s: time that tokens travelled.
        overlapped_s: of that, under compute.
    """

    def __init__(self) -> None:
        self.communication_s = self.overlapped_s = 0.0
        self._computed = intervals.Collector()
        self._moved = intervals.Collector()

    @contextlib.contextmanager
    def compute(self) -> Iterator[None]:
        """Times a computation."""
        start = time.perf_counter_ns()
        yield
        self._computed.add(start * 1e-9, time.perf_counter_ns() * 1e-9)

    def communicated(self, start_ns: int, end_ns: int) -> None:
        """Notes a communication."""
        self._moved.add(start_ns * 1e-9, end_ns * 1e-9)

    def close(self) -> None:
        """Add a step's times to the sums."""
        moved, computed = self._moved.spans(), self._computed.spans()
        self.communication_s += intervals.length(moved)
        self.overlapped_s += intervals.intersection_length(moved, computed)
        self._computed, self._moved = intervals.Collector(), intervals.Collector()

    @property
    def ratio(self) -> float:
        """Share of communication time that lay under compute; 0 before any."""
        return self.overlapped_s / self.communication_s if self.communication_s else 0.0
