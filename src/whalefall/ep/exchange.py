"""Ep room: dispatch and combine over one fabric, on arrays; the order of ticks is kept here.

Every rank calls the same collectives in the same order. A dispatch first announces its counts (all
ranks learn all counts), which fixes how many ticks it takes; then the data move, in this thread or
in the communication thread.

# T tokens, R ranks, E experts, El experts of this rank, K top-k, N rows received
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from whalefall import trace
from whalefall.ep.arena import Arena
from whalefall.ep.fabric import Fabric
from whalefall.ep.handle import HEADER_FIELDS, Handle, Layout, Received, Want
from whalefall.ep.library import CombineCall, DispatchCall, library
from whalefall.ep.links import Links
from whalefall.errors import LimitError, ShapeError

__all__ = ["Bias", "Exchange", "Pending", "Rows"]

AGREED = ("kind", "x_bytes", "scale_bytes", "top_k", "flags", "num_experts", "extra")
AGREED_AT = [HEADER_FIELDS.index(name) for name in AGREED]
BIG_BYTES = 8 << 20  # results above this are written around the caches
META_BYTES = 16
THREAD_BYTES = 4 << 20  # what makes another thread worth waking
MAX_ROW_BYTES = (1 << 17) - 4 * 256
Bias = tuple[np.ndarray | None, np.ndarray | None]


@dataclass(frozen=True)
class Rows:
    """What a rank sends; all contiguous but `x`, whose rows may lie apart.

    Attributes:
        x: [T, …].
        scale: [T, …] sent along, or None.
        topk_idx: [T, K] int64, or None.
        topk_weights: [T, K] float32, or None.
    """

    x: np.ndarray
    scale: np.ndarray | None = None
    topk_idx: np.ndarray | None = None
    topk_weights: np.ndarray | None = None

    @property
    def x_bytes(self) -> int:
        """Bytes of a row of x."""
        return _row_bytes(self.x)

    @property
    def scale_bytes(self) -> int:
        """Bytes of a row of scales."""
        return 0 if self.scale is None else _row_bytes(self.scale)

    @property
    def top_k(self) -> int:
        """K."""
        return 0 if self.topk_idx is None else self.topk_idx.shape[1]

    @property
    def packed_bytes(self) -> int:
        """Bytes of a packed row, at most."""
        return -(-(self.x_bytes + self.scale_bytes + 3 + 8 * self.top_k) // 64) * 64

    def fields(self, want: Want, max_rows: int) -> dict[str, int]:
        """A header's fields."""
        flags = want.per_selection | (self.topk_weights is not None) << 1
        return {
            "kind": 1, "tokens": len(self.x), "x_bytes": self.x_bytes,
            "scale_bytes": self.scale_bytes, "top_k": self.top_k, "flags": flags,
            "num_experts": want.num_experts, "extra": want.rows_per_expert or max_rows,
        }  # fmt: skip


@dataclass
class Pending:
    """A collective whose data phase has not run: `send` and `receive`, or both by `run`."""

    send: Callable[[], None]
    receive: Callable[[], None]
    run: Callable[[], None]
    result: Any


