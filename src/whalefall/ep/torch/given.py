"""Ep room: what callers of `Buffer` give, checked and seen as arrays; results in their form."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from whalefall.ep.direct import MISCOUNTED
from whalefall.ep.engine import Engine
from whalefall.ep.handle import Handle, Layout
from whalefall.ep.rows import Rows
from whalefall.ep.torch.arrays import Copies, array, bf16, rows, tensor
from whalefall.ep.torch.handles import DispatchHandle
from whalefall.errors import ConfigError, ShapeError

__all__ = [
    "Scaled", "as_given", "bias_rows", "layout_given", "layout_of", "native_of", "of_rows", "sent",
]  # fmt: skip

Scaled = tuple[Tensor, Tensor]


def sent(
    x: Tensor | Scaled, topk_idx: Tensor | None, topk_weights: Tensor | None, copies: Copies
) -> tuple[Rows, tuple[torch.dtype, torch.dtype | None]]:
    """What to send as bytes, of which some are there after `copies`, and the dtypes it has."""
    if (topk_idx is None) != (topk_weights is None):
        raise ConfigError("Buffer.dispatch: topk_idx and topk_weights come together or not at all")
    if isinstance(x, tuple) and len(x) != 2:
        raise ConfigError(f"Buffer.dispatch: x is a tuple of {len(x)}, wanted (FP8 rows, scales)")
    values, scales = x if isinstance(x, tuple) else (x, None)
    idx = None if topk_idx is None else array(topk_idx, torch.int64, "topk_idx", copies)
    weights = None
    if topk_weights is not None:
        weights = array(topk_weights, torch.float32, "topk_weights", copies)
    if idx is not None and weights is not None and idx.shape != weights.shape:
        raise ShapeError(f"Buffer.dispatch: topk_idx {idx.shape}, topk_weights {weights.shape}")
    given = rows(values, "x", copies)
    scale = None if scales is None else rows(scales, "scales", copies, together=True)
    made = Rows(given, scale, idx, weights)
    for name, other in (("scales", made.scale), ("topk_idx", idx)):
        if other is not None and len(other) != len(given):
            raise ShapeError(f"Buffer.dispatch: {name} has {len(other)} tokens, x has {len(given)}")
    return made, (values.dtype, None if scales is None else scales.dtype)


def as_given(received: Any, dtypes: tuple[torch.dtype, torch.dtype | None], x: Any) -> Any:
    """What arrived, in the form in which x was given."""
    values = tensor(received.x, dtypes[0])
    return (values, tensor(received.scale, dtypes[1])) if isinstance(x, tuple) else values


def bias_rows(bias: Tensor | None, tokens: int, hidden: int, copies: Copies) -> np.ndarray | None:
    """A bias [T, H] bf16 as a contiguous array; None stays None."""
    if bias is None:
        return None
    given = bf16(bias, "bias", copies, together=True)
    if given.shape != (tokens, hidden):
        raise ShapeError(f"Buffer.combine: bias is {list(bias.shape)}, wanted [{tokens}, {hidden}]")
    return given


def layout_of(handle: Handle) -> Layout:
    """The layout of an earlier dispatch, whose counts everyone knows."""
    nothing = np.zeros(0, np.int32)
    return Layout(nothing, nothing, nothing, handle.in_rank)


def layout_given(
    engine: Engine, is_token_in_rank: Tensor, per_rank: Tensor, per_expert: Tensor, tokens: int
) -> Layout:
    """A layout as the caller has it, checked."""
    in_rank = array(is_token_in_rank, torch.bool, "is_token_in_rank").copy()  # the handle's own
    if in_rank.shape != (tokens, engine.num_ranks):
        raise ShapeError(
            f"Buffer.dispatch: is_token_in_rank is {list(in_rank.shape)}, wanted "
            f"[{tokens}, {engine.num_ranks}]"
        )
    hosts = [0]  # within one host nobody asks
    if len(engine.topology.hosts) > 1:
        hosts = [in_rank[:, list(h)].any(1).sum() for h in engine.topology.hosts]
    counts = array(per_expert, torch.int32, "num_tokens_per_expert")
    engine.check_experts(len(counts))
    ranks = array(per_rank, torch.int32, "num_tokens_per_rank")
    if len(ranks) != engine.num_ranks:
        raise ShapeError(
            f"Buffer.dispatch: num_tokens_per_rank has {len(ranks)}, wanted {engine.num_ranks}"
        )
    if (in_rank.sum(0) != ranks).any():
        raise ShapeError(MISCOUNTED)
    return Layout(ranks, np.array(hosts, np.int32), counts, in_rank)


def of_rows(x: Any, weights: Any, handle: Handle) -> tuple[Any, Any]:
    """x and its weights; where one has rows beyond those received, both are cut to these."""
    if not (isinstance(weights, Tensor) and isinstance(x, Tensor) and weights.dim() and x.dim()):
        return x, weights
    N, beside = handle.num_rows, len(weights)
    if len(x) == beside or len(x) < N or not (beside == N or beside == handle.room > N):
        return x, weights
    return x[:N], weights[:N]


def native_of(handle: Any, engine: Engine) -> Handle:
    """The engine's handle.

    Raises: ConfigError for what is no handle of a dispatch of this group.
    """
    if not isinstance(handle, DispatchHandle):
        raise ConfigError(f"Buffer: handle is a {type(handle).__name__}, wanted dispatch's own")
    native = handle.native
    engine.normal.check_handle(native)
    return native
