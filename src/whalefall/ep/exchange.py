"""Ep room: dispatch over one fabric, on arrays; with `combine` of its base all collectives.

Every rank calls the same collectives in the same order. A dispatch first announces its counts (all
ranks learn all counts); then the data move, in this thread or in the communication thread. Within
one host every rank also offers a piece of its shared memory, and where the pieces are large enough
rows are written straight there; else they pass through slots, a block of tokens a tick.

# T tokens, R ranks, E experts, El experts of this rank, K top-k, N rows received
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from whalefall import trace
from whalefall.ep.arena import Part
from whalefall.ep.combining import BIG_BYTES
from whalefall.ep.counts import REPEAT
from whalefall.ep.direct import Announced, Direct
from whalefall.ep.handle import HEADER_FIELDS, Handle, Layout, Received, Want
from whalefall.ep.library import KDISAGREE, Announcement, DispatchCall, pointer
from whalefall.ep.rows import Pending, Rows
from whalefall.ep.shared import STEP
from whalefall.errors import LimitError, ShapeError

__all__ = ["Exchange"]


class Exchange(Direct):
    """The collectives of this rank on one fabric; arguments as of `Combining`."""

    def dispatch(
        self, rows: Rows, layout: Layout, want: Want, handle: Handle | None = None,
        into: Received | None = None, max_rows: int = 0,
    ) -> Pending:  # fmt: skip
        """Announce a dispatch and prepare its data phase.

        Args:
            rows: what to send.
            layout: counts of this batch.
            want: the form.
            handle: of an earlier dispatch, whose counts hold again; none are announced then.
            into: arrays to fill, with room for `max_rows` rows (the same number on all ranks).
            max_rows: see `into`.
        Returns: the pending data phase; its result is a `Received`.
        Raises: LimitError on every rank if one of them would get more than `max_rows`.
        """
        if handle is None:
            handle = Handle(want, self.rank, self.fabric.topology, layout.in_rank,
                            rows.topk_idx if want.per_selection else None)  # fmt: skip
            if self.is_direct and not into:
                announced = self.announce(
                    _sent(rows, layout, want, self.size), handle, pointer(layout.per_rank),
                    pointer(layout.per_expert),
                )  # fmt: skip
                if announced.piece is not None:
                    return self._direct(rows, layout, announced, announced.piece)
                handle.make_lists()
            else:
                posted = self.counts.post(self._said(rows, want, max_rows), layout)
                handle.serial = self.counts.serial(posted[0])
                handle.fill(self.counts.collect(posted))
        elif self.is_direct:
            return self._again(rows, layout, want, handle)
        else:
            return self._again_through_slots(rows, layout, want, handle)
        return self.through_slots(rows, layout, want, handle, into, max_rows)

    def _said(self, rows: Rows, want: Want, max_rows: int) -> dict[str, int]:
        return {**rows.fields(want, max_rows), "call": self.counts.next_call()}

    def _direct(self, rows: Rows, layout: Layout, announced: Announced, piece: Part) -> Pending:
        handle, call = announced.handle, announced.call
        received = self.allocate(rows, handle.want, handle.num_rows, piece)
        received.handle = handle
        if handle.want.num_experts:
            received.per_expert = np.array(announced.per_expert, np.int64)
        call.recv_x, call.recv_scale = pointer(received.x), pointer(received.scale)
        call.recv_idx = pointer(received.topk_idx)
        call.recv_weights = pointer(received.topk_weights)
        run = self.write(announced, rows, layout, received)
        return Pending(run, _nothing, run, received)

    def _again(self, rows: Rows, layout: Layout, want: Want, handle: Handle) -> Pending:
        """A dispatch whose counts are known, so that exactly what is needed can be offered.

        The others' offers are learnt in the data phase: the call itself waits for nobody.
        """
        call = _sent(rows, layout, want, self.size)
        shared = self.fabric.shared
        assert shared is not None
        coming = np.array([handle.num_rows], np.int32)
        piece = shared.take(self.lib.wf_ep_room(ctypes.addressof(call), pointer(coming), 1))
        received = self.allocate(rows, want, handle.num_rows, piece)
        call, ticks, keep = self._slots_call(rows, layout, want, handle, received)
        offers = np.empty((self.size, len(HEADER_FIELDS)), np.int32)
        room, room_at = (piece.nbytes, piece.offset) if piece is not None else (0, 0)
        said = Announcement(
            None, None, handle.want.num_experts, room // STEP, room_at // STEP,
            self.counts.next_number(), self.counts.next_call(), handle.serial, handle.heads_at,
            pointer(offers),
        )  # fmt: skip
        done = self.counts.collected_later(said.count)
        self.lib.wf_ep_offer(self.fabric.pointer, ctypes.addressof(call), ctypes.addressof(said))

        def run() -> None:
            try:
                with trace.span("ep.dispatch", "communication", tokens=call.tokens):
                    call.base = self.counts.tick
                    status = self.lib.wf_ep_again(
                        self.fabric.pointer, ctypes.addressof(call), ctypes.addressof(said)
                    )
                    if status == KDISAGREE:
                        self.counts.check_agreement(offers)
                    self.fabric.check(status, "dispatch")
                self._take_ticks(ticks if status else 1)
                if status:
                    self._phase(call, keep, True, True)
            finally:
                done.set()
            keep.clear()

        return Pending(run, _nothing, run, received)

    def _again_through_slots(
        self, rows: Rows, layout: Layout, want: Want, handle: Handle
    ) -> Pending:
        """A dispatch whose counts are known; the data phase checks that all mean it."""
        posted: list[tuple[int, int]] = []
        pending = self.through_slots(
            rows, layout, want, handle, first=lambda: self.counts.collect(posted[0])
        )
        fields = {**self._said(rows, want, 0), "kind": REPEAT, "extra": handle.serial}
        posted.append(self.counts.post(fields, Layout.nothing(0, 0)))
        done = self.counts.collected_later(posted[0][0])

        def run() -> None:
            try:
                pending.run()
            finally:
                done.set()

        return Pending(run, _nothing, run, pending.result)

    def through_slots(
        self, rows: Rows, layout: Layout, want: Want, handle: Handle,
        into: Received | None = None, max_rows: int = 0, first: Callable[[], object] | None = None,
    ) -> Pending:  # fmt: skip
        """The data phase of a dispatch whose counts are known; arguments as of `dispatch`.

        Args:
            first: called before anything moves.
        """
        most = int(handle.rows.sum(0).max(initial=0))
        if max_rows and most > max_rows:
            raise LimitError(
                f"ep: a rank would receive {most} rows, buffers have room for {max_rows} "
                "(num_worst_tokens)"
            )
        received = into or self.allocate(rows, want, handle.num_rows)
        call, ticks, keep = self._slots_call(rows, layout, want, handle, received)

        def run() -> None:
            with trace.span("ep.dispatch", "communication", tokens=call.tokens):
                if first is not None:
                    first()
                call.base = self._take_ticks(ticks)
                self._move(call, keep, True, True)

        return Pending(run, _nothing, run, received)

    def _slots_call(
        self, rows: Rows, layout: Layout, want: Want, handle: Handle, received: Received
    ) -> tuple[DispatchCall, int, list[Any]]:
        received.handle = handle
        if handle.expert_counts is not None:
            received.per_expert = handle.expert_counts.sum(0)
        block = self._block(rows.packed_bytes, "dispatch")
        ticks = max(1, -(-handle.most_tokens // block))
        call, keep = self._call(rows, layout, want, received, block, ticks)
        self._fill_call(call, keep, handle, len(received.x))
        return call, ticks, keep

    # ---- the low-latency form

    def low_latency_dispatch(
        self, rows: Rows, layout: Layout, want: Want, waited_ns: np.ndarray | None = None
    ) -> Pending:
        """Prepare a dispatch that sends without counts: `send` posts and stages, `receive` pulls.

        Its result's `handle` and `per_expert` are known after `receive`.
        """
        self.hooks.make_room(self.counts.tick, "low_latency_dispatch")
        handle = Handle(want, self.rank, self.fabric.topology, layout.in_rank, rows.topk_idx)
        room = want.num_experts // self.size * want.rows_per_expert
        received = self.allocate(rows, want, room)
        received.handle = handle
        call, keep = self._call(rows, layout, want, received, 1 << 40, 1)
        call.base, fields = self._take_ticks(1), self._said(rows, want, 0)
        call.waited_ns = pointer(waited_ns)
        posted: list[tuple[int, int]] = []

        def send() -> None:
            posted.append(self.counts.post(fields, layout))
            handle.serial = self.counts.serial(posted[0][0])
            self._phase(call, keep, True, False)

        def receive() -> None:
            try:
                heads = self.counts.collect(posted[0])
            except ShapeError:
                self._end(call.base)
                raise
            handle.fill(heads)
            assert handle.expert_counts is not None
            received.per_expert = handle.expert_counts.sum(0)
            self._fill_call(call, keep, handle, room)
            self._phase(call, keep, False, True)

        def leave() -> None:
            call.keep_own = 1
            send()

        def run() -> None:
            send()
            receive()

        return Pending(send, receive, run, received, leave, call.base)

    def agree(self, kind: int, num_experts: int) -> None:
        """A call of the low-latency form that moves nothing; it takes a tick, as all do, so that
        ranks that call something else hear of it and all go on in step.

        Raises: ShapeError if the ranks disagree; RankFailure.
        """
        self.await_next_slot()
        tick = self._take_ticks(1)
        fields = {"kind": kind, "num_experts": num_experts, "call": self.counts.next_call()}
        posted = self.counts.post(fields, Layout.nothing(self.size, self.num_hosts))
        self.lib.wf_ep_staged(self.fabric.pointer, self.rank, tick)
        self._collect_forms(posted, tick)
        self._end(tick)

    def _phase(self, call: DispatchCall, keep: list[Any], stage: bool, pull: bool) -> None:
        with trace.span("ep.dispatch", "communication", tokens=call.tokens):
            self._move(call, keep, stage, pull)

    def _move(self, call: DispatchCall, keep: list[Any], stage: bool, pull: bool) -> None:
        call.stage, call.pull = stage, pull
        sent = self.links.send_blocks(call, keep) if stage else None
        status = self.lib.wf_ep_dispatch(self.fabric.pointer, ctypes.addressof(call))
        self.fabric.check(status, "dispatch")
        if sent is not None:
            sent()

    def allocate(self, rows: Rows, want: Want, count: int, piece: Part | None = None) -> Received:
        """Arrays for `count` received rows; with a piece, x and scales lie in it."""
        K, selection, empty = want.top_k, want.per_selection, self.arena.empty
        scale = None
        if rows.scale is not None:
            shape: tuple[int, ...] = (count, *rows.scale.shape[1:])
            if room := want.rows_per_expert:
                shape = (count // room, rows.scale.shape[1], room)
            if piece is None:
                scale = empty(shape, rows.scale.dtype)
            else:
                begin = -(-count * rows.x_bytes // 64) * 64
                scale = _view(piece, begin, shape, rows.scale.dtype)
        weights = None
        if rows.topk_weights is not None:
            weights = empty((count,) if selection else (count, K), np.float32)
        idx = empty((count, K), np.int64) if K and not selection else None
        shape = (count, *rows.x.shape[1:])
        x = empty(shape, rows.x.dtype) if piece is None else _view(piece, 0, shape, rows.x.dtype)
        return Received(x, scale, idx, weights)

    def _call(
        self, rows: Rows, layout: Layout, want: Want, received: Received, block: int, ticks: int
    ) -> tuple[DispatchCall, list[Any]]:
        call = _sent(rows, layout, want, self.size)
        call.block, call.ticks = block, ticks
        call.big, call.threads = received.x.nbytes > BIG_BYTES, self.threads(received.x.nbytes)
        call.transposed_rows, call.capacity = want.rows_per_expert, len(received.x)
        call.recv_x, call.recv_scale = pointer(received.x), pointer(received.scale)
        call.recv_idx = pointer(received.topk_idx)
        call.recv_weights = pointer(received.topk_weights)
        return call, [rows, layout, received]

    def _fill_call(self, call: DispatchCall, keep: list[Any], handle: Handle, room: int) -> None:
        """Point the call to cursors and lists, whose sizes the counts fix."""
        start = handle.order_start[:-1].copy()
        cursor = handle.expert_cursor() if handle.want.per_selection else start
        if len(handle.token) < room:  # else an earlier dispatch's, which says the same
            handle.token = np.empty(room, np.int32)
            if not handle.want.per_selection:
                handle.order_token = handle.token[: handle.num_rows]
        call.recv_token, call.cursor = pointer(handle.token), pointer(cursor)
        call.order, call.order_token = pointer(handle.order), pointer(handle.order_token)
        call.order_cursor, call.entries = pointer(start), handle.num_rows
        keep += [handle, cursor, start]
        if not handle.forward:
            return
        tables = [np.zeros(self.size, np.uint64) for _ in range(3)]
        forward_cursor, forward_rows = np.zeros((2, self.size), np.int64)
        for source, lists in handle.forward.items():
            for table, array in zip(tables, lists, strict=True):
                table[source] = array.ctypes.data
            forward_rows[source] = len(lists[0])
        call.forward_token, call.forward_mask, call.forward_idx = (pointer(t) for t in tables)
        call.forward_cursor, call.forward_rows = pointer(forward_cursor), pointer(forward_rows)
        keep += [tables, forward_cursor, forward_rows]


def _sent(rows: Rows, layout: Layout, want: Want, ranks: int) -> DispatchCall:
    """The native arguments that say what is sent."""
    return DispatchCall(
        pointer(rows.x), pointer(rows.scale), pointer(rows.topk_idx), pointer(rows.topk_weights),
        pointer(layout.in_rank), rows.x.strides[0] if len(rows.x) else 0, rows.x_bytes,
        rows.scale_bytes, rows.top_k, len(rows.x),
        experts_per_rank=max(1, want.num_experts // ranks), per_selection=want.per_selection,
    )  # fmt: skip


def _view(piece: Part, begin: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    return piece.memory[begin : begin + nbytes].view(dtype).reshape(shape)


def _nothing() -> None:
    pass
