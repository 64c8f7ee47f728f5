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
from functools import partial
from typing import Any

import numpy as np

from whalefall import trace
from whalefall.ep.combining import BIG_BYTES, Combining
from whalefall.ep.handle import HEADER_FIELDS, Handle, Layout, Received, Want
from whalefall.ep.library import DirectCall, DispatchCall, Form
from whalefall.ep.rows import Pending, Rows, pointer
from whalefall.ep.shared import STEP, Part
from whalefall.errors import LimitError

__all__ = ["Exchange"]

ROOM, ROOM_AT = HEADER_FIELDS.index("room"), HEADER_FIELDS.index("room_at")
MARGIN = 1.25  # room offered, over what the rank's own tokens need elsewhere


class Exchange(Combining):
    """The collectives of this rank on one fabric; arguments as of `Combining`."""

    _needed = 0  # bytes that recent dispatches brought

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
        piece, heads = None, None
        if handle is None:
            handle = Handle(want, self.rank, self.fabric.topology, layout.in_rank,
                            rows.topk_idx if want.per_selection else None)  # fmt: skip
            piece = None if into else self._offer(rows, want, layout)
            heads = self._announce(rows, want, layout, max_rows, piece)
            handle.fill(heads)
        most = int(handle.rows.sum(0).max(initial=0))
        if max_rows and most > max_rows:
            raise LimitError(
                f"ep: a rank would receive {most} rows, buffers have room for {max_rows} "
                "(num_worst_tokens)"
            )
        if piece is not None and heads is not None:
            direct = self._direct(rows, want, layout, handle, heads, piece)
            if direct is not None:
                return direct
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

    # ---- straight into the receivers' memory

    def _offer(self, rows: Rows, want: Want, layout: Layout) -> Part | None:
        """Memory that probably holds what will come; how much that is nobody knows yet."""
        shared = self.fabric.shared
        if shared is None or self.num_hosts > 1:
            return None
        counts = layout.per_expert if want.per_selection else layout.per_rank
        form = _form(rows, want)
        sent = self.lib.wf_ep_room(int(counts.sum()), ctypes.addressof(form))
        return shared.take(max(int(sent * MARGIN), self._needed))

    def _announce(
        self, rows: Rows, want: Want, layout: Layout, max_rows: int, piece: Part | None
    ) -> np.ndarray:
        fields = rows.fields(want, max_rows)
        if piece is not None:
            fields["room"], fields["room_at"] = piece.nbytes // STEP, piece.offset // STEP
        return self.counts.collect(self.counts.post(fields, layout))

    def _direct(
        self, rows: Rows, want: Want, layout: Layout, handle: Handle, heads: np.ndarray, piece: Part
    ) -> Pending | None:
        """The data phase that copies once; None where somebody's piece is too small."""
        form, R = _form(rows, want), self.size
        coming = handle.rows.sum(0)
        room = heads[:, ROOM].astype(np.int64) * STEP
        needed = self.lib.wf_ep_room(handle.num_rows, ctypes.addressof(form))
        self._needed = max(int(needed * 1.1), self._needed * 7 // 8)
        if not self.lib.wf_ep_fits(pointer(coming), pointer(room), R, ctypes.addressof(form)):
            return None
        received = self.allocate(rows, want, handle.num_rows, piece)
        received.handle = handle
        if handle.expert_counts is not None:
            received.per_expert = handle.expert_counts.sum(0)
        call, keep = self._call(rows, layout, want, received, 0, self._take_ticks(1), 1)
        self._fill_call(call, keep, handle, len(received.x))
        to = self.fabric.shared_of + heads[:, ROOM_AT].astype(np.uint64) * np.uint64(STEP)
        before = handle.rows[: self.rank].sum(0)
        following = handle.first_rows(heads) if want.per_selection else before.copy()
        direct = DirectCall(pointer(to), pointer(coming), pointer(following), pointer(before))
        keep += [direct, to, coming, following, before, piece]
        run = partial(self._run_direct, call, direct, keep)
        return Pending(run, _nothing, run, received)

    def _run_direct(self, call: DispatchCall, direct: DirectCall, keep: list[Any]) -> None:
        with trace.span("ep.dispatch", "communication", tokens=call.tokens):
            status = self.lib.wf_ep_direct(
                self.fabric.pointer, ctypes.addressof(call), ctypes.addressof(direct)
            )
            self.fabric.check(status, "dispatch")
        keep.clear()

    # ---- the low-latency form

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
        call.waited_ns = pointer(waited_ns)
        posted: list[tuple[int, int]] = []

        def send() -> None:
            posted.append(self.counts.post(rows.fields(want, 0), layout))
            self._phase(call, keep, True, False)

        def receive() -> None:
            handle.fill(self.counts.collect(posted[0]))
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
        self, rows: Rows, layout: Layout, want: Want, received: Received, block: int, base: int,
        ticks: int,
    ) -> tuple[DispatchCall, list[Any]]:  # fmt: skip
        call = DispatchCall(
            x=pointer(rows.x), scale=pointer(rows.scale), topk_idx=pointer(rows.topk_idx),
            topk_weights=pointer(rows.topk_weights), in_rank=pointer(layout.in_rank),
            x_stride=rows.x.strides[0] if len(rows.x) else 0, x_bytes=rows.x_bytes,
            scale_bytes=rows.scale_bytes, top_k=rows.top_k, tokens=len(rows.x), block=block,
            ticks=ticks, base=base, experts_per_rank=max(1, want.num_experts // self.size),
            per_selection=want.per_selection, big=received.x.nbytes > BIG_BYTES,
            transposed_rows=want.rows_per_expert, recv_x=pointer(received.x),
            recv_scale=pointer(received.scale), recv_idx=pointer(received.topk_idx),
            recv_weights=pointer(received.topk_weights), capacity=len(received.x),
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
        call.recv_token, call.cursor = pointer(token), pointer(cursor)
        call.order, call.order_token = pointer(handle.order), pointer(handle.order_token)
        call.order_cursor, call.forward_cursor = pointer(start), pointer(forward_cursor)
        if handle.forward:
            call.forward_token, call.forward_mask, call.forward_idx = (pointer(t) for t in tables)
        keep += [handle, token, cursor, start, tables, forward_cursor]


def _form(rows: Rows, want: Want) -> Form:
    return Form(
        rows.x_bytes, rows.scale_bytes, rows.top_k, rows.topk_weights is not None,
        want.per_selection,
    )  # fmt: skip


def _view(piece: Part, begin: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    return piece.memory[begin : begin + nbytes].view(dtype).reshape(shape)


def _nothing() -> None:
    pass
