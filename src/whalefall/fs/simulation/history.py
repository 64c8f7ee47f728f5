"""File-system room: is what clients saw of one chunk explained by some order of their operations?

A history is linearizable if each operation can be given a moment between its call and its return
so that all results follow. An operation without a return may have happened at any later moment, or
never. Source: Wing & Gong's search, with Lowe's memory of states seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from whalefall.fs.simulation.store import apply_write

__all__ = ["Operation", "linearizable"]

FOREVER = float("inf")


@dataclass
class Operation:
    """One client's operation on one chunk.

    Attributes:
        kind: write, remove or read.
        data: what was written, or read.
        returned_s: infinity while (or if) its outcome is not known.
    """

    client: str
    kind: str
    chunk: bytes
    called_s: float
    offset: int = 0
    data: bytes = b""
    returned_s: float = FOREVER

    def apply(self, state: bytes) -> bytes | None:
        """The chunk after it; None if it cannot have happened in this state."""
        if self.kind == "write":
            return apply_write(state, self.offset, self.data)
        if self.kind == "remove":
            return b""
        return state if state == self.data else None

    def __str__(self) -> str:
        what = self.data.hex() or "-"
        return (
            f"{self.client} {self.kind} [{self.offset}] {what} "
            f"{self.called_s:.3f}…{self.returned_s:.3f}"
        )


def linearizable(history: Sequence[Operation], initial: bytes = b"") -> bool:
    """Whether the operations on one chunk can be put in an order that explains them.

    Two rules keep the search small where many outcomes are unknown. A read that can be next and
    fits is next, since it changes nothing. And of two ways to the same content by the same
    operations that did happen, one that used up fewer of the unknown can do all that the other
    can: those that used up the fewest are looked at first.
    """
    known = [op for op in history if op.kind != "read" or op.returned_s < FOREVER]
    ops = sorted(known, key=lambda op: op.called_s)
    must = sum(1 << i for i, op in enumerate(ops) if op.returned_s < FOREVER)
    seen: dict[tuple[int, bytes], list[int]] = {}
    waiting = [(0, 0, 0, initial)]
    while waiting:
        _, _, done, state = heappop(waiting)
        if done & must == must:
            return True
        spent = done & ~must
        before = seen.setdefault((done & must, state), [])
        if any(other & spent == other for other in before):
            continue
        before.append(spent)
        for after, content in _next(ops, done, state):
            sure = (after & must).bit_count()
            heappush(waiting, (after.bit_count() - sure, -sure, after, content))
    return False


def _next(ops: Sequence[Operation], done: int, state: bytes) -> list[tuple[int, bytes]]:
    """What may follow: operations done, and content, with one more of them."""
    # Only an operation called before every other open one returned can be next.
    limit = min((op.returned_s for i, op in enumerate(ops) if not done >> i & 1), default=FOREVER)
    choices = []
    for i, op in enumerate(ops):
        if op.called_s > limit:
            break
        after = None if done >> i & 1 else op.apply(state)
        if after is None:
            continue
        if op.kind == "read":
            return [(done | 1 << i, after)]
        choices.append((done | 1 << i, after))
    return choices
