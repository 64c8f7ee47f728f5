"""Ep room: the low-latency calls of `Buffer`: one row for each selection, halves that can be split.

With `return_recv_hook=True` a call only sends, after which the caller may change what it gave; its
results are valid after the hook, and nothing runs in between (between hosts, a combine is
forwarded). Two collectives may be under way at a time;
their hooks may be called in any order.
Source: DeepEP `Buffer.low_latency_*`.

# T tokens, M most tokens of a rank, R ranks, E experts, El experts of this rank, K top-k, H hidden
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from whalefall.arguments import flag, whole
from whalefall.ep.arguments import MOST
from whalefall.ep.config import low_latency_size_hint
from whalefall.ep.counts import CLEAN
from whalefall.ep.engine import Engine
from whalefall.ep.events import EventHandle, EventOverlap
from whalefall.ep.exchange import Exchange
from whalefall.ep.halves import Half
from whalefall.ep.handle import Handle, Want
from whalefall.ep.library import library
from whalefall.ep.rows import Pending, Rows
from whalefall.ep.torch.arrays import array, bf16, rows, tensor
from whalefall.ep.torch.handles import LowLatencyHandle
from whalefall.errors import ConfigError, DtypeError, LimitError, ShapeError

__all__ = ["LowLatency"]

Hook = Callable[[], None]
BLOCK = 128  # channels of one scale


class LowLatency:
    """The low-latency half of `Buffer`."""

    runtime: Engine
    num_nvl_bytes: int
    num_rdma_bytes: int
    enable_shrink: bool

    @property
    def _low(self) -> Exchange:
        self.runtime.check_open()
        if self.runtime.low_latency is None:
            raise ConfigError("Buffer: made without low_latency_mode=True and num_rdma_bytes")
        return self.runtime.low_latency

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        """Collective, as in the original; here the two forms share no memory: only a barrier.

        It moves on by a slot: take `get_next_low_latency_combine_buffer` after it, not before.
        """
        low = self._low
        where, M = "clean_low_latency_buffer", num_max_dispatch_tokens_per_rank
        whole(f"{where}: num_max_dispatch_tokens_per_rank", M, 0, MOST)
        whole(f"{where}: hidden", hidden, 0, MOST)
        whole(f"{where}: num_experts", num_experts, 0, MOST)
        self.runtime.worker.drain()
        low.agree(CLEAN, num_experts)

    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        dispatch_wait_recv_cost_stats: Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Any, ...]:
        """Send each token to its experts, one row for each selection.

        Args:
            x: [T, H] bf16, T ≤ M.
            topk_idx: [T, K] int64; −1 is not sent.
            num_max_dispatch_tokens_per_rank: M, the same on all ranks.
            num_experts: E.
            cumulative_local_expert_recv_stats: [El] int32, the counts are added to it.
            dispatch_wait_recv_cost_stats: [R] int64, nanoseconds waited are added to it.
            use_fp8: send E4M3 with a scale for each 128 channels.
            round_scale: scales are powers of two.
            use_ue8m0: scales come as four exponents in an int32 (needs `round_scale`).
            async_finish: return at once; results are valid after the event.
            return_recv_hook: only send; results are valid after the hook, which does nothing when
                called again.
        Returns: recv_x [El, R·M, H] bf16, or (E4M3, scales [El, R·M, H/128] or [El, R·M, H/512],
            rows next to each other in memory); recv_count [El] int32, rows beyond are undefined;
            handle; event; hook or None. Rows come by source rank, then token
            (in the original as they arrive).
        Raises: LimitError if T > M or the buffer is too small, before anything is sent;
            ConfigError, also while the hook of the call two before was not called; ShapeError,
            DtypeError; RankFailure.
        """
        low, M = self._low, num_max_dispatch_tokens_per_rank
        async_finish, return_recv_hook = _one_of(
            "low_latency_dispatch", async_finish, return_recv_hook
        )
        use_fp8 = flag("low_latency_dispatch: use_fp8", use_fp8)
        use_ue8m0 = flag("low_latency_dispatch: use_ue8m0", use_ue8m0)
        round_scale = flag("low_latency_dispatch: round_scale", round_scale)
        if bf16(x, "x").ndim != 2:
            raise ShapeError(f"low_latency_dispatch: x is {list(x.shape)}, wanted [tokens, hidden]")
        T, H = x.shape
        whole("low_latency_dispatch: num_max_dispatch_tokens_per_rank", M, 0, MOST)
        whole("low_latency_dispatch: num_experts", num_experts, 1, MOST)
        self._check_low_latency(T, H, M, num_experts, use_fp8, round_scale, use_ue8m0)
        idx = array(topk_idx, torch.int64, "topk_idx").copy()
        if idx.ndim != 2 or len(idx) != T:
            raise ShapeError(f"low_latency_dispatch: topk_idx is {idx.shape}, wanted [{T}, top-k]")
        layout = self.runtime.layout(idx, num_experts)
        if use_fp8:
            values, scales = _cast(bf16(x, "x"), round_scale, use_ue8m0)
            sent = Rows(values, scales, idx)
        else:
            sent = Rows(rows(x, "x"), None, idx)
        R, El = self.runtime.num_ranks, num_experts // self.runtime.num_ranks
        want = Want(num_experts, sent.top_k, True, R * M)
        waited = _stats(dispatch_wait_recv_cost_stats, torch.int64, R)
        total = _stats(cumulative_local_expert_recv_stats, torch.int32, El)
        pending = low.low_latency_dispatch(sent, layout, want, waited)
        received = pending.result
        count = torch.zeros(El, dtype=torch.int32)
        source = torch.zeros((El, R * M), dtype=torch.int32)
        ranges = torch.zeros((El, R), dtype=torch.int64)

        def receive() -> None:
            pending.receive()
            handle = received.handle
            count.numpy()[:] = received.per_expert
            source.numpy().reshape(-1)[:] = handle.token
            begin = handle.expert_cursor() - np.arange(El)[:, None] * (R * M)
            ranges.numpy()[:] = begin << 32 | handle.expert_counts.T
            if total is not None:
                total[:] += received.per_expert.astype(np.int32)

        half = Half(receive)
        event, hook = self._halves(pending, half, async_finish, return_recv_hook)
        made = LowLatencyHandle.of(
            (source, ranges, M, H, num_experts), received.handle, event.event, half
        )
        if use_fp8:
            packed = tensor(received.x, torch.float8_e4m3fn).view(El, R * M, H)
            result: Any = (packed, tensor(received.scale).transpose(1, 2))
        else:
            result = tensor(received.x, torch.bfloat16).view(El, R * M, H)
        return result, count, made, event, hook

    def low_latency_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: tuple[Any, ...],
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Tensor | None = None,
        combine_wait_recv_cost_stats: Tensor | None = None,
    ) -> tuple[Tensor, EventOverlap, Hook | None]:
        """Add up the experts' rows of each token: Σ weight·row, fp32, in top-k order.

        Args:
            x: [El, R·M, H] bf16, rows as received.
            topk_idx: [T, K] int64, as dispatched.
            topk_weights: [T, K] float32.
            handle: of the dispatch.
            use_logfmt: rows travel as LogFMT-10, 10 bits a value where a block of 128 channels
                stays below 1. Pays between hosts; rounds each value by up to a few percent.
            zero_copy: the rows are in `get_next_low_latency_combine_buffer` already, which stays as
                it is until the results are there; x is not read.
            async_finish, return_recv_hook: as in `low_latency_dispatch`.
            out: [T, H] bf16, filled.
            combine_wait_recv_cost_stats: [R] int64, nanoseconds waited are added to it.
        Returns: [T, H] bf16, event, hook or None.
        Raises: as `low_latency_dispatch`; ConfigError for `zero_copy` of a buffer that was not
            taken right before, before anything is sent.
        """
        async_finish, return_recv_hook = _one_of(
            "low_latency_combine", async_finish, return_recv_hook
        )
        zero_copy = flag("low_latency_combine: zero_copy", zero_copy)
        use_logfmt = flag("low_latency_combine: use_logfmt", use_logfmt)
        if use_logfmt and zero_copy:
            raise ConfigError("low_latency_combine: use_logfmt and zero_copy exclude each other")
        low = self._low
        native, M, H, E = _of(handle, low)
        El = E // self.runtime.num_ranks
        room = El * self.runtime.num_ranks * M
        if bf16(x, "x").size != room * H:
            raise ShapeError(
                f"low_latency_combine: x is {list(x.shape)}, wanted [{El}, {room // El}, {H}]"
            )
        idx = array(topk_idx, torch.int64, "topk_idx")
        weights = array(topk_weights, torch.float32, "topk_weights")
        if weights.shape != idx.shape:
            raise ShapeError(
                f"low_latency_combine: topk_weights is {weights.shape}, wanted {idx.shape}"
            )
        weights = _without_dropped(weights, idx, native.topk_idx)
        if return_recv_hook:  # they are multiplied at the hook
            weights = weights.copy()
        stride = 0
        if zero_copy:
            stride = 2 * H + H // 32
            if native.num_rows:  # else there is nothing to fill
                low.lent.check(native.serial, low.next_tick)
            given = bf16(self.get_next_low_latency_combine_buffer(handle), "x").reshape(room, -1)
        else:
            given = bf16(x, "x").reshape(room, H)
        result = out if out is not None else torch.empty((len(idx), H), dtype=torch.bfloat16)
        bf16(result, "out")
        if result.shape != (len(idx), H) or not result.is_contiguous():
            raise ShapeError(
                f"low_latency_combine: out is {list(result.shape)}, wanted [{len(idx)}, {H}]"
            )
        waited = _stats(combine_wait_recv_cost_stats, torch.int64, self.runtime.num_ranks)
        pending = low.combine(
            given, native, bf16(result, "out"), topk_weights=weights, zero_copy_stride=stride,
            waited_ns=waited, log_format=use_logfmt,
        )  # fmt: skip
        half = Half(pending.receive)
        event, hook = self._halves(pending, half, async_finish, return_recv_hook)
        return result, event, hook

    def get_next_low_latency_combine_buffer(self, handle: tuple[Any, ...]) -> Tensor:
        """The memory that the next combine sends from, [El, R·M, H] bf16, rows H + H/64 apart.

        Fill the rows that were received, then combine with `zero_copy=True`, the very next
        low-latency call: any other takes this memory, and that combine then raises ConfigError.

        Raises: ConfigError while a tensor is there that was taken for another handle's next call.
        """
        low = self._low
        native, M, H, E = _of(handle, low)
        R, El, stride = self.runtime.num_ranks, E // self.runtime.num_ranks, H + H // 64
        head = low.slot_head_bytes(native)
        low.await_next_slot()
        begin = low.next_tick
        low.fabric.reserve(begin, 0, head)
        assert native.expert_counts is not None
        for expert, rows_here in enumerate(native.expert_counts.sum(0).tolist()):
            low.fabric.reserve(begin, head + expert * R * M * stride * 2, rows_here * stride * 2)
        memory = low.fabric.slot_view(begin)[head : head + El * R * M * stride * 2]
        low.lent.lend(native.serial, begin, memory)
        flat = torch.frombuffer(memory, dtype=torch.bfloat16)
        return flat.as_strided((El, R * M, H), (R * M * stride, stride, 1))

    # ---- masks of failed ranks

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Treat a rank as gone (`mask=True`), or as there again."""
        if not 0 <= whole("Buffer: rank_to_mask", rank_to_mask, -1, MOST) < self.runtime.num_ranks:
            raise LimitError(
                f"Buffer: rank_to_mask is {rank_to_mask}, wanted 0 … {self.runtime.num_ranks - 1}"
            )
        self._low.fabric.masked[rank_to_mask] = flag("Buffer: mask", mask)

    def low_latency_query_mask_buffer(self, mask_status: Tensor) -> None:
        """Fill `mask_status` [R] int32: 1 for a rank that is treated as gone."""
        if _stats(mask_status, torch.int32, self.runtime.num_ranks) is None:
            raise DtypeError("Buffer: mask_status is None, wanted a tensor to fill")
        mask_status.copy_(torch.from_numpy(self._low.fabric.masked))

    def low_latency_clean_mask_buffer(self) -> None:
        """Treat every rank as there.

        One that the others went on without is masked again by the next call: it is out of step, and
        its calls raise RankFailure. To have it back, make a new Buffer on all ranks.
        """
        self._low.fabric.masked[:] = 0

    # ---- inside

    def _halves(
        self, pending: Pending, half: Half, async_finish: bool, split: bool
    ) -> tuple[EventOverlap, Hook | None]:
        def both() -> None:
            pending.send()
            half.end()

        if async_finish:
            return EventOverlap(EventHandle(self.runtime.submit(both))), None
        self.runtime.worker.drain()
        if split:
            hook = self.runtime.held(half.end)
            pending.leave()
            self._low.hooks.leave(pending.tick, hook, half)
            return EventOverlap(), hook
        both()
        return EventOverlap(), None

    def _check_low_latency(
        self, T: int, H: int, M: int, E: int, use_fp8: bool, round_scale: bool, use_ue8m0: bool
    ) -> None:
        if T > M:
            raise LimitError(
                f"low_latency_dispatch: {T} tokens, num_max_dispatch_tokens_per_rank is {M}; send "
                "them in parts, or make the buffer for more"
            )
        if H % BLOCK or (use_ue8m0 and H % (4 * BLOCK)):
            raise ShapeError(
                f"low_latency_dispatch: hidden is {H}, wanted a multiple of "
                f"{4 * BLOCK if use_ue8m0 else BLOCK}"
            )
        if use_ue8m0 and not round_scale:
            raise ConfigError("low_latency_dispatch: use_ue8m0 needs round_scale=True")
        needed = low_latency_size_hint(M, H, E)
        if needed > self.num_rdma_bytes:
            raise LimitError(
                f"low_latency_dispatch: {M} tokens of {H} for {E} experts need num_rdma_bytes = "
                f"{needed}, buffer has {self.num_rdma_bytes}; get_low_latency_rdma_size_hint"
            )