class Exchange:
    """The collectives of this rank on one fabric.

    Args:
        fabric: shared memory of this host.
        links: connections to other hosts.
        arena: memory for results.
        one_tick: every collective fits one slot (low latency): its halves can be split.
    Attributes:
        num_threads: that copy and add; 0: by load (bytes, and cores for each rank of the host).
    """

    def __init__(self, fabric: Fabric, links: Links, arena: Arena, one_tick: bool) -> None:
        self.fabric, self.links, self.arena, self.one_tick = fabric, links, arena, one_tick
        self.rank, self.size = fabric.rank, fabric.topology.num_ranks
        self.num_hosts = len(fabric.topology.hosts)
        self.host_of = np.array([fabric.topology.host_of(r) for r in range(self.size)], np.int32)
        self.lib = library()
        self.num_threads = 0
        self._tick = 0
        self._count = 0

    def threads(self, nbytes: int) -> int:
        """Threads for a collective that moves so many bytes here: as asked, else by load."""
        if self.num_threads:
            return self.num_threads
        cores = len(os.sched_getaffinity(0)) // len(self.fabric.locals)
        return max(1, min(cores, nbytes // THREAD_BYTES))

    # ---- counts

    def post(self, fields: dict[str, int], layout: Layout) -> tuple[int, int]:
        """Tell all ranks this rank's counts; returns the header's number and length.

        Raises: LimitError for too many experts.
        """
        head = np.array([fields.get(name, 0) for name in HEADER_FIELDS], np.int32)
        mine = np.concatenate([head, layout.per_rank, layout.per_host, layout.per_expert])
        if mine.nbytes > self.fabric.plan.mailbox_bytes:
            raise LimitError(
                f"ep: {len(layout.per_expert)} experts need a header of {mine.nbytes} bytes, the "
                f"mailbox has {self.fabric.plan.mailbox_bytes}"
            )
        count, self._count = self._count, self._count + 1
        self.lib.wf_ep_post(self.fabric.pointer, count, mine.ctypes.data, mine.nbytes)
        self.links.send_header(count, mine)
        return count, len(mine)

    def collect(self, posted: tuple[int, int]) -> np.ndarray:
        """Every rank's header: [R, fields + R + H + E] int32; a masked rank's is zeros.

        Raises: ShapeError if the ranks disagree on a field; RankFailure.
        """
        count, length = posted
        heads = np.empty((self.size, length), np.int32)
        status = self.lib.wf_ep_collect(
            self.fabric.pointer, count, heads.ctypes.data, heads[0].nbytes
        )
        self.fabric.check(status, "counts")
        self._check_agreement(heads)
        return heads

    def _check_agreement(self, heads: np.ndarray) -> None:
        agreed = heads[:, AGREED_AT]
        if (agreed == agreed[self.rank]).all():
            return
        alive = [r for r in range(self.size) if not self.fabric.masked[r]]
        for name in AGREED:
            values = heads[:, HEADER_FIELDS.index(name)]
            wrong = [r for r in alive if values[r] != values[self.rank]]
            if wrong:
                raise ShapeError(
                    f"ep: rank {wrong[0]} calls with {name} = {values[wrong[0]]}, rank {self.rank} "
                    f"with {values[self.rank]}; all ranks must agree"
                )

    def _take_ticks(self, ticks: int) -> int:
        base, self._tick = self._tick, self._tick + (1 if self.one_tick else ticks)
        return base

    def _block(self, row_bytes: int, what: str) -> int:
        if self.one_tick:
            return 1 << 40
        block = (self.fabric.plan.chunk_bytes - 256) // (row_bytes + META_BYTES)
        if block < 1:
            raise LimitError(
                f"ep: {what}: {row_bytes} bytes for one token do not fit a chunk of "
                f"{self.fabric.plan.chunk_bytes} bytes; make the buffer (num_nvl_bytes) larger"
            )
        return block

    # ---- dispatch

    def dispatch(
        self, rows: Rows, layout: Layout, want: Want, handle: Handle | None = None,
        into: Received | None = None, max_rows: int = 0,
    ) -> Pending:  # fmt: skip
        """Announce a dispatch and prepare its data phase.

        Args:
            rows: what to send.
            layout: counts of this batch.
            want: the form.
            handle: of an earlier dispatch, whose counts hold again; nothing is announced then.
            into: arrays to fill, with room for `max_rows` rows (the same number on all ranks).
            max_rows: see `into`.
        Returns: the pending data phase; its result is a `Received`.
        Raises: LimitError on every rank if one of them would get more than `max_rows`.
        """
        if handle is None:
            handle = Handle(want, self.rank, self.fabric.topology, layout.in_rank,
                            rows.topk_idx if want.per_selection else None)  # fmt: skip
            handle.fill(self.collect(self.post(rows.fields(want, max_rows), layout)))
        most = int(handle.rows.sum(0).max(initial=0))
        if max_rows and most > max_rows:
            raise LimitError(
                f"ep: a rank would receive {most} rows, buffers have room for {max_rows} "
                "(num_worst_tokens)"
            )
        received = into or self.allocate(rows, want, handle.num_rows)
        received.handle = handle
        if handle.expert_counts is not None:
            received.per_expert = handle.expert_counts.sum(0)
        block = self._block(rows.packed_bytes, "dispatch")
        ticks = -(-int(handle.tokens.max(initial=0)) // block)
        call, keep = self._call(rows, layout, want, received, block, self._take_ticks(ticks), ticks)
        self._fill_call(call, keep, handle, len(received.x))
        return Pending(
            partial(self._phase, call, keep, True, False),
            partial(self._phase, call, keep, False, True),
            partial(self._phase, call, keep, True, True), received,
        )  # fmt: skip

    def low_latency_dispatch(
        self, rows: Rows, layout: Layout, want: Want, waited_ns: np.ndarray | None = None
    ) -> Pending:
        """Prepare a dispatch that sends without counts: `send` posts and stages, `receive` pulls.

        Its result's `handle` and `per_expert` are known after `receive`.
        """
        handle = Handle(want, self.rank, self.fabric.topology, layout.in_rank, rows.topk_idx)
        room = want.num_experts // self.size * want.rows_per_expert
        received = self.allocate(rows, want, room)
        received.handle = handle
        call, keep = self._call(rows, layout, want, received, 1 << 40, self._take_ticks(1), 1)
        call.waited_ns = _at(waited_ns)
        posted: list[tuple[int, int]] = []

        def send() -> None:
            posted.append(self.post(rows.fields(want, 0), layout))
            self._phase(call, keep, True, False)

        def receive() -> None:
            handle.fill(self.collect(posted[0]))
            assert handle.expert_counts is not None
            received.per_expert = handle.expert_counts.sum(0)
            self._fill_call(call, keep, handle, room)
            self._phase(call, keep, False, True)

        def run() -> None:
            send()
            receive()

        return Pending(send, receive, run, received)

    def _phase(self, call: DispatchCall, keep: list[Any], stage: bool, pull: bool) -> None:
        call.stage, call.pull = stage, pull
        with trace.span("ep.dispatch", "communication", tokens=call.tokens):
            sent = self.links.send_blocks(call, keep) if stage else None
            status = self.lib.wf_ep_dispatch(self.fabric.pointer, ctypes.addressof(call))
            self.fabric.check(status, "dispatch")
            if sent is not None:
                sent()

    def allocate(self, rows: Rows, want: Want, count: int) -> Received:
        """Arrays for `count` received rows."""
        K, selection, empty = want.top_k, want.per_selection, self.arena.empty
        scale = None
        if rows.scale is not None:
            shape: tuple[int, ...] = (count, *rows.scale.shape[1:])
            if room := want.rows_per_expert:
                shape = (count // room, rows.scale.shape[1], room)
            scale = empty(shape, rows.scale.dtype)
        weights = None
        if rows.topk_weights is not None:
            weights = empty((count,) if selection else (count, K), np.float32)
        idx = empty((count, K), np.int64) if K and not selection else None
        return Received(empty((count, *rows.x.shape[1:]), rows.x.dtype), scale, idx, weights)

    def _call(
        self, rows: Rows, layout: Layout, want: Want, received: Received, block: int, base: int,
        ticks: int,
    ) -> tuple[DispatchCall, list[Any]]:  # fmt: skip
        call = DispatchCall(
            x=_at(rows.x), scale=_at(rows.scale), topk_idx=_at(rows.topk_idx),
            topk_weights=_at(rows.topk_weights), in_rank=_at(layout.in_rank),
            x_stride=rows.x.strides[0] if len(rows.x) else 0, x_bytes=rows.x_bytes,
            scale_bytes=rows.scale_bytes, top_k=rows.top_k, tokens=len(rows.x), block=block,
            ticks=ticks, base=base, experts_per_rank=max(1, want.num_experts // self.size),
            per_selection=want.per_selection, big=received.x.nbytes > BIG_BYTES,
            transposed_rows=want.rows_per_expert, recv_x=_at(received.x),
            recv_scale=_at(received.scale), recv_idx=_at(received.topk_idx),
            recv_weights=_at(received.topk_weights), capacity=len(received.x),
            threads=self.threads(received.x.nbytes),
        )  # fmt: skip
        return call, [rows, layout, received]

    def _fill_call(self, call: DispatchCall, keep: list[Any], handle: Handle, room: int) -> None:
        """Point the call to cursors and lists, whose sizes the counts fix."""
        start = handle.order_start[:-1].copy()
        cursor = handle.expert_cursor() if handle.want.per_selection else start
        handle.token = token = np.empty(room, np.int32)
        if not handle.want.per_selection:
            handle.order_token = token[: handle.num_rows]
        tables = [np.zeros(self.size, np.uint64) for _ in range(3)]
        for source, lists in handle.forward.items():
            for table, array in zip(tables, lists, strict=True):
                table[source] = array.ctypes.data
        forward_cursor = np.zeros(self.size, np.int64)
        call.recv_token, call.cursor = _at(token), _at(cursor)
        call.order, call.order_token = _at(handle.order), _at(handle.order_token)
        call.order_cursor, call.forward_cursor = _at(start), _at(forward_cursor)
        if handle.forward:
            call.forward_token, call.forward_mask, call.forward_idx = (_at(t) for t in tables)
        keep += [handle, token, cursor, start, tables, forward_cursor]

    # ---- combine

    def combine(
        self,
        x: np.ndarray,
        handle: Handle,
        out: np.ndarray,
        row_weights: np.ndarray | None = None,
        topk_weights: np.ndarray | None = None,
        out_weights: np.ndarray | None = None,
        bias: Bias = (None, None),
        zero_copy_stride: int = 0,
        waited_ns: np.ndarray | None = None,
    ) -> Pending:
        """Prepare the way back.

        Args:
            x: rows as received, [N, H], bf16 or float32, each row contiguous.
            handle: of the dispatch.
            out: [T, H] bf16 or float32, filled; per selection without `topk_weights`: [T, K, H] of
                x's dtype.
            row_weights: [N, K] float32, to be added up into `out_weights` (per rank).
            topk_weights: [T, K] float32, the rows' factors (per selection).
            out_weights: [T, K] float32, filled.
            bias: up to two [T, H] bf16, added first.
            zero_copy_stride: bytes between rows that lie in this rank's slot already.
            waited_ns: [R] int64, added to: nanoseconds spent waiting for each rank.
        Returns: the pending data phase; its result is `out`.
        """
        hidden = x.shape[-1]
        T, fp32 = len(handle.in_rank), x.dtype == np.float32
        K, selection = handle.want.top_k, handle.want.per_selection
        tail = 4 * K if row_weights is not None else 0
        row = -(-(-(-hidden * x.itemsize // 4) * 4 + tail) // 64) * 64
        if row > MAX_ROW_BYTES:
            raise LimitError(f"ep: combine: rows of {row} bytes, wanted at most {MAX_ROW_BYTES}")
        spread = K if selection else self.size
        block = self._block(row * spread, "combine")
        ticks = -(-int(handle.tokens.max(initial=0)) // block)
        most = self.max_entries(handle, block)
        cursor = handle.order_start[:-1].copy()
        own = np.array([handle.order_start[self.rank]], np.int64)
        call = CombineCall(
            _at(x), x.strides[0] if len(x) else 0, hidden, fp32, _at(row_weights),
            _at(handle.order), _at(handle.order_token), _at(handle.order_start), _at(cursor),
            K, T, block, 0, handle.num_local_experts, selection, zero_copy_stride > 0,
            _at(handle.in_rank), _at(handle.topk_idx), _at(topk_weights), _at(bias[0]),
            _at(bias[1]), _at(out), out.dtype == np.float32, out.nbytes > BIG_BYTES,
            self.threads(x.nbytes), _at(out_weights), self.num_hosts, self.fabric.host,
            _at(self.host_of), None,
        )  # fmt: skip
        call.base = self._take_ticks(ticks)
        ticks = 1 if self.one_tick else ticks
        keep = [x, handle, out, row_weights, topk_weights, out_weights, bias, cursor, own]
        return self._combine_pending(call, keep, ticks, most, zero_copy_stride, out, waited_ns)

    def _combine_pending(
        self,
        call: CombineCall,
        keep: list[Any],
        ticks: int,
        most: int,
        stride: int,
        out: np.ndarray,
        waited_ns: np.ndarray | None,
    ) -> Pending:
        group, where, handle, own = self.fabric.pointer, ctypes.addressof(call), keep[1], keep[-1]
        lib, check = self.lib, self.fabric.check

        def stage(i: int = 0) -> None:
            check(lib.wf_ep_combine_stage(group, where, i, most, stride), "combine")

        def finish(i: int = 0) -> None:
            check(lib.wf_ep_combine_await(group, call.base, i, _at(waited_ns)), "combine")
            if self.num_hosts > 1:
                self.links.send_partials(call, handle, i, most, stride)
            with self.links.partials(call, i):
                check(lib.wf_ep_combine_sum(group, where, i, most, stride, _at(own)), "combine")
            lib.wf_ep_done(group, call.base + i)

        def run() -> None:
            with trace.span("ep.combine", "communication", tokens=call.tokens):
                if self.num_hosts == 1 and waited_ns is None:
                    check(lib.wf_ep_combine(group, where, ticks, most, stride, _at(own)), "combine")
                else:
                    for i in range(ticks):
                        stage(i)
                        finish(i)
            keep.clear()

        return Pending(stage, finish, run, out)

    def max_entries(self, handle: Handle, block: int) -> int:
        """Rows that a rank stages for a block of tokens of every source, at most."""
        tokens = min(block, int(handle.tokens.max(initial=0))) if self.one_tick else block
        each = min(handle.want.top_k, handle.num_local_experts) if handle.want.per_selection else 1
        return self.size * tokens * each

    # ---- the next slot, for zero-copy

    @property
    def next_tick(self) -> int:
        """The tick of the next collective."""
        return self._tick

    def await_next_slot(self) -> None:
        """Return when the next collective's slot is free."""
        status = self.lib.wf_ep_await_slot(self.fabric.pointer, self._tick)
        self.fabric.check(status, "zero-copy buffer")

    def slot_head_bytes(self, handle: Handle) -> int:
        """Where the rows begin in the slot of a (one-tick) combine."""
        entries = self.size + 1 + self.max_entries(handle, 1 << 40)
        return -(-4 * entries // 64) * 64


def _row_bytes(array: np.ndarray) -> int:
    return math.prod(array.shape[1:]) * array.itemsize


def _at(array: np.ndarray | None) -> int | None:
    return None if array is None else int(array.__array_interface__["data"][0])
