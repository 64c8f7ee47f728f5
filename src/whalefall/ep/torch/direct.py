"""Ep room: `Buffer.dispatch` and `combine` within one host, on tensors that lie as they must.

Every microsecond of Python is paid by every rank, and where ranks share cores all of them add up.
So here tensors give their addresses, results are tensors over the pieces that the neighbours fill,
and nothing becomes an array. What does not lie so (other types, elements apart, wrong shapes) is
left to `given.py`, which copies it or says what is wrong.

# T tokens, R ranks, E experts, El experts of this rank, K top-k, H hidden, N rows received
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from whalefall.ep.combining import Combining
from whalefall.ep.direct import Announced
from whalefall.ep.engine import Engine
from whalefall.ep.handle import Handle, Want
from whalefall.ep.library import NOWHERE, CombineCall, DispatchCall

__all__ = ["Given", "announce", "combine", "receive"]

# Up to here torch's own memory is good enough; more malloc may give back and must get page by page.
SMALL_BYTES = 1 << 17
INT32, INT64, FLOAT32, BF16 = torch.int32, torch.int64, torch.float32, torch.bfloat16


class Given(NamedTuple):
    """The tensors of a dispatch: x, scales, is_token_in_rank, counts, top-k."""

    x: Tensor
    scale: Tensor | None
    in_rank: Tensor
    per_rank: Tensor
    per_expert: Tensor
    topk_idx: Tensor | None
    topk_weights: Tensor | None


class Known(NamedTuple):
    """Layout tensors that `get_dispatch_layout` made, and where they lay; they need no check."""

    in_rank: Tensor
    per_rank: Tensor
    per_expert: Tensor
    at: tuple[int, int, int]
    tokens: int

    @classmethod
    def of(cls, in_rank: Tensor, per_rank: Tensor, per_expert: Tensor) -> Known:
        """These tensors, as they lie now."""
        at = in_rank.data_ptr(), per_rank.data_ptr(), per_expert.data_ptr()
        return cls(in_rank, per_rank, per_expert, at, len(in_rank))

    def are(self, given: Given) -> bool:
        """Whether these tensors were given, still where they were."""
        _, _, in_rank, per_rank, per_expert, _, _ = given
        return (
            in_rank is self.in_rank and per_rank is self.per_rank
            and per_expert is self.per_expert
            and (in_rank.data_ptr(), per_rank.data_ptr(), per_expert.data_ptr()) == self.at
        )  # fmt: skip


def announce(
    engine: Engine, given: Given, alignment: int, known: Known | None, at_once: bool
) -> Announced | None:
    """Announce a dispatch; None, before anything is said, where a tensor does not lie as it must.

    Raises: ShapeError if the ranks disagree; RankFailure.
    """
    try:
        called = _called(engine, given, known)
    except AttributeError:  # something is no tensor: given.py says what
        return None
    if called is None:
        return None
    return engine.normal.announce(*called, alignment, at_once)


def _called(
    engine: Engine, given: Given, known: Known | None
) -> tuple[DispatchCall, Handle, int, int] | None:
    """The native arguments, the handle, and where the counts lie."""
    x, scale, in_rank, per_rank, per_expert, idx, weights = given
    exchange, E = engine.normal, per_expert.numel()
    if not exchange.is_direct or not _has_rows(x):
        return None
    T, R, K, scale_bytes = x.shape[0], exchange.size, 0, 0
    if known is not None and known.tokens == T and known.are(given):
        layout_at = known.at[1:]
    else:
        if not (_is(in_rank, torch.bool, (T, R)) and _is(per_rank, INT32, (R,))):
            return None
        if not _is(per_expert, INT32, (E,)):
            return None
        engine.check_experts(E)
        layout_at = per_rank.data_ptr(), per_expert.data_ptr()
    if scale is not None:
        if scale.dim() != 2 or not _is(scale, scale.dtype, (T, scale.shape[1])):
            return None
        scale_bytes = scale.shape[1] * scale.element_size()
    if idx is not None and weights is not None:
        K = idx.shape[1] if idx.dim() == 2 else -1
        if not (_is(idx, INT64, (T, K)) and _is(weights, FLOAT32, (T, K))):
            return None
    elif idx is not None or weights is not None:
        return None
    item, kept = x.element_size(), in_rank.clone()  # the caller may change it after the call
    call = DispatchCall(
        x.data_ptr(), _at(scale), _at(idx), _at(weights), _at(kept), x.stride(0) * item,
        x.shape[1] * item, scale_bytes, K, T, 0, 0, 0, E // R,
    )  # fmt: skip
    handle = Handle(_want(E, K), engine.rank, engine.topology, kept, None)
    return call, handle, *layout_at


def receive(announced: Announced, given: Given) -> tuple[Any, Tensor | None, Tensor | None]:
    """Tensors for what comes, to which the call points then: x as given, ids, weights."""
    call, N, piece = announced.call, announced.handle.num_rows, announced.piece
    assert piece is not None
    x = _over(piece.memory, given.x, N, 0)
    call.recv_x = x.data_ptr()
    scale = idx = weights = None
    if given.scale is not None:
        scale = _over(piece.memory, given.scale, N, -(-N * call.x_bytes // 64) * 64)
        call.recv_scale = scale.data_ptr()
    if given.topk_idx is not None:
        idx, weights = torch.empty((N, call.top_k), dtype=INT64), torch.empty((N, call.top_k))
        call.recv_idx, call.recv_weights = idx.data_ptr(), weights.data_ptr()
    return x if scale is None else (x, scale), idx, weights


def combine(
    exchange: Combining, x: Tensor, handle: Handle, topk_weights: Tensor | None,
    bias: Tensor | tuple[Tensor, ...] | None,
) -> tuple[Tensor, Tensor | None, Callable[[], None]] | None:  # fmt: skip
    """The result of a combine, its weights, and what fills them; None: not for tensors as these."""
    try:
        return _combined(exchange, x, handle, topk_weights, bias)
    except AttributeError:  # something is no tensor: given.py says what
        return None


def _combined(
    exchange: Combining, x: Tensor, handle: Handle, topk_weights: Tensor | None,
    bias: Tensor | tuple[Tensor, ...] | None,
) -> tuple[Tensor, Tensor | None, Callable[[], None]] | None:  # fmt: skip
    biases = bias if isinstance(bias, tuple) else (bias, None)
    T, K = handle.num_tokens, 0
    if exchange.num_hosts > 1 or len(biases) != 2 or not _has_rows(x) or x.dtype is not BF16:
        return None
    N, H = x.shape
    if handle.num_rows > N:
        return None
    for given in biases:
        if given is not None and not _is(given, BF16, (T, H)):
            return None
    out_weights = None
    if topk_weights is not None:
        K = handle.want.top_k
        if not _is(topk_weights, FLOAT32, (N, K)):
            return None
        out_weights = torch.empty((T, K))
    nbytes = T * H * 2
    if nbytes < SMALL_BYTES:
        out = torch.empty((T, H), dtype=BF16)
    else:
        out = _over(exchange.arena.block(nbytes), x, T, 0)
    call = CombineCall(
        x.data_ptr(), x.stride(0) * 2, H, 0, _at(topk_weights), bias0=_at(biases[0]),
        bias1=_at(biases[1]), out=out.data_ptr(), out_weights=_at(out_weights),
    )  # fmt: skip
    keep = x, out, topk_weights, out_weights, biases
    return out, out_weights, exchange.sum_up(call, handle, N, *keep)


_want = cache(Want)


def _has_rows(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_cpu and x.dim() == 2 and x.stride(1) == 1


def _is(t: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    return t.dtype is dtype and t.shape == shape and t.is_cpu and t.is_contiguous()


def _at(t: Tensor | None) -> int | None:
    # torch has no address for a tensor without elements, and null says that nothing was given
    return None if t is None else t.data_ptr() or NOWHERE


def _over(memory: Any, like: Tensor, rows: int, begin: int) -> Tensor:
    """[rows, …] of the type and width of `like`, over memory from a byte on."""
    width = like.shape[1]
    if not rows or not width:
        return like.new_empty((rows, width))
    flat = torch.frombuffer(memory, dtype=like.dtype, count=rows * width, offset=begin)
    return flat.view(rows, width)
