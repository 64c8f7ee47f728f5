"""Ep room: dispatch and combine over one fabric, on arrays; the order of ticks is kept here.

Every rank calls the same collectives in the same order. A dispatch first announces its counts (all
ranks learn all counts), which fixes how many ticks it takes; then the data move, in this thread or
in the communication thread.

# T tokens, R ranks, E experts, El experts of this rank, K top-k, N rows received
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from whalefall.ep.arena import Arena
from whalefall.ep.fabric import Fabric
from whalefall.ep.handle import Handle, Layout, Received
from whalefall.ep.library import CombineCall, DispatchCall, library
from whalefall.ep.links import Links
from whalefall.errors import LimitError, ShapeError

__all__ = ["HEADER_FIELDS", "Bias", "Exchange", "Pending"]

HEADER_FIELDS = (
    "kind",
    "tokens",
    "x_bytes",
    "scale_bytes",
    "top_k",
    "flags",
    "num_experts",
    "extra",
)
AGREED = ("kind", "x_bytes", "scale_bytes", "top_k", "flags", "num_experts", "extra")
BIG_BYTES = 8 << 20  # results above this are written around the caches
META_BYTES = 16
MAX_ROW_BYTES = (1 << 17) - 4 * 256
Bias = tuple[np.ndarray | None, np.ndarray | None]


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
    """

    def __init__(self, fabric: Fabric, links: Links, arena: Arena, one_tick: bool) -> None:
        self.fabric, self.links, self.arena, self.one_tick = fabric, links, arena, one_tick
        self.rank, self.size = fabric.rank, fabric.topology.num_ranks
        self.num_hosts = len(fabric.topology.hosts)
        self.host_of = np.array([fabric.topology.host_of(r) for r in range(self.size)], np.int32)
        self.lib = library()
        self._tick = 0
        self._count = 0

    # ---- counts

    def announce(self, fields: dict[str, int], layout: Layout) -> np.ndarray:
        """Tell all ranks this rank's counts and learn theirs: [R, fields + R + H + E] int32.

        Raises: ShapeError if the ranks disagree on a field; RankFailure.
        """
        head = np.array([fields[name] for name in HEADER_FIELDS], np.int32)
        mine = np.concatenate([head, layout.per_rank, layout.per_host, layout.per_expert])
        if mine.nbytes > self.fabric.plan.mailbox_bytes:
            raise LimitError(
                f"ep: {fields['num_experts']} experts need a header of {mine.nbytes} bytes, the "
                f"mailbox has {self.fabric.plan.mailbox_bytes}; give the engine max_experts"
            )
        count, self._count = self._count, self._count + 1
        room = np.zeros(self.fabric.plan.mailbox_bytes, np.uint8)
        room[: mine.nbytes] = mine.view(np.uint8)
        self.lib.wf_ep_post(self.fabric.pointer, count, room.ctypes.data, mine.nbytes)
        self.links.send_header(count, mine)
        heads = np.empty((self.size, len(mine)), np.int32)
        status = self.lib.wf_ep_collect(self.fabric.pointer, count, heads.ctypes.data, mine.nbytes)
        self.fabric.check(status, "dispatch, counts")
        self._check_agreement(heads)
        return heads

    def _check_agreement(self, heads: np.ndarray) -> None:
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
        if self.one_tick:
            ticks = 1
        base, self._tick = self._tick, self._tick + ticks
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
        self,
        x: np.ndarray,
        scale: np.ndarray | None,
        topk_idx: np.ndarray | None,
        topk_weights: np.ndarray | None,
        layout: Layout,
        num_experts: int,
        handle: Handle | None = None,
        per_selection: bool = False,
        rows_per_expert: int = 0,
        min_rows: int = 0,
        transposed_scale: bool = False,
    ) -> Pending:
        """Announce a dispatch and prepare its data phase.

        Args:
            x: [T, …], contiguous rows.
            scale: [T, …] contiguous, or None.
            topk_idx: [T, K] int64, contiguous, or None.
            topk_weights: [T, K] float32, contiguous, or None.
            layout: counts of this batch.
            num_experts: E.
            handle: of an earlier dispatch, whose counts hold again.
            per_selection: one row for each selection, grouped by local expert.
            rows_per_expert: room of each expert's group (low latency); 0: groups without gaps.
            min_rows: allocate at least so many rows.
            transposed_scale: scales come as [El, …, rows_per_expert].
        Returns: the pending data phase; its result is a `Received`.
        """
        T = len(x)
        K = topk_idx.shape[1] if topk_idx is not None else 0
        x_bytes = _row_bytes(x)
        scale_bytes = _row_bytes(scale) if scale is not None else 0
        if handle is None:
            flags = per_selection | (topk_weights is not None) << 1 | (topk_idx is not None) << 2
            heads = self.announce(
                {"kind": 1, "tokens": T, "x_bytes": x_bytes, "scale_bytes": scale_bytes,
                 "top_k": K, "flags": flags, "num_experts": num_experts, "extra": rows_per_expert},
                layout,
            )  # fmt: skip
            handle = self._new_handle(heads, layout, topk_idx, K, num_experts, per_selection)
            handle.rows_per_expert = rows_per_expert
        per_expert = None
        if handle.expert_counts is not None and num_experts:
            El = num_experts // self.size
            mine = handle.expert_counts[:, self.rank * El : (self.rank + 1) * El]  # [R, El]
            per_expert = mine.sum(0)
        rows = max(handle.num_rows, min_rows)
        if rows_per_expert:
            rows = num_experts // self.size * rows_per_expert
        received = Received(
            self.arena.empty((rows, *x.shape[1:]), x.dtype),
            self._empty_scale(scale, rows, rows_per_expert if transposed_scale else 0),
            self.arena.empty((rows, K), np.int64) if K and not per_selection else None,
            None, per_expert, handle,
        )  # fmt: skip
        if topk_weights is not None:
            shape = (rows,) if per_selection else (rows, K)
            received.topk_weights = self.arena.empty(shape, np.float32)
        row = x_bytes + scale_bytes + 8 * K
        block = self._block(-(-row // 64) * 64, "dispatch")
        ticks = -(-int(handle.tokens.max(initial=0)) // block)
        call, keep = self._dispatch_call(
            x, scale, topk_idx, topk_weights, layout, received, per_expert, block, num_experts,
            rows_per_expert if transposed_scale else 0,
        )  # fmt: skip
        call.base, call.ticks = self._take_ticks(ticks), 1 if self.one_tick else ticks
        call.block = min(block, 1 << 40)
        return self._dispatch_pending(call, keep, received)

    def _dispatch_pending(self, call: DispatchCall, keep: list[Any], received: Received) -> Pending:
        def phase(stage: bool, pull: bool) -> None:
            call.stage, call.pull = stage, pull
            sending = self.links.send_blocks(call, keep) if stage else None
            status = self.lib.wf_ep_dispatch(self.fabric.pointer, ctypes.addressof(call))
            self.fabric.check(status, "dispatch")
            if sending is not None:
                sending()
            if pull:
                keep.clear()

        return Pending(
            lambda: phase(True, False), lambda: phase(False, True), lambda: phase(True, True),
            received,
        )  # fmt: skip

    def _empty_scale(self, scale: np.ndarray | None, rows: int, transposed: int) -> Any:
        if scale is None:
            return None
        if transposed:
            return self.arena.empty((rows // transposed, scale.shape[1], transposed), scale.dtype)
        return self.arena.empty((rows, *scale.shape[1:]), scale.dtype)

    def _new_handle(
        self, heads: np.ndarray, layout: Layout, topk_idx: np.ndarray | None, top_k: int,
        num_experts: int, per_selection: bool,
    ) -> Handle:  # fmt: skip
        at = len(HEADER_FIELDS)
        rows = heads[:, at : at + self.size].astype(np.int64)  # [source, rank]
        at += self.size
        per_host = heads[:, at : at + self.num_hosts].astype(np.int64)
        at += self.num_hosts
        experts = heads[:, at:].astype(np.int64) if num_experts and top_k else None
        if per_selection:
            assert experts is not None
            rows = experts.reshape(self.size, self.size, -1).sum(2)
        start = np.zeros(self.size + 1, np.int64)
        np.cumsum(rows[:, self.rank], out=start[1:])
        N = int(start[-1])
        handle = Handle(
            num_experts, top_k, per_selection, layout.in_rank,
            topk_idx if per_selection else None, heads[:, 1].astype(np.int64), rows,
            np.empty(0, np.int32), np.empty(N, np.int64) if per_selection else None,
            np.empty(N, np.int32), start, experts,
        )  # fmt: skip
        for source in self.fabric.streams_of[self.rank][1:]:
            n = int(per_host[source, self.fabric.host])
            handle.forward[source] = (
                np.empty(n, np.int32), np.empty(n, np.uint64), np.empty((n, top_k), np.int32),
            )  # fmt: skip
        return handle

    def _dispatch_call(
        self, x: np.ndarray, scale: np.ndarray | None, topk_idx: np.ndarray | None,
        topk_weights: np.ndarray | None, layout: Layout, received: Received,
        per_expert: np.ndarray | None, block: int, num_experts: int, transposed: int,
    ) -> tuple[DispatchCall, list[Any]]:  # fmt: skip
        handle, per_selection = received.handle, received.handle.per_selection
        rows = len(received.x)
        if per_selection:
            token = np.empty(rows, np.int32)
            cursor = self._expert_cursor(handle)
            order_cursor = handle.order_start[:-1].copy()
        else:
            token = np.empty(rows, np.int32)
            cursor = handle.order_start[:-1].copy()
            order_cursor = None
        if len(handle.token) == 0:
            handle.token = token
            if not per_selection:
                handle.order_token = token[: handle.num_rows]
        forward_cursor = np.zeros(self.size, np.int64)
        tables = [np.zeros(self.size, np.uint64) for _ in range(3)]
        for source, lists in handle.forward.items():
            for table, array in zip(tables, lists, strict=True):
                table[source] = array.ctypes.data
        in_rank = layout.in_rank
        keep: list[Any] = [
            x,
            scale,
            topk_idx,
            topk_weights,
            in_rank,
            received,
            token,
            cursor,
            order_cursor,
        ]
        keep += [forward_cursor, tables]
        call = DispatchCall(
            _at(x), _at(scale), _at(topk_idx), _at(topk_weights), _at(in_rank),
            x.strides[0] if len(x) else 0, _row_bytes(x), 0 if scale is None else _row_bytes(scale),
            0 if topk_idx is None else topk_idx.shape[1], len(x), block, 0, 0,
            max(1, num_experts // self.size), per_selection, 1, 1,
            received.x.nbytes > BIG_BYTES, transposed, _at(received.x), _at(received.scale),
            _at(received.topk_idx), _at(received.topk_weights), _at(token), _at(cursor),
            _at(handle.order), _at(handle.order_token), _at(order_cursor), rows,
            *(_at(t) if handle.forward else None for t in tables), _at(forward_cursor),
        )  # fmt: skip
        return call, keep

    def _expert_cursor(self, handle: Handle) -> np.ndarray:
        """[El, R]: the first row of each (local expert, source)."""
        assert handle.expert_counts is not None
        El = handle.num_experts // self.size
        counts = handle.expert_counts[:, self.rank * El : (self.rank + 1) * El].T  # [El, R]
        if handle.rows_per_expert:
            inside = np.cumsum(counts, 1) - counts
            return np.ascontiguousarray(
                inside + np.arange(El)[:, None] * handle.rows_per_expert, np.int64
            )
        flat = counts.reshape(-1)
        return np.ascontiguousarray((np.cumsum(flat) - flat).reshape(El, self.size), np.int64)

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
        Returns: the pending data phase; its result is `out`.
        """
        hidden = x.shape[-1]
        T, fp32 = len(handle.in_rank), x.dtype == np.float32
        K = handle.top_k
        row = -(-(hidden * x.itemsize + (4 * K if row_weights is not None else 0)) // 64) * 64
        if row > MAX_ROW_BYTES:
            raise LimitError(f"ep: combine: rows of {row} bytes, wanted at most {MAX_ROW_BYTES}")
        spread = K if handle.per_selection else self.size
        block = self._block(row * spread, "combine")
        longest = int(handle.tokens.max(initial=0))
        ticks = -(-longest // block)
        tokens_each = min(block, longest) if self.one_tick else block
        El = max(1, handle.num_experts // self.size)
        most = self.size * tokens_each * (min(K, El) if handle.per_selection else 1)
        cursor = handle.order_start[:-1].copy()
        own = np.array([handle.order_start[self.rank]], np.int64)
        call = CombineCall(
            _at(x), x.strides[0] if len(x) else 0, hidden, fp32, _at(row_weights),
            _at(handle.order), _at(handle.order_token), _at(handle.order_start), _at(cursor),
            K, T, min(block, 1 << 40), 0, El, handle.per_selection, zero_copy_stride > 0,
            _at(handle.in_rank), _at(handle.topk_idx), _at(topk_weights), _at(bias[0]),
            _at(bias[1]), _at(out), out.dtype == np.float32, _at(out_weights), self.num_hosts,
            self.fabric.host, _at(self.host_of), None,
        )  # fmt: skip
        call.base = self._take_ticks(ticks)
        ticks = 1 if self.one_tick else ticks
        keep = [x, handle, out, row_weights, topk_weights, out_weights, bias, cursor, own]
        return self._combine_pending(call, keep, ticks, most, zero_copy_stride, out)

    def _combine_pending(
        self,
        call: CombineCall,
        keep: list[Any],
        ticks: int,
        most: int,
        stride: int,
        out: np.ndarray,
    ) -> Pending:
        group, where, handle, own = self.fabric.pointer, ctypes.addressof(call), keep[1], keep[-1]
        lib, check = self.lib, self.fabric.check

        def stage(i: int = 0) -> None:
            check(lib.wf_ep_combine_stage(group, where, i, most, stride), "combine")

        def finish(i: int = 0) -> None:
            check(lib.wf_ep_combine_await(group, call.base, i), "combine")
            if self.num_hosts > 1:
                self.links.send_partials(call, handle, i, most, stride)
            with self.links.partials(call, i):
                check(lib.wf_ep_combine_sum(group, where, i, most, stride, _at(own)), "combine")
            lib.wf_ep_done(group, call.base + i)

        def run() -> None:
            if self.num_hosts == 1:
                check(lib.wf_ep_combine(group, where, ticks, most, stride, _at(own)), "combine")
            else:
                for i in range(ticks):
                    stage(i)
                    finish(i)
            keep.clear()

        return Pending(stage, finish, run, out)

    # ---- the next slot, for zero-copy

    def next_slot(self, head_bytes: int) -> tuple[int, memoryview]:
        """The tick of the next collective and this rank's slot for it, once it is free."""
        self.fabric.check(
            self.lib.wf_ep_await_slot(self.fabric.pointer, self._tick), "zero-copy buffer"
        )
        return self._tick, self.fabric.slot_view(self._tick)[head_bytes:]


def _row_bytes(array: np.ndarray) -> int:
    return int(np.prod(array.shape[1:], dtype=np.int64)) * array.itemsize


def _at(array: np.ndarray | None) -> int | None:
    return None if array is None else int(array.__array_interface__["data"][0])
