"""Ep room: the normal mode of `Buffer`: one row for each token and rank, counts known on return.

Source: DeepEP `Buffer.get_dispatch_layout`, `dispatch`, `combine`.

# T tokens, R ranks, E experts, El experts of this rank, K top-k, H hidden, N rows received
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from whalefall import trace
from whalefall.arguments import flag, whole
from whalefall.ep.arguments import MOST
from whalefall.ep.config import Config
from whalefall.ep.direct import Announced
from whalefall.ep.engine import Engine
from whalefall.ep.events import EventHandle, EventOverlap
from whalefall.ep.handle import Handle, Layout, Want
from whalefall.ep.rows import Rows, check_combine
from whalefall.ep.torch import direct
from whalefall.ep.torch.arrays import Copies, array, bf16, from_bf16, tensor
from whalefall.ep.torch.given import (
    Scaled,
    as_given,
    bias_rows,
    layout_given,
    layout_of,
    native_of,
    of_rows,
)
from whalefall.ep.torch.given import sent as given_rows
from whalefall.ep.torch.handles import DispatchHandle
from whalefall.ep.worker import Event
from whalefall.errors import ConfigError, ShapeError

__all__ = ["Normal"]


class Normal:
    """The normal half of `Buffer`."""

    runtime: Engine
    _threads: ClassVar[int] = 0  # 0 until someone sets it: chosen by load
    _unannounced: Event | None = None
    _layout: direct.Known | None = None  # the last one made here

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, EventOverlap]:
        """Count how tokens spread.

        Args:
            topk_idx: [T, K] int64; −1 is not sent.
            num_experts: E.
            previous_event: waited for here, since the counts are made here.
            async_finish, allocate_on_comm_stream: as in `dispatch`.
        Returns: tokens of each rank [R] int32; of each host [hosts] int32, None within one host;
            selections of each expert [E] int32; is_token_in_rank [T, R] bool; event.
        """
        self._before(previous_event, async_finish, allocate_on_comm_stream)
        _await(previous_event)
        layout = self.runtime.layout(array(topk_idx, torch.int64, "topk_idx"), num_experts)
        hosts = tensor(layout.per_host) if len(self.runtime.topology.hosts) > 1 else None
        event = EventOverlap(EventHandle() if async_finish else None)
        per_rank, per_expert = tensor(layout.per_rank), tensor(layout.per_expert)
        in_rank = tensor(layout.in_rank)
        self._layout = direct.Known.of(in_rank, per_rank, per_expert)
        return per_rank, hosts, per_expert, in_rank, event

    def dispatch(
        self,
        x: Tensor | Scaled,
        handle: tuple[Any, ...] | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, ...]:
        """Send each token once to every rank that holds one of its experts.

        Args:
            x: [T, H] bf16, or (FP8 [T, H], scales [T, H/128]).
            handle: of an earlier dispatch: the same layout again, without top-k.
            num_tokens_per_rank, num_tokens_per_rdma_rank: as `get_dispatch_layout` counts them.
            is_token_in_rank: [T, R] bool.
            num_tokens_per_expert: [E] int32.
            topk_idx: [T, K] int64, sent along; together with `topk_weights` [T, K] float32.
            expert_alignment: the returned counts are rounded up to its multiples.
            num_worst_tokens: allocate so many rows and do not wait for the counts.
            config: accepted.
            previous_event: x, scales and top-k are read after it, the layout at the call.
            async_finish: return at once; results are valid after the event.
            allocate_on_comm_stream: accepted, with both of the above.
        Returns: recv_x (as x), recv_topk_idx [N, K] int64 (local ids, −1 for others),
            recv_topk_weights, received tokens of each local expert (list), handle, event. Rows are
            ordered by source rank, then token. With `handle`: (recv_x, None, None, None, None,
            event).
        Raises: ShapeError, DtypeError, ConfigError; LimitError on all ranks if num_worst_tokens is
            too small; RankFailure.
        """
        self._before(previous_event, async_finish, allocate_on_comm_stream)
        expert_alignment = whole("Buffer.dispatch: expert_alignment", expert_alignment, 1, 1 << 20)
        num_worst_tokens = whole("Buffer.dispatch: num_worst_tokens", num_worst_tokens, 0, MOST)
        exchange = self.runtime.normal
        exchange.num_threads = self._threads
        self._await_announced()
        if handle is not None:
            if topk_idx is not None or topk_weights is not None:
                raise ConfigError(
                    "Buffer.dispatch: a handle brings its layout; give no top-k with it"
                )
            return self._dispatch_again(x, handle, previous_event, async_finish)
        if is_token_in_rank is None or num_tokens_per_expert is None or num_tokens_per_rank is None:
            raise ConfigError(
                "Buffer.dispatch: is_token_in_rank, num_tokens_per_rank and num_tokens_per_expert "
                "are needed without a handle; get_dispatch_layout gives them"
            )
        values, scale = x if isinstance(x, tuple) and len(x) == 2 else (x, None)
        given = direct.Given(
            values, scale, is_token_in_rank, num_tokens_per_rank, num_tokens_per_expert, topk_idx,
            topk_weights,
        )  # fmt: skip
        announced = None
        if not num_worst_tokens:
            at_once = not async_finish and previous_event is None and not trace.is_recording()
            if at_once:
                self.runtime.worker.drain()
            announced = direct.announce(
                self.runtime, given, expert_alignment, self._layout, at_once
            )
            if announced is not None and announced.piece is not None:
                results = direct.receive(announced, given)
                if at_once:
                    exchange.take(announced)
                    event = EventOverlap()
                else:
                    move = exchange.write(announced, given, *results)
                    event = self._run(move, previous_event, async_finish)
                made = DispatchHandle.of(partial(_known, announced.handle), 1)
                return (*results, announced.per_expert, made, event)
        return self._dispatch_arrays(
            x, given, announced, num_worst_tokens, expert_alignment, previous_event, async_finish
        )

    def _dispatch_arrays(
        self, x: Tensor | Scaled, given: direct.Given, announced: Announced | None, worst: int,
        alignment: int, previous: EventOverlap | None, async_finish: bool,
    ) -> tuple[Any, ...]:  # fmt: skip
        copies = Copies()
        sent, dtypes = given_rows(x, given.topk_idx, given.topk_weights, copies)
        layout = layout_given(
            self.runtime, given.in_rank, given.per_rank, given.per_expert, len(sent.x)
        )
        want, exchange = Want(len(layout.per_expert), sent.top_k), self.runtime.normal
        if worst > 0:
            return self._dispatch_worst(
                sent, layout, want, worst, dtypes, x, copies, previous, async_finish
            )
        if announced is None:
            pending = exchange.dispatch(sent, layout, want)
        else:  # somebody's memory was too small for the way without slots
            announced.handle.make_lists()
            pending = exchange.through_slots(sent, layout, want, announced.handle)
        received = pending.result
        event = self._run(partial(copies.before, pending.run), previous, async_finish)
        counts = -(-received.per_expert // alignment) * alignment
        made = DispatchHandle.of(partial(_known, received.handle), self._num_hosts)
        return (
            as_given(received, dtypes, x), tensor(received.topk_idx),
            tensor(received.topk_weights), counts.tolist(), made, event,
        )  # fmt: skip

    def _dispatch_again(
        self, x: Tensor | Scaled, handle: Any, previous: EventOverlap | None, async_finish: bool
    ) -> tuple[Any, ...]:
        copies = Copies()
        sent, dtypes = given_rows(x, None, None, copies)
        native = native_of(handle, self.runtime)
        if native.num_tokens != len(sent.x):
            raise ShapeError(
                f"Buffer.dispatch: {len(sent.x)} tokens, handle is of {native.num_tokens}"
            )
        pending = self.runtime.normal.dispatch(sent, layout_of(native), Want(0, 0), native)
        event = self._run(partial(copies.before, pending.run), previous, async_finish)
        return as_given(pending.result, dtypes, x), None, None, None, None, event

    def _dispatch_worst(
        self, sent: Rows, layout: Layout, want: Want, worst: int, dtypes: Any, x: Any,
        copies: Copies, previous: EventOverlap | None, async_finish: bool,
    ) -> tuple[Any, ...]:  # fmt: skip
        if sent.topk_idx is None:
            raise ConfigError("Buffer.dispatch: num_worst_tokens needs topk_idx and topk_weights")
        exchange, announced = self.runtime.normal, Event()
        received = exchange.allocate(sent, want, worst)

        def run() -> None:
            try:
                pending = exchange.dispatch(sent, layout, want, into=received, max_rows=worst)
            finally:
                announced.finish()
            received.handle.room = worst
            pending.run()
            assert received.topk_idx is not None
            received.topk_idx[received.handle.num_rows :] = -1

        self._unannounced = announced if async_finish else None
        event = self._run(partial(copies.before, run), previous, async_finish)

        def native() -> Handle:
            if event.event is not None:
                event.event.current_stream_wait()
            return received.handle

        made = DispatchHandle.of(native, self._num_hosts)
        return (
            as_given(received, dtypes, x), tensor(received.topk_idx),
            tensor(received.topk_weights), [], made, event,
        )  # fmt: skip

    def combine(
        self,
        x: Tensor,
        handle: tuple[Any, ...],
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Add up, for each token, what the ranks return: bias first, then ranks in order, in fp32.

        Args:
            x: [N, H] bf16, rows as received, or more of which the first N count; not weighted here.
            handle: of the dispatch.
            topk_weights: [N, K] float32, added up too; or, after `num_worst_tokens`, as received.
            bias: [T, H] bf16, or two of them.
            config, previous_event, async_finish, allocate_on_comm_stream: as in `dispatch`.
        Returns: [T, H] bf16, [T, K] float32 or None, event. The same bits on every run.
        """
        self._before(previous_event, async_finish, allocate_on_comm_stream)
        self._await_announced()
        native = native_of(handle, self.runtime)
        self.runtime.normal.num_threads = self._threads
        x, topk_weights = of_rows(x, topk_weights, native)
        whole = direct.combine(self.runtime.normal, x, native, topk_weights, bias)
        if whole is not None:
            out, summed, add_up = whole
            if async_finish or previous_event is not None:
                return out, summed, self._run(add_up, previous_event, async_finish)
            self.runtime.worker.drain()
            add_up()
            return out, summed, EventOverlap()
        copies = Copies()
        given = bf16(x, "x", copies)
        if given.ndim != 2 or len(given) < native.num_rows:
            raise ShapeError(
                f"Buffer.combine: x is {list(x.shape)}, wanted [{native.num_rows}, hidden]"
            )
        T = len(native.in_rank)
        if isinstance(bias, tuple) and len(bias) > 2:
            raise ConfigError(f"Buffer.combine: {len(bias)} biases, wanted at most two")
        biases = [
            bias_rows(b, T, given.shape[1], copies)
            for b in (bias if isinstance(bias, tuple) else [bias])
        ]
        weights = out_weights = None
        if topk_weights is not None:
            weights = array(topk_weights, torch.float32, "topk_weights", copies)
            check_combine(given, native, weights)
            out_weights = np.empty((T, weights.shape[1]), np.float32)
        out = self.runtime.arena.empty((T, given.shape[1]), given.dtype)
        pending = self.runtime.normal.combine(
            given, native, out, row_weights=weights, out_weights=out_weights,
            bias=(biases[0], biases[1] if len(biases) > 1 else None),
        )  # fmt: skip
        event = self._run(partial(copies.before, pending.run), previous_event, async_finish)
        return from_bf16(out), tensor(out_weights), event

    def get_combine_buffer(self, handle: tuple[Any, ...], hidden: int) -> Tensor:
        """Memory for what experts return: within a host, combine reads it where it is.

        Of a tensor from elsewhere combine makes a copy first; of what dispatch returned it makes
        none either. The memory is the caller's until the last view of it is gone.

        Args:
            handle: of the dispatch.
            hidden: H.
        Returns: [N, H] bf16, undefined contents.
        """
        self.runtime.check_open()
        native = native_of(handle, self.runtime)
        whole("Buffer.get_combine_buffer: hidden", hidden, 0, 1 << 24)
        return from_bf16(self.runtime.empty((native.num_rows, hidden), ml_dtypes.bfloat16))

    # ---- inside

    @property
    def _num_hosts(self) -> int:
        return len(self.runtime.topology.hosts)

    def _before(self, previous: EventOverlap | None, async_finish: bool, on_comm: bool) -> None:
        self.runtime.check_open()
        asynchronous = flag("Buffer: async_finish", async_finish)
        if flag("Buffer: allocate_on_comm_stream", on_comm) and not (
            previous is not None and asynchronous
        ):
            raise ConfigError(
                "Buffer: allocate_on_comm_stream needs previous_event and async_finish=True"
            )

    def _await_announced(self) -> None:
        # Counts are exchanged in the order of calls: a call that left it to the thread goes first.
        if self._unannounced is not None:
            self._unannounced._flag.wait()
            self._unannounced = None

    def _run(
        self, call: Callable[[], None], previous: EventOverlap | None, async_finish: bool
    ) -> EventOverlap:
        def after_previous() -> None:
            _await(previous)
            call()

        if async_finish:
            return EventOverlap(EventHandle(self.runtime.submit(after_previous)))
        self.runtime.worker.drain()
        after_previous()
        return EventOverlap()


def _await(previous: EventOverlap | None) -> None:
    if isinstance(previous, EventOverlap) and previous.event is not None:
        previous.event.current_stream_wait()


def _known(handle: Handle) -> Handle:
    return handle
