"""Ep room: combine over one fabric — rows go back to their tokens, which add them up.

Rows that lie in the rank's shared memory (`Engine.empty`, or a dispatch's own result) are read
where they are; others are copied into the rank's slots, a block of tokens at a time.

# T tokens, R ranks, K top-k, N rows received
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import numpy as np

from whalefall import trace
from whalefall.ep.arena import Arena
from whalefall.ep.counts import Counts
from whalefall.ep.fabric import Fabric
from whalefall.ep.handle import Handle
from whalefall.ep.library import CombineCall, library
from whalefall.ep.links import Links
from whalefall.ep.rows import Bias, Pending, pointer
from whalefall.errors import LimitError

__all__ = ["BIG_BYTES", "META_BYTES", "Combining"]

BIG_BYTES = 8 << 20  # results above this are written around the caches
META_BYTES = 16
THREAD_BYTES = 4 << 20  # what makes another thread worth waking


class Combining:
    """One fabric: its ticks, and the way back.

    Args:
        fabric: shared memory of this host.
        links: connections to other hosts.
        arena: memory for results.
        one_tick: every collective fits one slot (low latency): its halves can be split.
    Attributes:
        num_threads: that copy and add; 0: by load (bytes, and cores for each rank of the host).
        counts: the ranks' headers.
    """

    def __init__(self, fabric: Fabric, links: Links, arena: Arena, one_tick: bool) -> None:
        self.fabric, self.links, self.arena, self.one_tick = fabric, links, arena, one_tick
        self.rank, self.size = fabric.rank, fabric.topology.num_ranks
        self.num_hosts = len(fabric.topology.hosts)
        self.host_of = np.array([fabric.topology.host_of(r) for r in range(self.size)], np.int32)
        self.counts = Counts(fabric, links)
        self.lib = library()
        self.num_threads = 0
        self._cores = max(1, len(os.sched_getaffinity(0)) // len(fabric.locals))
        self._tick = 0

    def threads(self, nbytes: int) -> int:
        """Threads for a collective that moves so many bytes here: as asked, else by load."""
        return self.num_threads or max(1, min(self._cores, nbytes // THREAD_BYTES))

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
        spread = K if selection else self.size
        block = self._block(row * spread, "combine")
        ticks = -(-int(handle.tokens.max(initial=0)) // block)
        most = self.max_entries(handle, block)
        cursor = handle.order_start[:-1].copy()
        own = np.array([handle.order_start[self.rank]], np.int64)
        call = CombineCall(
            pointer(x), x.strides[0] if len(x) else 0, hidden, fp32, pointer(row_weights),
            pointer(handle.order), pointer(handle.order_token), pointer(handle.order_start),
            pointer(cursor),
            K, T, block, 0, handle.num_local_experts, selection, zero_copy_stride > 0,
            pointer(handle.in_rank), pointer(handle.topk_idx), pointer(topk_weights),
            pointer(bias[0]), pointer(bias[1]), pointer(out), out.dtype == np.float32,
            out.nbytes > BIG_BYTES, self.threads(x.nbytes), pointer(out_weights),
            self.num_hosts, self.fabric.host, pointer(self.host_of), None, -1,
        )  # fmt: skip
        if row_weights is None and not zero_copy_stride and waited_ns is None:
            call.shared_at = self._shared_at(x)
        call.base = self._take_ticks(ticks)
        ticks = 1 if self.one_tick else ticks
        keep = [x, handle, out, row_weights, topk_weights, out_weights, bias, cursor, own]
        return self._combine_pending(call, keep, ticks, most, zero_copy_stride, out, waited_ns)

    def _shared_at(self, x: np.ndarray) -> int:
        """Where x lies in this rank's shared memory; −1 where neighbours cannot read it."""
        shared = self.fabric.shared
        if shared is None or self.num_hosts > 1 or not x.size or x.strides[0] < 0:
            return -1
        begin = pointer(x)
        assert begin is not None
        return shared.find(begin, (len(x) - 1) * x.strides[0] + x[0].nbytes)

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
            check(lib.wf_ep_combine_await(group, call.base, i, pointer(waited_ns)), "combine")
            if self.num_hosts > 1:
                self.links.send_partials(call, handle, i, most, stride)
            with self.links.partials(call, i):
                check(lib.wf_ep_combine_sum(group, where, i, most, stride, pointer(own)), "combine")
            lib.wf_ep_done(group, call.base + i)
            if i + 1 == ticks:  # whoever has only this half keeps all arrays alive with it
                keep.clear()

        def run() -> None:
            with trace.span("ep.combine", "communication", tokens=call.tokens):
                if self.num_hosts == 1 and waited_ns is None:
                    check(
                        lib.wf_ep_combine(group, where, ticks, most, stride, pointer(own)),
                        "combine",
                    )
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
        return -(-(16 + 4 * entries) // 64) * 64
