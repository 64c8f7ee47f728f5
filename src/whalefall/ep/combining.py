"""Ep room: combine over one fabric — rows go back to their tokens, which add them up.

Rows that lie in the rank's shared memory (`Engine.empty`, or a dispatch's own result) are read
where they are; others are copied into the rank's slots, a block of tokens at a time.

# T tokens, R ranks, K top-k, N rows received
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from whalefall import trace
from whalefall.ep.arena import Arena
from whalefall.ep.counts import COMBINE, Counts
from whalefall.ep.fabric import Fabric
from whalefall.ep.halves import Hooks
from whalefall.ep.handle import HEADER_FIELDS, Handle, Layout
from whalefall.ep.lent import Lent
from whalefall.ep.library import KDISAGREE, CombineCall, library, pointer
from whalefall.ep.links import Links
from whalefall.ep.rows import Bias, Pending
from whalefall.ep.worker import Event, Worker
from whalefall.errors import ConfigError, LimitError, ShapeError

__all__ = ["BIG_BYTES", "META_BYTES", "THREAD_BYTES", "Combining"]

BIG_BYTES = 8 << 20  # results above this are written around the caches
META_BYTES = 16
BLOCK_BYTES = (
    1 << 20
)  # of a rank and tick: 8 ranks' slots stay in the last cache until they are read
THREAD_BYTES = 4 << 20  # what makes another thread worth waking


class Combining:
    """One fabric: its ticks, and the way back.

    Args:
        fabric: shared memory of this host.
        links: connections to other hosts.
        arena: memory for results.
        one_tick: every collective fits one slot (low latency): its halves can be split.
        engine: number of the engine, the same on all ranks.
    Attributes:
        num_threads: that copy and add; 0: by load (bytes, and cores for each rank of the host).
        counts: the ranks' headers.
        is_direct: rows are written and read where neighbours' results are, where they fit.
        hooks: the calls that wait for their hooks (low latency).
        lent: whose the next slot's memory is (zero-copy).
        forwarder: the thread that forwards to other hosts while a combine waits for its hook.
    """

    def __init__(
        self, fabric: Fabric, links: Links, arena: Arena, one_tick: bool, engine: int = 0
    ) -> None:
        self.fabric, self.links, self.arena, self.one_tick = fabric, links, arena, one_tick
        self.rank, self.size = fabric.rank, fabric.topology.num_ranks
        self.num_hosts = len(fabric.topology.hosts)
        self.host_of = np.array([fabric.topology.host_of(r) for r in range(self.size)], np.int32)
        self._host_of_at = pointer(self.host_of)
        self.counts = Counts(fabric, links, engine)
        self.lib = library()
        self.num_threads = 0
        self.hooks, self.forwarder = Hooks(fabric.plan.slots), Worker("ep forward")
        self.lent = Lent()
        self.is_direct = fabric.shared is not None and self.num_hosts == 1
        self._cores = max(1, len(os.sched_getaffinity(0)) // len(fabric.locals))

    def threads(self, nbytes: int) -> int:
        """Threads for a collective that moves so many bytes here: as asked, else by load."""
        return self.num_threads or max(1, min(self._cores, nbytes // THREAD_BYTES))

    def check_handle(self, handle: Handle) -> None:
        """Raise ConfigError for the handle of a dispatch of another group."""
        if not isinstance(handle, Handle):
            raise ConfigError(f"ep: handle is a {type(handle).__name__}, wanted dispatch's own")
        ours, its = self.fabric.topology, handle.topology
        if its is not ours and its != ours:
            raise ConfigError(
                f"ep: handle is of a dispatch between {its.num_ranks} ranks of another group than "
                f"this one of {ours.num_ranks}; give the one that this group's dispatch returned"
            )

    def _take_ticks(self, ticks: int) -> int:
        base = self.counts.tick
        self.counts.tick = base + ticks
        return base

    def _block(self, row_bytes: int, what: str) -> int:
        if self.one_tick:
            return 1 << 40
        each, most = row_bytes + META_BYTES, self.fabric.plan.chunk_bytes - 256
        if each > most:
            raise LimitError(
                f"ep: {what}: {row_bytes} bytes for one token do not fit a chunk of "
                f"{self.fabric.plan.chunk_bytes} bytes; make the buffer (num_nvl_bytes) larger"
            )
        return max(1, min(most, BLOCK_BYTES) // each)

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
        log_format: bool = False,
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
            log_format: rows travel as LogFMT-10 (bf16, per selection with weights, H in 128).
        Returns: the pending data phase; its result is `out`.
        """
        call = CombineCall(
            pointer(x), x.strides[0] if len(x) else 0, x.shape[-1], x.dtype == np.float32,
            pointer(row_weights), bias0=pointer(bias[0]), bias1=pointer(bias[1]),
            topk_weights=pointer(topk_weights), out=pointer(out), out_fp32=out.dtype == np.float32,
            out_weights=pointer(out_weights), zero_copy=zero_copy_stride > 0, log_format=log_format,
        )  # fmt: skip
        keep = (x, out, row_weights, topk_weights, out_weights, bias)
        if self.one_tick:
            self.hooks.make_room(self.counts.tick, "low_latency_combine")
        if self.num_hosts == 1 and not self.one_tick:
            return Pending(_nothing, _nothing, self.sum_up(call, handle, len(x), *keep), out)
        return self._in_halves(call, handle, [*keep], zero_copy_stride, out, waited_ns)

    def sum_up(
        self, call: CombineCall, handle: Handle, num_rows: int, *keep: Any
    ) -> Callable[[], None]:
        """A whole combine within one host.

        Args:
            call: with x, its stride, hidden, types, weights, biases and results set.
            handle: of the dispatch.
            num_rows: of x.
            keep: what must live until it has run.
        """
        most, ticks = self._plan(call, handle, num_rows)
        call.shared_at, call.serial = self._shared_at(call, num_rows), handle.serial
        return partial(self._sum_up, call, handle, ticks, most, keep)

    def _sum_up(
        self, call: CombineCall, handle: Handle, ticks: int, most: int, _: tuple[Any, ...]
    ) -> None:
        call.base = first = self._take_ticks(ticks)
        with trace.span("ep.combine", "communication", tokens=call.tokens):
            status = self.lib.wf_ep_combine(
                self.fabric.pointer, ctypes.addressof(call), handle.heads_at,
                handle.want.num_experts, ticks, most,
            )  # fmt: skip
            if status == KDISAGREE:
                self.counts.tick = max(self.counts.tick, call.base)
                self._check_alike(first)
            self.fabric.check(status, "combine")

    def _check_alike(self, tick: int) -> None:
        """Raise ShapeError for the difference between what the host's ranks staged at a tick."""
        said = np.zeros((self.size, len(HEADER_FIELDS)), np.int32)
        self.lib.wf_ep_combine_said(self.fabric.pointer, tick, said.ctypes.data)
        self.counts.check_agreement(said, self.fabric.locals)

    def _plan(self, call: CombineCall, handle: Handle, num_rows: int) -> tuple[int, int]:
        """Fill in what the handle knows; entries that a tick stages at most, and ticks.

        From here on the collective counts as called.
        """
        K, selection, item = handle.want.top_k, handle.want.per_selection, 4 if call.fp32 else 2
        tail = 4 * K if call.row_weights else 0
        row = -(-(-(-call.hidden * item // 4) * 4 + tail) // 64) * 64
        block = self._block(row * (K if selection else self.size), "combine")
        call.order, call.order_token, call.in_rank, call.topk_idx = handle.addresses
        call.top_k, call.tokens, call.block = K, handle.num_tokens, block
        call.experts_per_rank, call.per_selection = handle.num_local_experts, selection
        out = handle.num_tokens * call.hidden * (4 if call.out_fp32 else 2)
        call.big = out * (K if selection and not call.topk_weights else 1) > BIG_BYTES
        call.threads = self.threads(num_rows * call.hidden * item)
        call.num_hosts, call.host, call.host_of = self.num_hosts, self.fabric.host, self._host_of_at
        call.most = handle.most_tokens
        ticks = max(1, -(-handle.most_tokens // block))
        call.call = self.counts.next_call()
        return self.max_entries(handle, block), ticks

    def _in_halves(
        self, call: CombineCall, handle: Handle, keep: list[Any], stride: int, out: np.ndarray,
        waited_ns: np.ndarray | None,
    ) -> Pending:  # fmt: skip
        most, ticks = self._plan(call, handle, len(keep[0]))
        call.shared_at = -1
        if self.one_tick:
            call.base = self._take_ticks(1)
        cursor, own = (
            handle.order_start[:-1].copy(),
            handle.order_start[self.rank : self.rank + 1].copy(),
        )
        call.order_start, call.cursor = pointer(handle.order_start), pointer(cursor)
        keep += [handle, cursor, waited_ns]
        fabric, where, lib = self.fabric, ctypes.addressof(call), self.lib
        posted: list[tuple[int, int]] = []
        forwarded: list[Event] = []

        def stage(i: int = 0) -> None:
            call.serial = handle.serial
            if self.one_tick:
                posted.append(self._post_form(call))
            fabric.check(lib.wf_ep_combine_stage(fabric.pointer, where, i, most, stride), "combine")

        def forward(i: int = 0) -> None:
            status = lib.wf_ep_combine_await(fabric.pointer, call.base, i, pointer(waited_ns))
            # What neighbours staged tells whether all combine alike, headers what others call.
            if posted and (status == KDISAGREE or (status == 0 and self.num_hosts > 1)):
                self._collect_forms(posted[0], call.base)
            if status == KDISAGREE:
                try:
                    self._check_alike(call.base + i)
                finally:
                    self._end(call.base + i)
            fabric.check(status, "combine")
            if self.num_hosts > 1:
                self.links.send_partials(call, handle, i, most, stride)

        def leave() -> None:
            call.keep_own = 1
            stage()
            # The others may be at their hooks of this combine long before this rank is.
            if self.num_hosts > 1:
                forwarded.append(self.forwarder.submit(forward))

        def finish(i: int = 0) -> None:
            if forwarded:
                forwarded.pop().wait()
            else:
                forward(i)
            with self.links.partials(call, i):
                status = lib.wf_ep_combine_sum(
                    fabric.pointer, where, i, most, stride, pointer(own)
                )  # fmt: skip
                fabric.check(status, "combine")
            self._end(call.base + i)
            if i + 1 == ticks:  # whoever has only this half keeps all arrays alive with it
                keep.clear()

        if self.one_tick:
            return Pending(stage, finish, _nothing, out, leave, call.base)
        call.serial = handle.serial
        header = self._post_form(call)
        done = self.counts.collected_later(header[0])

        def run() -> None:
            try:
                with trace.span("ep.combine", "communication", tokens=call.tokens):
                    self._collect_forms(header)
                    call.base = self._take_ticks(ticks)
                    for i in range(ticks):
                        stage(i)
                        finish(i)
            finally:
                done.set()
            keep.clear()

        return Pending(_nothing, _nothing, run, out)

    def _end(self, tick: int) -> None:
        """This rank has done a tick."""
        if self.one_tick:
            self.lib.wf_ep_done(self.fabric.pointer, tick)
        else:
            self.lib.wf_ep_done_before(self.fabric.pointer, tick + 1)

    def _post_form(self, call: CombineCall) -> tuple[int, int]:
        """Tell all ranks what will come back."""
        if self.num_hosts == 1:
            count = self.counts.next_number()
            self.lib.wf_ep_post_form(self.fabric.pointer, ctypes.addressof(call), count)
            return count, len(HEADER_FIELDS)
        form = (1 if call.fp32 else 0) | (2 if call.row_weights else 0)
        form |= 4 if call.log_format else 0  # `form_of` of combine.h
        fields = {
            "kind": COMBINE, "call": call.call, "x_bytes": call.hidden, "flags": form,
            "extra": call.serial,
        }  # fmt: skip
        return self.counts.post(fields, Layout.nothing(0, 0))

    def _collect_forms(self, posted: tuple[int, int], tick: int | None = None) -> None:
        """Raise ShapeError where the ranks give back rows of different forms; then `tick` is over.

        Raises: RankFailure.
        """
        try:
            self.counts.collect(posted)
        except ShapeError:
            if tick is not None:
                self._end(tick)
            raise

    def _shared_at(self, call: CombineCall, num_rows: int) -> int:
        """Where x lies in this rank's shared memory; −1 where neighbours cannot read it."""
        shared, row = self.fabric.shared, call.hidden * (4 if call.fp32 else 2)
        if shared is None or call.x_stride < 0:
            return -1
        if num_rows * row == 0:  # nothing keeps the others from reading where theirs lie
            return 0
        return shared.find(call.x, (num_rows - 1) * call.x_stride + row)

    def max_entries(self, handle: Handle, block: int) -> int:
        """Rows that a rank stages for a block of tokens of every source, at most."""
        tokens = min(block, handle.most_tokens) if self.one_tick else block
        each = min(handle.want.top_k, handle.num_local_experts) if handle.want.per_selection else 1
        return self.size * tokens * each

    # ---- the next slot, for zero-copy

    @property
    def next_tick(self) -> int:
        """The tick of the next collective."""
        return self.counts.tick

    def await_next_slot(self) -> None:
        """Return when the next collective's slot is free.

        Raises: ConfigError if a hook of this rank's keeps it; RankFailure.
        """
        self.hooks.make_room(self.counts.tick, "low latency")
        status = self.lib.wf_ep_await_slot(self.fabric.pointer, self.counts.tick)
        self.fabric.check(status, "zero-copy buffer")

    def slot_head_bytes(self, handle: Handle) -> int:
        """Where the rows begin in the slot of a (one-tick) combine."""
        entries = self.size + 1 + self.max_entries(handle, 1 << 40)
        return -(-(40 + 4 * entries) // 64) * 64


def _nothing() -> None:
    pass
