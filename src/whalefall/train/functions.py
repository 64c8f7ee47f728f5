"""Train room: linear layers and SwiGLU as autograd functions, with weight gradients put aside.

In: activations, master weights, a `Products`. Out: activations; weight gradients are added straight
to `weight.grad` (fp32), at once, or at the schedule's W while `WeightGradStore.enabled`.

# T rows, H hidden, I width, G groups
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whalefall.pipeline.torch import WeightGradStore
from whalefall.train.products import Counts, Products

__all__ = ["cross_entropy", "grad_of", "linear", "with_loss", "swiglu"]

CROSS_ENTROPY_ROWS = 512  # logits of so many rows stay in the cache
CROSS_ENTROPY_MULTIPLE = 64  # few different shapes: see Products.multiple


def grad_of(weight: Tensor) -> Tensor:
    """The buffer that a weight's gradient is added to."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    grad: Tensor = weight.grad
    return grad


def _whenever(add: Callable[[], None]) -> None:
    """Run a weight gradient now, or put it aside for the schedule's W."""
    if WeightGradStore.enabled:
        WeightGradStore.put(torch.no_grad()(add))
    else:
        add()


def _stack(weight: Tensor) -> Tensor:
    return weight if weight.dim() == 3 else weight[None]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, products: Products) -> Tensor:
        counts, x = (len(x),), products.operand(x)
        ctx.products, ctx.counts, ctx.weight = products, counts, weight
        ctx.kept = products.kept(x, counts)
        return products.forward(x, _stack(weight.detach()), counts).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        products, counts, weight, kept = ctx.products, ctx.counts, ctx.weight, ctx.kept
        grad = products.operand(grad)

        def add() -> None:
            products.weight_grad(grad, kept, counts, _stack(grad_of(weight)))

        _whenever(add)
        if not ctx.needs_input_grad[0]:
            return None, None, None
        return products.input_grad(grad, _stack(weight.detach()), counts).float(), None, None


def linear(x: Tensor, weight: nn.Parameter, products: Products) -> Tensor:
    """x [..., K] · weight [N, K]ᵀ → [..., N] fp32."""
    flat = x.reshape(-1, x.shape[-1])
    if not torch.is_grad_enabled():
        out = products.forward(flat, _stack(weight.detach()), (len(flat),)).float()
    else:
        out = _Linear.apply(flat, weight, products)
    return out.view(*x.shape[:-1], -1)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, counts: Counts, products: Products
    ) -> Tensor:
        x = products.operand(x)
        hidden = products.forward(x, gate_up.detach(), counts)
        gate, up = hidden.chunk(2, -1)
        act = F.silu(gate) * up
        ctx.products, ctx.counts, ctx.weights = products, counts, (gate_up, down)
        ctx.kept_x, ctx.kept_act = products.kept(x, counts), products.kept(act, counts)
        ctx.hidden = hidden
        return products.forward(act, down.detach(), counts).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        products, counts, (gate_up, down) = ctx.products, ctx.counts, ctx.weights
        kept_x, kept_act = ctx.kept_x, ctx.kept_act
        grad = products.operand(grad)
        grad_act = products.input_grad(grad, down.detach(), counts)
        gate, up = ctx.hidden.chunk(2, -1)
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        grad_hidden = torch.empty_like(ctx.hidden)
        torch.mul(grad_act * up, torch.addcmul(sigmoid, silu, 1 - sigmoid),
                  out=grad_hidden[:, : gate.shape[1]])  # fmt: skip
        torch.mul(grad_act, silu, out=grad_hidden[:, gate.shape[1] :])

        def add() -> None:
            products.weight_grad(grad, kept_act, counts, grad_of(down))
            products.weight_grad(grad_hidden, kept_x, counts, grad_of(gate_up))

        _whenever(add)
        grad_x = products.input_grad(grad_hidden, gate_up.detach(), counts).float()
        return grad_x, None, None, None, None


def swiglu(
    x: Tensor, gate_up: nn.Parameter, down: nn.Parameter, counts: Counts, products: Products
) -> Tensor:
    """down · (silu(gate · x) · (up · x)), each row with the weights of its group.

    Args:
        x: [T, H], rows sorted by group. counts: rows of each group.
        gate_up: [G, 2I, H], gate first. down: [G, H, I].
    Returns: [T, H] fp32.
    """
    out: Tensor = _SwiGLU.apply(x, gate_up, down, counts, products)
    return out


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, products: Products
    ) -> Tensor:
        weight = _stack(head.detach())
        grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros_like(head)
        total = hidden.new_zeros(())
        for start in range(0, len(labels), CROSS_ENTROPY_ROWS):
            part = slice(start, start + CROSS_ENTROPY_ROWS)
            wanted = labels[part]
            count = len(wanted)
            rows = products.operand(F.pad(hidden[part], (0, 0, 0, -count % CROSS_ENTROPY_MULTIPLE)))
            counts = (len(rows),)
            log_p = F.log_softmax(products.forward(rows, weight, counts).float(), -1)
            total += F.nll_loss(log_p[:count], wanted, reduction="sum")
            grad = log_p.exp_()
            grad[count:] = 0.0
            grad[torch.arange(count), wanted] -= 1.0
            grad = products.operand(grad)
            grad_hidden[part] = products.input_grad(grad, weight, counts)[:count]
            kept = products.kept(rows, counts)
            products.weight_grad(grad, kept, counts, _stack(grad_head))
        ctx.grads, ctx.head = (grad_hidden, grad_head), head
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_hidden, grad_head = ctx.grads
        _whenever(lambda: grad_of(ctx.head).add_(grad_head * grad))
        return grad_hidden * grad, None, None, None


def cross_entropy(hidden: Tensor, head: nn.Parameter, labels: Tensor, products: Products) -> Tensor:
    """Summed cross entropy of hidden [T, H] · head [V, H]ᵀ with labels [T]; −1: no label.

    Gradients are made on the way forward, so that logits exist for a few hundred rows at a time.
    """
    learnt = (labels >= 0).nonzero()[:, 0]
    rows = hidden.index_select(0, learnt)
    total: Tensor = _CrossEntropy.apply(rows, head, labels[learnt], products)
    return total


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, torch.ones(())


def with_loss(x: Tensor, loss: Tensor) -> Tensor:
    """x, unchanged; its backward also runs that of `loss`, a scalar of a stage in mid-pipeline."""
    out: Tensor = _WithLoss.apply(x, loss)
    return out