def _of(handle: Any, low: Exchange) -> tuple[Handle, int, int, int]:
    """The engine's handle, M, H and E of a low-latency dispatch."""
    if not isinstance(handle, LowLatencyHandle):
        raise ConfigError(
            f"Buffer: handle is a {type(handle).__name__}, wanted low_latency_dispatch's own"
        )
    low.check_handle(handle.native)
    return (handle.native, *handle[2:])


def _one_of(where: str, async_finish: bool, return_recv_hook: bool) -> tuple[bool, bool]:
    in_thread = flag(f"{where}: async_finish", async_finish)
    hooked = flag(f"{where}: return_recv_hook", return_recv_hook)
    if in_thread and hooked:
        raise ConfigError(f"{where}: async_finish and return_recv_hook exclude each other")
    return in_thread, hooked


def _stats(given: Tensor | None, dtype: torch.dtype, length: int) -> np.ndarray | None:
    if given is None:
        return None
    if not isinstance(given, Tensor):
        raise DtypeError(f"low latency: statistics are a {type(given).__name__}, wanted a tensor")
    if given.dtype != dtype or given.numel() != length or not given.is_contiguous():
        raise ShapeError(f"low latency: statistics are {given.dtype} {list(given.shape)}, wanted "
                         f"contiguous {dtype} [{length}]")  # fmt: skip
    return np.asarray(given.numpy()).reshape(-1)


