"""Trace room: sets of time intervals, as sorted arrays of starts and ends."""

from __future__ import annotations

from array import array

import numpy as np
import numpy.typing as npt

__all__ = ["Collector", "gaps", "intersection_length", "length", "union"]

Times = npt.NDArray[np.float64]
Spans = tuple[Times, Times]


class Collector:
    """Gathers intervals in any order; keeps their union, 16 bytes each, joined now and then."""

    JOIN = 1 << 16

    def __init__(self) -> None:
        self._starts, self._ends = array("d"), array("d")
        self._joined: Spans = (np.empty(0), np.empty(0))

    def add(self, start: float, end: float) -> None:
        """Put [start, end) into the set."""
        self._starts.append(start)
        self._ends.append(end)
        if len(self._starts) >= self.JOIN:
            self._join()

    def _join(self) -> None:
        starts = np.concatenate([self._joined[0], np.frombuffer(self._starts)])
        ends = np.concatenate([self._joined[1], np.frombuffer(self._ends)])
        self._joined = union(starts, ends)
        self._starts, self._ends = array("d"), array("d")

    def spans(self) -> Spans:
        """The union of all that was added."""
        if len(self._starts):
            self._join()
        return self._joined


def union(starts: Times, ends: Times) -> Spans:
    """Disjoint, sorted intervals that cover the same points; empty ones vanish."""
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], ends[order]
    full = ends > starts
    starts, ends = starts[full], ends[full]
    if not len(starts):
        return starts, ends
    reach = np.maximum.accumulate(ends)
    first = np.concatenate([[True], starts[1:] > reach[:-1]])
    last = np.concatenate([first[1:], [True]])
    return starts[first], reach[last]


def length(spans: Spans) -> float:
    """The time that a union covers."""
    return float((spans[1] - spans[0]).sum())


def intersection_length(a: Spans, b: Spans) -> float:
    """The time that both unions cover: what they have together, less what either covers."""
    both = union(np.concatenate([a[0], b[0]]), np.concatenate([a[1], b[1]]))
    return max(0.0, length(a) + length(b) - length(both))


def gaps(spans: Spans) -> Spans:
    """The intervals between a union's intervals."""
    return spans[1][:-1], spans[0][1:]
