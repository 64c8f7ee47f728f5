"""Ep room: headers — each rank tells all others how many rows go where, before the rows go."""

from __future__ import annotations

import threading
from collections import deque

import numpy as np

from whalefall.ep.fabric import MAILBOXES, Fabric
from whalefall.ep.handle import HEADER_FIELDS, Layout
from whalefall.ep.library import library
from whalefall.ep.links import Links
from whalefall.errors import LimitError, ShapeError

__all__ = ["Counts", "mailbox_bytes"]

AGREED = ("kind", "x_bytes", "scale_bytes", "top_k", "flags", "num_experts", "extra")
AGREED_AT = [HEADER_FIELDS.index(name) for name in AGREED]


class Counts:
    """The headers of one fabric, in the order of calls.

    Args:
        fabric: shared memory of this host.
        links: connections to other hosts.
    """

    def __init__(self, fabric: Fabric, links: Links) -> None:
        self._fabric, self._links, self._lib = fabric, links, library()
        self._rank, self._size = fabric.rank, fabric.topology.num_ranks
        self._next = 0
        self.tick = 0  # of the next collective
        self._late: deque[tuple[int, threading.Event]] = deque()

    def post(self, fields: dict[str, int], layout: Layout) -> tuple[int, int]:
        """Tell all ranks this rank's counts; returns the header's number and length.

        Raises: LimitError for too many experts.
        """
        fields = {**fields, "tick": self.tick % (1 << 32)}
        head = np.array([fields.get(name, 0) for name in HEADER_FIELDS], np.int64).astype(np.int32)
        mine = np.concatenate([head, layout.per_rank, layout.per_host, layout.per_expert])
        if mine.nbytes > self._fabric.plan.mailbox_bytes:
            raise LimitError(
                f"ep: {len(layout.per_expert)} experts need a header of {mine.nbytes} bytes, the "
                f"mailbox has {self._fabric.plan.mailbox_bytes}"
            )
        count = self.next_number()
        self._lib.wf_ep_post(self._fabric.pointer, count, mine.ctypes.data, mine.nbytes)
        self._links.send_header(count, mine)
        return count, len(mine)

    def next_number(self) -> int:
        """The number of the next header, once its mailbox is free."""
        while self._late and self._late[0][0] <= self._next - MAILBOXES:
            self._late.popleft()[1].wait(self._fabric.plan.timeout_s)
        count, self._next = self._next, self._next + 1
        return count

    def take_back(self, number: int) -> None:
        """The header of this number, the last one, was not posted."""
        self._next = number

    def collected_later(self, count: int) -> threading.Event:
        """Say that a header will be collected in a data phase; to be set when that has ended.

        Its tick ends only after all ranks have collected the header.
        """
        done = threading.Event()
        self._late.append((count, done))
        return done

    def collect(self, posted: tuple[int, int]) -> np.ndarray:
        """Every rank's header: [R, fields + R + H + E] int32; a masked rank's is zeros.

        Raises: ShapeError if the ranks disagree on a field; RankFailure.
        """
        count, length = posted
        heads = np.empty((self._size, length), np.int32)
        status = self._lib.wf_ep_collect(
            self._fabric.pointer, count, heads.ctypes.data, heads[0].nbytes
        )
        self._fabric.check(status, "counts")
        self.check_agreement(heads)
        return heads

    def check_agreement(self, heads: np.ndarray) -> None:
        """Raise ShapeError if the ranks' headers disagree on a field."""
        agreed = heads[:, AGREED_AT]
        if (agreed == agreed[self._rank]).all():
            return
        alive = [r for r in range(self._size) if not self._fabric.masked[r]]
        self._catch_up(heads[alive, HEADER_FIELDS.index("tick")])
        for name in AGREED:
            values = heads[:, HEADER_FIELDS.index(name)]
            wrong = [r for r in alive if values[r] != values[self._rank]]
            if wrong:
                raise ShapeError(
                    f"ep: rank {wrong[0]} calls with {name} = {values[wrong[0]]}, rank "
                    f"{self._rank} with {values[self._rank]}; all ranks must agree"
                )

    def _catch_up(self, ticks: np.ndarray) -> None:
        # Some had taken their ticks before they learnt of it, some not: all go on after the last.
        ahead = (ticks - np.int64(self.tick)).astype(np.int64) % (1 << 32)
        self.tick += max((int(n) for n in ahead if n < 1 << 31), default=0)


def mailbox_bytes(num_ranks: int, max_experts: int) -> int:
    """Room for any header."""
    return -(-4 * (len(HEADER_FIELDS) + 2 * num_ranks + max_experts) // 64) * 64