def _cast(x: np.ndarray, round_scale: bool, packed: bool) -> tuple[np.ndarray, np.ndarray]:
    """bf16 [T, H] to E4M3 bytes [T, H] and scales [T, H/128] float32 or [T, H/512] int32."""
    T, H = x.shape
    codes, scales = np.empty((T, H), np.uint8), np.empty((T, H // BLOCK), np.float32)
    library().wf_ep_cast(
        x.ctypes.data, x.strides[0] // 2, T, H, round_scale, codes.ctypes.data, scales.ctypes.data
    )
    if not packed:
        return codes, scales
    exponents = (scales.view(np.int32) >> 23).astype(np.uint8)  # [T, H/128], sign is 0
    return codes, exponents.view(np.int32)


def _without_dropped(
    weights: np.ndarray, idx: np.ndarray, dispatched: np.ndarray | None
) -> np.ndarray:
    """[T, K] weights, 0 where `idx` is −1 since the dispatch (of a failed rank's experts).

    Raises: ConfigError where it names other experts than the dispatch did.
    """
    if dispatched is None or idx.shape != dispatched.shape:
        raise ConfigError("low_latency_combine: topk_idx is not that of the dispatch")
    same = idx == dispatched
    if not (same | (idx == -1)).all():
        raise ConfigError("low_latency_combine: topk_idx is not that of the dispatch")
    return weights if same.all() else np.where(same, weights, np.float32(0))
