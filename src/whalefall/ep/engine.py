"""Ep room: the engine — dispatch and combine between expert-parallel ranks, on arrays, no torch.

`Engine` is one rank of a group. Within a host tokens travel through shared memory, between hosts
over TCP in two hops. `dispatch` and `combine` move one row a token and rank (as `Buffer` does);
`dispatch_selections` and `combine_selections` one row a selection, whose sums do not depend on how
many ranks there are: what serving uses.
Source: DeepEP; DeepSeek-V3 report, 3.2.2.

# T tokens, R ranks, E experts, El experts of a rank, K top-k, H hidden, N rows received
"""

from __future__ import annotations

import math
import secrets
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from whalefall import comm
from whalefall.arguments import flag, whole
from whalefall.ep import rows as rules
from whalefall.ep.arena import Arena
from whalefall.ep.arguments import MOST, engine_arguments, engine_timeout
from whalefall.ep.connect import close_all, host_name, open_links
from whalefall.ep.counts import mailbox_bytes
from whalefall.ep.exchange import Exchange
from whalefall.ep.fabric import CLOSED, Fabric, Lock, Plan
from whalefall.ep.group import Group
from whalefall.ep.handle import HEADER_FIELDS, Handle, Layout, Received, Want
from whalefall.ep.library import library
from whalefall.ep.links import Links
from whalefall.ep.meeting import Hello, meet, number_engine, process_name
from whalefall.ep.rows import Bias, Pending, Rows, contiguous_rows, result
from whalefall.ep.spread import count_spread
from whalefall.ep.topology import Topology
from whalefall.ep.worker import Event, Worker, holding
from whalefall.errors import ConfigError, ShapeError

__all__ = ["Engine"]

CHUNK_BYTES = 2 << 20
SLOTS = 2
SHARED_BYTES = 16 << 30  # address space for results that neighbours write or read
LOW_LATENCY_CHUNK = 8 << 20  # packed tokens of one dispatch from another host's rank
MAX_EXPERTS = 4096
VERSION = 2


