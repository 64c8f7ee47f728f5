"""Ep room: dispatch and combine that gradients flow through; each is the other's backward.

Source: DeepEP, README "Example use in model training or inference prefilling".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from whalefall.ep.torch.buffer import Buffer
from whalefall.errors import ConfigError

__all__ = ["combine", "dispatch"]


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        buffer: Buffer,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        num_experts: int,
    ) -> Any:
        per_rank, per_host, per_expert, in_rank, _ = buffer.get_dispatch_layout(
            topk_idx, num_experts
        )
        recv_x, recv_idx, recv_weights, counts, handle, _ = buffer.dispatch(
            x, None, per_rank, per_host, in_rank, per_expert, topk_idx, topk_weights
        )
        ctx.buffer, ctx.handle = buffer, handle
        ctx.mark_non_differentiable(recv_idx)
        ctx.save_for_backward(recv_idx)
        return recv_x, recv_idx, recv_weights, counts, handle

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, _idx: Any, grad_weights: Tensor, *_: Any) -> Any:
        (recv_idx,) = ctx.saved_tensors  # where it is −1 the weight is 0, whatever was sent
        back, back_weights, _ = ctx.buffer.combine(
            grad_x.contiguous(), ctx.handle, topk_weights=grad_weights.masked_fill(recv_idx < 0, 0)
        )
        return None, back, None, back_weights, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, buffer: Buffer, x: Tensor, handle: Any) -> Tensor:
        ctx.buffer, ctx.handle = buffer, handle
        return buffer.combine(x, handle)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        back = ctx.buffer.dispatch(grad.contiguous(), handle=ctx.handle)[0]
        return None, back, None


def dispatch(
    buffer: Buffer, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, list[int], Any]:
    """`Buffer.dispatch` with gradients for `x` and `topk_weights`.

    Args:
        buffer: of this rank.
        x: [T, H] bf16.
        topk_idx: [T, K] int64.
        topk_weights: [T, K] float32.
        num_experts: E.
    Returns: recv_x, recv_topk_idx, recv_topk_weights, tokens of each local expert, handle.
    """
    if not isinstance(buffer, Buffer):
        raise ConfigError(f"ep: buffer is a {type(buffer).__name__}, wanted an ep.Buffer")
    result: tuple[Tensor, Tensor, Tensor, list[int], Any] = _Dispatch.apply(
        buffer, x, topk_idx, topk_weights, num_experts
    )
    return result


def combine(buffer: Buffer, x: Tensor, handle: Any) -> Tensor:
    """`Buffer.combine` with a gradient for `x`: [N, H] bf16 to [T, H] bf16."""
    result: Tensor = _Combine.apply(buffer, x, handle)
    return result
