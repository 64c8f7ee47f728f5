"""File-system room: is what clients saw of one chunk explained by some order of their operations?

A history is linearizable if each operation can be given a moment between its call and its return
so that all results follow. An operation without a return may have happened at any later moment, or
never. Source: Wing & Gong's search, with Lowe's memory of states seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    """Whether the operations on one chunk can be put in an order that explains them."""
    known = [op for op in history if op.kind != "read" or op.returned_s < FOREVER]
    ops = sorted(known, key=lambda op: op.called_s)
    must = sum(1 << i for i, op in enumerate(ops) if op.returned_s < FOREVER)
    seen: set[tuple[int, bytes]] = set()
    stack = [(0, initial)]
    while stack:
        done, state = stack.pop()
        if done & must == must:
            return True
        if (done, state) in seen:
            continue
        seen.add((done, state))
        # Only an operation called before every other open one returned can be next.
        limit = min(
            (op.returned_s for i, op in enumerate(ops) if not done >> i & 1), default=FOREVER
        )
        choices = []
        for i, op in enumerate(ops):
            if op.called_s > limit:
                break
            if done >> i & 1:
                continue
            after = op.apply(state)
            if after is not None:
                choices.append((done | 1 << i, after))
        stack.extend(reversed(choices))
    return False
