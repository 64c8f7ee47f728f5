"""Pipeline room: a stage with experts; dispatch and combine hide under another chunk's compute.

In: a subclass's attention and experts, an `Exchange`. Out: a stage for `DualPipe` and `DualPipeV`
with the overlap hook: forward of one chunk F and backward of another B alternate so that

    compute        ATTN(F)      MLP(B)        MLP(F)        ATTN(B)
    communication  COMBINE'(B)  DISPATCH(F)   DISPATCH'(B)  COMBINE(F)      (' its backward)

Source: DeepSeek-V3 report, 3.2.1, figure 4.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from whalefall import trace
from whalefall.pipeline.torch.exchange import Exchange, Routed

__all__ = ["ExpertStage"]


class ExpertStage(nn.Module):
    """One layer in four parts. Subclasses define `attention` and `experts`; one tensor in, one out.

    Args:
        exchange: moves this rank's tokens to the experts and back.
    Attributes:
        records_parts: its parts are in the trace; an action around them is not compute throughout.
    """

    records_parts = True

    def __init__(self, exchange: Exchange) -> None:
        super().__init__()
        self.exchange = exchange

    def attention(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The layer up to the gate: residual, tokens [T, H], expert ids [T, K], weights [T, K]."""
        raise NotImplementedError

    def experts(self, routed: Routed) -> Tensor:
        """This rank's experts on the rows that arrived, weighted: [N, H]."""
        raise NotImplementedError

    def merge(self, residual: Tensor, combined: Tensor) -> Tensor:
        """The layer's output; by default the sum, in the residual's shape and dtype."""
        return residual + combined.reshape(residual.shape).to(residual.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Part after part, each communication waited for at once."""
        tape = _Tape(self, x)
        tape.attention()
        tape.dispatch()()
        tape.experts()
        tape.combine()()
        return tape.finish()

    @classmethod
    def overlapped_forward_backward(
        cls, module0: ExpertStage, inputs0: Sequence[Tensor], criterion0: Any,
        labels0: Sequence[Any], module1: ExpertStage, loss1: Tensor | None,
        outputs1: Sequence[Tensor], output_grads1: Sequence[Tensor | None],
    ) -> tuple[list[Tensor], Tensor | None]:  # fmt: skip
        """Forward of one chunk and backward of another, alternating.

        Source: DualPipe's `overlapped_forward_backward`.
        """
        front, back = _Tape(module0, inputs0[0]), _tape_of(outputs1[0])
        grad = output_grads1[0] if loss1 is None else _loss_grad(loss1, outputs1[0])
        if grad is None:
            grad = torch.zeros_like(outputs1[0])
        back.finish_backward(grad)
        wait = back.combine_backward()
        front.attention()
        wait()
        wait = front.dispatch()
        back.experts_backward()
        wait()
        wait = back.dispatch_backward()
        front.experts()
        wait()
        wait = front.combine()
        back.attention_backward()
        wait()
        output = front.finish()
        back.give_input_grad()
        loss0 = None if criterion0 is None else criterion0(output, *labels0)
        return [output], loss0


def _loss_grad(loss: Tensor, output: Tensor) -> Tensor:
    """d loss / d output, without going on into the stage."""
    (grad,) = torch.autograd.grad(loss, [output])
    return grad


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(torch.is_grad_enabled() and x.is_floating_point())


class _Tape:
    """One chunk in one stage: the parts' graphs, cut apart where tokens travel."""

    def __init__(self, stage: ExpertStage, x: Tensor) -> None:
        self.stage = stage
        self.given = x
        self.x = _leaf(x)

    def attention(self) -> None:
        with trace.span("ATTN(F)", "compute", "compute"):
            found = self.stage.attention(self.x)
            self.residual, self.tokens, self.expert, self.weight = found

    def dispatch(self) -> Callable[[], None]:
        exchange = self.stage.exchange
        wait = exchange.dispatch(self.tokens.detach(), self.expert, self.weight.detach())

        def take(routed: Routed) -> None:
            self.routed = Routed(
                _leaf(routed.rows), routed.expert, _leaf(routed.weight), routed.handle
            )

        return _recorded("DISPATCH(F)", wait, take)

    def experts(self) -> None:
        with trace.span("MLP(F)", "compute", "compute"):
            self.rows = self.stage.experts(self.routed)

    def combine(self) -> Callable[[], None]:
        wait = self.stage.exchange.combine(self.rows.detach(), self.routed.handle)

        def take(combined: Tensor) -> None:
            self.combined = _leaf(combined)

        return _recorded("COMBINE(F)", wait, take)

    def finish(self) -> Tensor:
        """The output, in the stage's outer graph: its backward runs this tape's."""
        self.left = _leaf(self.residual)
        self.output = self.stage.merge(self.left, self.combined)
        if not torch.is_grad_enabled():
            return self.output
        anchor = torch.zeros((), requires_grad=True)  # a stage's first input needs no gradient
        output = _Bridge.apply(self, self.given, anchor, self.output.detach())
        output.expert_tape = self  # type: ignore[attr-defined]
        return output

    def finish_backward(self, grad: Tensor) -> None:
        self.output.backward(grad)

    def combine_backward(self) -> Callable[[], None]:
        assert self.combined.grad is not None
        grad, handle = self.combined.grad, self.routed.handle
        wait = self.stage.exchange.combine_backward(grad.to(self.rows.dtype), handle)

        def take(rows_grad: Tensor) -> None:
            self.rows_grad = rows_grad

        return _recorded("COMBINE(B)", wait, take)

    def experts_backward(self) -> None:
        with trace.span("MLP(B)", "compute", "compute"):
            if self.rows.requires_grad:
                self.rows.backward(self.rows_grad.to(self.rows.dtype))

    def dispatch_backward(self) -> Callable[[], None]:
        rows, weight = self.routed.rows, self.routed.weight
        grad = torch.zeros_like(rows) if rows.grad is None else rows.grad
        weight_grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        handle = self.routed.handle
        wait = self.stage.exchange.dispatch_backward(grad, weight_grad, handle)

        def take(grads: tuple[Tensor, Tensor]) -> None:
            self.token_grad, self.weight_grad = grads

        return _recorded("DISPATCH(B)", wait, take)

    def attention_backward(self) -> None:
        with trace.span("ATTN(B)", "compute", "compute"):
            pairs = [
                (self.residual, self.left.grad), (self.tokens, self.token_grad),
                (self.weight, self.weight_grad),
            ]  # fmt: skip
            used = [(t, g.to(t.dtype)) for t, g in pairs if t.requires_grad and g is not None]
            torch.autograd.backward([t for t, _ in used], [g for _, g in used])

    def give_input_grad(self) -> None:
        """Add the input's gradient to the tensor that the stage was called with."""
        if self.given.requires_grad and self.x.grad is not None:
            before = self.given.grad
            self.given.grad = self.x.grad if before is None else before + self.x.grad

    def backward(self, grad: Tensor) -> Tensor | None:
        """The whole backward, part after part."""
        self.finish_backward(grad)
        self.combine_backward()()
        self.experts_backward()
        self.dispatch_backward()()
        self.attention_backward()
        return self.x.grad


def _tape_of(output: Tensor) -> _Tape:
    """The tape of a stage's output, which travels on the tensor."""
    tape: _Tape = output.expert_tape  # type: ignore[attr-defined]
    return tape


class _Bridge(torch.autograd.Function):
    """Stands for a tape in the outer graph, where no hook takes its backward apart."""

    @staticmethod
    def forward(ctx: Any, tape: _Tape, given: Tensor, anchor: Tensor, output: Tensor) -> Tensor:
        ctx.tape = tape
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, None, None]:
        with torch.enable_grad():
            input_grad = ctx.tape.backward(grad)
        return None, input_grad, None, None


def _recorded(
    name: str, wait: Callable[[], Any], take: Callable[[Any], None]
) -> Callable[[], None]:
    """A wait that hands on its result and records the time since the beginning."""
    start = time.perf_counter_ns()

    def finish() -> None:
        take(wait())
        end = time.perf_counter_ns()
        # the exchange itself records when data moves; this is until somebody waited for it
        trace.record(name, start, end, "pipeline", "communication")

    return finish