class Engine:
    """One rank of an expert-parallel group; making it is collective.

    Args:
        group: who belongs together (`FileGroup`, `TcpGroup`, `torch.TorchGroup`).
        chunk_bytes: what a rank puts into shared memory at a time; two such slots a rank.
        low_latency_bytes: address space for the low-latency form; 0: without it. Memory is taken
            only as it is used.
        slot_bytes: address space of a slot; default: enough for the worst case of a chunk.
        timeout_s: how long a living rank may keep the others waiting; a dead one is found at
            once. Default: WHALEFALL_EP_TIMEOUT.
        shrink: low latency goes on without failed ranks where it can (`Buffer`: enable_shrink).
        num_threads: that copy and add; 0: by load. The bits do not depend on it.
        hidden: where known, checked to be equal on all ranks.
        num_experts: where known, checked to be equal on all ranks.
        host: name of this host; default: WHALEFALL_HOST, else found out.
        shared_bytes: address space for results that neighbours write and rows that they read, used
            where all ranks are on one host; 0: all rows pass through slots.
    Attributes:
        rank: this process.
        num_ranks: R.
        topology: which ranks share a host.
    Raises: ConfigError if ranks were made with different arguments; RankFailure; LimitError.
    """

    def __init__(
        self,
        group: Group,
        *,
        chunk_bytes: int = CHUNK_BYTES,
        low_latency_bytes: int = 0,
        slot_bytes: int = 0,
        timeout_s: float | None = None,
        shrink: bool = False,
        num_threads: int = 0,
        hidden: int | None = None,
        num_experts: int | None = None,
        host: str | None = None,
        shared_bytes: int = SHARED_BYTES,
    ) -> None:
        engine_arguments(
            group, host, low_latency_bytes=low_latency_bytes, slot_bytes=slot_bytes, hidden=hidden,
            shared_bytes=shared_bytes, num_threads=num_threads, num_experts=num_experts,
            chunk_bytes=chunk_bytes,
        )  # fmt: skip
        self.group, self.rank, self.num_ranks = group, group.rank, group.size
        self.timeout_s = engine_timeout(timeout_s)
        self.num_experts, self.hidden, self._closed = num_experts, hidden, False
        comm.sweep("ep-")
        library()  # compiled before anyone waits for us
        config: dict[str, int | float | None] = {
            "version": VERSION, "chunk_bytes": chunk_bytes, "low_latency_bytes": low_latency_bytes,
            "timeout_s": self.timeout_s, "hidden": hidden, "num_experts": num_experts,
            "shrink": int(flag("Engine: shrink", shrink)), "shared_bytes": shared_bytes,
        }  # fmt: skip
        hello = Hello(host or host_name(), f"ep-{secrets.token_hex(6)}", process_name(), config)
        hellos = meet(group, hello)
        self._number = number_engine(hellos)
        self.topology = Topology.from_names([h.host for h in hellos], [h.process for h in hellos])
        name, host_number = hellos[0].name, self.topology.host_of(self.rank)
        mates = self.topology.hosts[host_number]
        self._lock = Lock(f"{name}-{host_number}", mates.index(self.rank))
        self.arena = Arena()
        self.worker = Worker("ep")
        mailbox = mailbox_bytes(self.num_ranks, MAX_EXPERTS)
        slot_bytes = max(slot_bytes, chunk_bytes * 8 * max(8, len(mates)))
        plan = Plan(
            f"{name}-n", SLOTS, slot_bytes, chunk_bytes, mailbox, self.timeout_s,
            shared_bytes=shared_bytes if len(self.topology.hosts) == 1 else 0,
        )  # fmt: skip
        self.normal = self._open(plan, one_tick=False)
        self.normal.num_threads = num_threads
        self.low_latency: Exchange | None = None
        if low_latency_bytes:
            room = -(-low_latency_bytes // 8192) * 4096
            chunk = min(room, LOW_LATENCY_CHUNK)
            plan = Plan(f"{name}-l", 2, room, chunk, mailbox, self.timeout_s, shrink,
                        form="low-latency")  # fmt: skip
            self.low_latency = self._open(plan, one_tick=True)
            one, other = self.normal.fabric, self.low_latency.fabric
            one.twin, other.twin = other, one
        self._lock.region.unlink()
        self._finalizer = weakref.finalize(
            self, close_all, self.worker, self.normal, self.low_latency, self._lock
        )

    def _open(self, plan: Plan, one_tick: bool) -> Exchange:
        fabric = Fabric(
            plan, self.topology, self.rank, self._lock, lambda: self.group.all_gather(b"")
        )
        links = open_links(self.group, fabric) if len(self.topology.hosts) > 1 else Links()
        return Exchange(fabric, links, self.arena, one_tick, self._number)

    # ---- layout

    def layout(self, topk_idx: np.ndarray, num_experts: int) -> Layout:
        """Count how a batch spreads.

        Args:
            topk_idx: [T, K] int64; −1 is not sent.
            num_experts: E, a multiple of the ranks.
        Raises: ShapeError, DtypeError; LimitError for an expert that does not exist.
        """
        self.check_experts(num_experts)
        return count_spread(topk_idx, num_experts, self.normal.host_of, len(self.topology.hosts))

    def check_experts(self, num_experts: int) -> None:
        """Raise ShapeError for a number of experts that cannot be."""
        if (
            whole("ep: num_experts", num_experts, 0, MOST) == 0
            or num_experts % self.num_ranks
            or num_experts > MAX_EXPERTS
        ):
            raise ShapeError(
                f"ep: {num_experts} experts, wanted a multiple of {self.num_ranks} ranks up to "
                f"{MAX_EXPERTS}"
            )
        if self.num_experts not in (None, num_experts):
            raise ShapeError(f"ep: {num_experts} experts, engine was made for {self.num_experts}")

    # ---- one row a selection

    def dispatch_selections(
        self, x: np.ndarray, topk_idx: np.ndarray, num_experts: int
    ) -> Received:
        """Send each token to its experts, one row for every selection.

        Args:
            x: [T, H], any dtype, rows contiguous; T may differ between ranks and be 0.
            topk_idx: [T, K] int64; −1 is not sent.
            num_experts: E; rank r holds experts r·E/R and on.
        Returns: x [N, H] grouped by local expert, inside a group by source rank, token, lane;
            `per_expert` [El] rows of each group; `handle` for `combine_selections`.
        Raises: ShapeError, DtypeError, LimitError; RankFailure naming the rank that failed.
        """
        return self._done(self._selections(x, topk_idx, num_experts))

    def _done(self, pending: Pending) -> Any:
        pending.run()
        return pending.result

    def begin_dispatch_selections(
        self, x: np.ndarray, topk_idx: np.ndarray, num_experts: int
    ) -> tuple[Received, Event]:
        """`dispatch_selections` in the communication thread: `x` of the result is there once the
        event is done; counts are known at once, so it returns when every rank has called it."""
        pending = self._selections(x, topk_idx, num_experts)
        return pending.result, self.submit(pending.run)

    def _selections(self, x: np.ndarray, topk_idx: np.ndarray, num_experts: int) -> Pending:
        rules.check_rows(x, topk_idx, self.hidden, "dispatch_selections")
        layout = self.layout(topk_idx, num_experts)
        self.worker.drain()
        rows = Rows(contiguous_rows(x), None, np.array(topk_idx, order="C"))  # the handle's own
        return self.normal.dispatch(rows, layout, Want(num_experts, rows.top_k, True))

    def combine_selections(
        self,
        rows: np.ndarray,
        handle: Handle,
        topk_weights: np.ndarray | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Bring the experts' rows back to their tokens.

        Args:
            rows: [N, H] bf16 or float32, in the order of `dispatch_selections`.
            handle: of that dispatch.
            topk_weights: [T, K] float32; None: rows come back unadded.
            out: filled if given.
        Returns: with weights [T, H] float32, sum over k of weight·row, from 0, in top-k order, each
            product and sum rounded to float32, the same bits for any number of ranks; without
            weights [T, K, H] of the rows' dtype, in top-k order, 0 where topk_idx is −1.
        Raises: ShapeError, DtypeError; RankFailure naming the rank that failed.
        """
        out, pending = self._sums(rows, handle, topk_weights, out)
        pending.run()
        return out

    def begin_combine_selections(
        self, rows: np.ndarray, handle: Handle, topk_weights: np.ndarray | None = None
    ) -> tuple[np.ndarray, Event]:
        """`combine_selections` in the communication thread; the result is there once the event is
        done."""
        out, pending = self._sums(rows, handle, topk_weights, None)
        return out, self.submit(pending.run)

    def _sums(
        self,
        rows: np.ndarray,
        handle: Handle,
        topk_weights: np.ndarray | None,
        out: np.ndarray | None,
    ) -> tuple[np.ndarray, Pending]:
        self.normal.check_handle(handle)
        if not handle.want.per_selection:
            raise ConfigError("ep: combine_selections wants the handle of dispatch_selections")
        rules.check_combine(rows, handle, topk_weights)
        T, K, H = len(handle.in_rank), handle.want.top_k, rows.shape[-1]
        summed = topk_weights is not None
        out = result(
            self.arena, out, (T, H) if summed else (T, K, H),
            np.dtype(np.float32) if summed else rows.dtype,
        )  # fmt: skip
        weights = None if topk_weights is None else np.ascontiguousarray(topk_weights)
        self.worker.drain()
        return out, self.normal.combine(contiguous_rows(rows), handle, out, topk_weights=weights)

    # ---- one row a token and rank

    def dispatch(
        self,
        x: np.ndarray,
        topk_idx: np.ndarray,
        num_experts: int,
        topk_weights: np.ndarray | None = None,
        scale: np.ndarray | None = None,
    ) -> Received:
        """Send each token once to every rank that holds one of its experts.

        Args:
            x: [T, H], any dtype.
            topk_idx: [T, K] int64; −1 is not sent.
            num_experts: E.
            topk_weights: [T, K] float32, sent along.
            scale: [T, …], sent along (of FP8 rows).
        Returns: rows ordered by source rank, then token.
        Raises: ShapeError, DtypeError, LimitError; RankFailure naming the rank that failed.
        """
        rules.check_rows(x, topk_idx, self.hidden, "dispatch")
        rules.check_beside(topk_idx, topk_weights, scale)
        layout = self.layout(topk_idx, num_experts)
        self.worker.drain()
        rows = Rows(
            contiguous_rows(x), None if scale is None else np.ascontiguousarray(scale),
            np.ascontiguousarray(topk_idx),
            None if topk_weights is None else np.ascontiguousarray(topk_weights),
        )  # fmt: skip
        return self._done(self.normal.dispatch(rows, layout, Want(num_experts, rows.top_k)))

    def combine(
        self,
        rows: np.ndarray,
        handle: Handle,
        topk_weights: np.ndarray | None = None,
        bias: Bias = (None, None),
        out: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Add up what the ranks return for each token: bias, then ranks in order, in float32.

        Args:
            rows: [N, H] bf16 or float32, in the order of `dispatch`.
            handle: of that dispatch.
            topk_weights: [N, K] float32, added up too.
            bias: up to two [T, H] bf16.
            out: [T, H], filled if given; default: of the rows' dtype.
        Returns: [T, H], rounded once at the end (between hosts each host's sum is rounded too);
            [T, K] float32 or None.
        """
        self.normal.check_handle(handle)
        if handle.want.per_selection:
            raise ConfigError("ep: combine wants the handle of dispatch, not dispatch_selections")
        rules.check_combine(rows, handle, topk_weights, bias)
        T = handle.num_tokens
        out = result(self.arena, out, (T, rows.shape[1]), rows.dtype)
        weights = None if topk_weights is None else np.ascontiguousarray(topk_weights)
        out_weights = None if weights is None else np.empty((T, weights.shape[1]), np.float32)
        self.worker.drain()
        given = contiguous_rows(rows)
        self.normal.combine(given, handle, out, weights, None, out_weights, bias).run()
        return out, out_weights

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array with undefined contents, for what experts return.

        On one host it lies where neighbours can read it, so that combine sends rows without a copy.
        """
        shape, dtype = rules.layout_of(shape, dtype)
        shared, nbytes = self.normal.fabric.shared, math.prod(shape) * np.dtype(dtype).itemsize
        part = shared.take(nbytes) if shared is not None and nbytes else None
        if part is None:
            return self.arena.empty(shape, dtype)
        return part.memory[:nbytes].view(dtype).reshape(shape)

    # ---- the rest

    def submit(self, call: Callable[[], None]) -> Event:
        """Run a data phase in the communication thread."""
        return self.worker.submit(self.held(call))

    def held(self, call: Callable[[], None]) -> Callable[[], None]:
        """`call`, which keeps the engine and so the memory that it works in."""
        return partial(holding, call, self)

    def check_open(self) -> None:
        """Raise ConfigError once the engine is closed."""
        if self._closed:
            raise ConfigError(CLOSED)

    def barrier(self) -> None:
        """Return when every rank has called it.

        Raises: RankFailure naming the rank that failed.
        """
        self.gather(0)

    def gather(self, number: int) -> np.ndarray:
        """Every rank's `number` (0 … 2³¹ − 1): [R] int64; collective, a barrier that tells.

        Raises: RankFailure naming the rank that failed.
        """
        self.worker.drain()
        counts, hosts = self.normal.counts, len(self.topology.hosts)
        empty = Layout.nothing(self.num_ranks, hosts)
        whole("ep: gather: number", number, 0, MOST)
        fields = {"kind": 2, "tokens": number, "call": counts.next_call()}
        heads = counts.collect(counts.post(fields, empty))
        return heads[:, HEADER_FIELDS.index("tokens")].astype(np.int64)

    @property
    def bytes_sent_to_other_hosts(self) -> int:
        """Counted at the sockets."""
        exchanges = (e for e in (self.normal, self.low_latency) if e is not None)
        return sum(e.links.bytes_sent for e in exchanges)

    def close(self) -> None:
        """Leave the group: to the others this rank is gone. Safe to repeat."""
        self._closed = True
        self._finalizer()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
