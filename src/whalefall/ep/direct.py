"""Ep room: dispatch within one host, straight into the receivers' memory: two steps.

The first says how many rows go where and offers a piece of shared memory for what comes; it learns
the same of all others. The second writes every row where its receiver will read it. Python is paid
for by every rank and every call, and where ranks share a core each finds the caches as the others
left them: so addresses and sizes go in, the caller makes its results, arrays or tensors, over the
piece, and a caller that waits anyway has both steps in one native call and its results made after.

# T tokens, R ranks, E experts, El experts of this rank, K top-k, N rows received
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

from whalefall import trace
from whalefall.ep.arena import Part
from whalefall.ep.combining import BIG_BYTES, THREAD_BYTES, Combining
from whalefall.ep.handle import HEADER_FIELDS, Handle
from whalefall.ep.library import KDISAGREE, KMISCOUNTED, Announcement, DispatchCall, pointer
from whalefall.ep.shared import STEP
from whalefall.errors import ShapeError

__all__ = ["MISCOUNTED", "Announced", "Direct"]

MISCOUNTED = (
    "Buffer.dispatch: num_tokens_per_rank does not count is_token_in_rank; get_dispatch_layout "
    "makes both"
)


@dataclass(slots=True)
class Announced:
    """A dispatch whose counts are known.

    Attributes:
        call: its native arguments.
        said: what this rank said and learnt.
        handle: for the way back.
        piece: where x (then scales, from the next 64 bytes) will be; None: somebody's piece is too
            small, and rows go through slots.
        per_expert: [El] rows of each local expert, rounded up to the alignment.
    """

    call: DispatchCall
    said: Announcement
    handle: Handle
    piece: Part | None
    per_expert: list[int]


class Direct(Combining):
    """The dispatch of a fabric within one host; arguments as of `Combining`."""

    _needed = 0  # bytes that recent dispatches brought

    def announce(
        self,
        call: DispatchCall,
        handle: Handle,
        per_rank: int | None,
        per_expert: int | None,
        alignment: int = 1,
        at_once: bool = False,
    ) -> Announced:
        """Tell all ranks what this one will send, and learn it of all; collective.

        Args:
            call: with its first twelve fields (what is sent) and `per_selection` set.
            handle: filled.
            per_rank: address of [R] int32, tokens for each rank.
            per_expert: address of [E] int32, selections of each expert.
            alignment: the returned counts are rounded up to its multiples.
            at_once: where there is a `piece`, the rows are in it when this returns; `take` brings
                what belongs to them. Nothing may be under way in the communication thread.
        Raises: ShapeError if the ranks disagree, or, before anything is said, if `per_rank` is not
            what the tokens come to; RankFailure.
        """
        R, E, at = self.size, handle.want.num_experts, ctypes.addressof(call)
        piece = self._offer(call, R)
        room, room_at = (piece.nbytes, piece.offset) if piece is not None else (0, 0)
        number, length = self.counts.next_number(), len(HEADER_FIELDS) + R + 1 + E
        told = _ints(R * length + E // R)()
        handle.heads_at = ctypes.addressof(told)
        said = Announcement(
            per_rank, per_expert, E, room // STEP, room_at // STEP, number, self.counts.next_call(),
            0, handle.heads_at, None, alignment, 0, 0, 0, 0, BIG_BYTES, THREAD_BYTES, self._cores,
        )  # fmt: skip
        handle.serial = self.counts.serial(number)
        if at_once:
            call.base, call.threads = self.counts.tick, self.num_threads
            status = self.lib.wf_ep_announce_and_write(
                self.fabric.pointer, at, ctypes.addressof(said)
            )
            self.counts.tick += said.fits
        else:
            status = self.lib.wf_ep_announce(self.fabric.pointer, at, ctypes.addressof(said))
        if status == KMISCOUNTED:
            self.counts.take_back(number)
            raise ShapeError(MISCOUNTED)
        handle.told = told
        if status:
            if status == KDISAGREE:
                self.counts.check_agreement(handle.heads)
            self.fabric.check(status, "dispatch" if said.fits else "counts")
        handle.num_rows, handle.most_tokens = said.rows, said.most_tokens
        self._needed = max(int(said.bytes * 1.1), self._needed * 7 // 8)
        return Announced(call, said, handle, piece if said.fits else None, told[R * length :])

    def _offer(self, call: DispatchCall, ranks: int) -> Part | None:
        """Memory for what comes; how much that is nobody knows yet: as much as may go, or came."""
        each = call.top_k if call.per_selection else min(call.top_k or ranks, ranks)
        row = call.x_bytes + call.scale_bytes + 12 * call.top_k + 16
        nbytes = max(call.tokens * each * row + 512, self._needed)
        assert self.fabric.shared is not None
        return self.fabric.shared.offer(nbytes)

    def take(self, announced: Announced) -> None:
        """After `announce` at once: fill the results beside x, to which `call` points."""
        self._make_lists(announced)
        self.lib.wf_ep_take_out(
            self.fabric.pointer, ctypes.addressof(announced.call), ctypes.addressof(announced.said)
        )

    def _make_lists(self, announced: Announced) -> None:
        call, handle, N = announced.call, announced.handle, announced.handle.num_rows
        handle.token = handle.order_token = token = np.empty(N, np.int32)
        handle.order = None
        call.recv_token = pointer(token)
        if call.per_selection:
            handle.order, handle.order_token = np.empty(N, np.int64), np.empty(N, np.int32)
            call.order, call.order_token = pointer(handle.order), pointer(handle.order_token)

    def write(self, announced: Announced, *keep: Any) -> Callable[[], None]:
        """The data phase of a dispatch whose `call` points to the results.

        Args:
            keep: what must live until it has run.
        """
        self._make_lists(announced)
        call, nbytes = announced.call, announced.handle.num_rows * announced.call.x_bytes
        call.big, call.threads = nbytes > BIG_BYTES, self.threads(nbytes)
        return partial(self._write, announced, keep)

    def _write(self, announced: Announced, _: tuple[Any, ...]) -> None:
        call = announced.call
        call.base = self._take_ticks(1)
        with trace.span("ep.dispatch", "communication", tokens=call.tokens):
            status = self.lib.wf_ep_direct(
                self.fabric.pointer, ctypes.addressof(call), ctypes.addressof(announced.said)
            )
            self.fabric.check(status, "dispatch")


@cache
def _ints(count: int) -> Any:
    return ctypes.c_int32 * count
