"""Ep room: headers — each rank tells all others how many rows go where, before the rows go."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

import numpy as np

from whalefall.ep.fabric import MAILBOXES, Fabric
from whalefall.ep.handle import HEADER_FIELDS, Layout
from whalefall.ep.library import library
from whalefall.ep.links import Links
from whalefall.errors import LimitError, ShapeError

__all__ = ["CLEAN", "COMBINE", "REPEAT", "Counts", "mailbox_bytes"]

AGREED = ("kind", "call", "x_bytes", "scale_bytes", "top_k", "flags", "num_experts", "extra")
AGREED_AT = [HEADER_FIELDS.index(name) for name in AGREED]
CLEAN, REPEAT, COMBINE = 3, 4, 5
KINDS = {
    1: "dispatch", 2: "barrier", CLEAN: "clean_low_latency_buffer", REPEAT: "dispatch by handle",
    COMBINE: "combine",
}  # fmt: skip
SERIALS = 1 << 24  # of one engine, before they begin again


class Counts:
    """The headers of one fabric, in the order of calls.

    Calls and headers are counted when they are called, ticks when the data move: a call that failed
    on all ranks took none, whatever was queued behind it.

    Args:
        fabric: shared memory of this host.
        links: connections to other hosts.
        engine: number of the engine, the same on all ranks.
    """

    def __init__(self, fabric: Fabric, links: Links, engine: int = 0) -> None:
        self._fabric, self._links, self._lib = fabric, links, library()
        self._rank, self._size = fabric.rank, fabric.topology.num_ranks
        self._next = self._calls = 0
        self._engine = engine % 128 * SERIALS
        self.tick = 0  # of the next data phase
        self._late: deque[tuple[int, threading.Event]] = deque()

    def post(self, fields: dict[str, int], layout: Layout) -> tuple[int, int]:
        """Tell all ranks this rank's counts; returns the header's number and length.

        Raises: LimitError for too many experts.
        """
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

    def next_call(self) -> int:
        """The number of a collective that this rank calls now."""
        call, self._calls = self._calls, self._calls + 1
        return call

    def next_number(self) -> int:
        """The number of the next header, once its mailbox is free."""
        while self._late and self._late[0][0] <= self._next - MAILBOXES:
            self._late.popleft()[1].wait(self._fabric.plan.timeout_s)
        count, self._next = self._next, self._next + 1
        return count

    def take_back(self, number: int) -> None:
        """The header of this number, the last one, was not posted, its collective not called."""
        self._next, self._calls = number, self._calls - 1

    def serial(self, number: int) -> int:
        """Of the dispatch whose header has this number: no other of these ranks has it."""
        return self._engine + number % SERIALS

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
        if status:
            self.check_agreement(heads)
        return heads

    def check_agreement(self, heads: np.ndarray, ranks: Sequence[int] | None = None) -> None:
        """Raise ShapeError if these ranks' (default: all ranks') headers disagree on a field."""
        agreed = heads[:, AGREED_AT]
        if (agreed == agreed[self._rank]).all():
            return
        for name in AGREED:
            values = heads[:, HEADER_FIELDS.index(name)].tolist()
            for r in range(self._size) if ranks is None else ranks:
                if values[r] != values[self._rank] and not self._fabric.masked[r]:
                    kind = int(heads[self._rank, 0])
                    raise ShapeError(_disagreement(kind, name, r, values[r], self._rank, values))


def _disagreement(
    kind: int, name: str, other: int, its: int, rank: int, values: Sequence[int]
) -> str:
    mine, what = values[rank], KINDS[kind]
    if name == "kind":
        return (
            f"ep: rank {other} calls {KINDS.get(its, 'something else')}, rank {rank} {what}; all "
            "ranks must agree on their calls and the order of them"
        )
    if name == "call":
        return (
            f"ep: {what} is call {its} of rank {other}, call {mine} of rank {rank}; all ranks must "
            "agree on their calls and the order of them"
        )
    if name == "extra" and kind in (REPEAT, COMBINE):
        return (
            f"ep: {what}: rank {other} gives the handle of {_dispatch(its, mine)}, rank {rank} "
            f"that of {_dispatch(mine, its)}; all ranks must agree"
        )
    if kind == COMBINE:
        name = {"x_bytes": "hidden", "flags": "dtype or topk_weights"}[name]
        if name != "hidden":
            name = "use_logfmt" if (its ^ mine) & 4 else name
            its, mine = _form(its), _form(mine)  # type: ignore[assignment]
        return (
            f"ep: combine: ranks disagree on {name}: rank {other} gives {its}, rank {rank} {mine}; "
            "all ranks must agree"
        )
    return (
        f"ep: {what}: rank {other} calls with {name} = {its}, rank {rank} with {mine}; all ranks "
        "must agree"
    )


def _dispatch(serial: int, other: int) -> str:
    """A dispatch in words; with its engine, if another dispatch is of another one."""
    engine = serial // SERIALS
    words = f"dispatch {serial % SERIALS}"
    return words if engine == other // SERIALS else f"{words} of Buffer (or engine) {engine}"


def _form(flags: int) -> str:
    """What `form_of` of combine.h says in words."""
    words = ["float32" if flags & 1 else "bfloat16"]
    words += ["topk_weights"] if flags & 2 else []
    return " with ".join([*words, *(["use_logfmt"] if flags & 4 else [])])


def mailbox_bytes(num_ranks: int, max_experts: int) -> int:
    """Room for any header."""
    return -(-4 * (len(HEADER_FIELDS) + 2 * num_ranks + max_experts) // 64) * 64
