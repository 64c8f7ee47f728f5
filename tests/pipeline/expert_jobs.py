"""An expert stage for the tests, and exchanges to try it with."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from whalefall import trace
from whalefall.pipeline.torch import (
    BufferExchange,
    DualPipeV,
    ExpertStage,
    Pipeline,
    Routed,
    WeightGradStore,
    set_p2p_tensor_dtype,
    set_p2p_tensor_shapes,
)

EXPERTS, TOP, HIDDEN, ROWS, CHUNKS = 4, 2, 128, 6, 6


class Pause(torch.autograd.Function):
    """Takes time in both directions, as compute on an accelerator would."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, pause_s: float) -> torch.Tensor:
        ctx.pause_s = pause_s
        time.sleep(pause_s)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        time.sleep(ctx.pause_s)
        return grad, None


class Layer(ExpertStage):
    """A linear "attention", a gate, experts held here; `first` is the first local expert."""

    def __init__(self, number: int, exchange: Any, first: int, local: int, pause_s: float) -> None:
        super().__init__(exchange)
        random = torch.Generator().manual_seed(number)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=random) / HIDDEN**0.5)

        self.mix = weight(HIDDEN, HIDDEN)
        self.gate = weight(EXPERTS, HIDDEN)
        every = weight(EXPERTS, HIDDEN, HIDDEN)
        self.up = nn.Parameter(every.detach()[first : first + local].clone())
        self.pause_s = pause_s

    def attention(self, x: torch.Tensor) -> Any:
        h = Pause.apply(x + torch.tanh(x @ self.mix.T), self.pause_s)
        score = torch.softmax(h @ self.gate.T, -1)
        weight, expert = score.topk(TOP, dim=-1)
        return h, self.wire(h), expert, weight

    def wire(self, h: torch.Tensor) -> torch.Tensor:
        """As tokens travel."""
        return h if isinstance(self.exchange, LocalExchange) else h.bfloat16()

    def experts(self, routed: Routed) -> torch.Tensor:
        rows = Pause.apply(routed.rows.float(), self.pause_s)
        out = torch.zeros_like(rows)
        for number, matrix in enumerate(self.up):
            share = (routed.weight * (routed.expert == number)).sum(-1, keepdim=True)
            out = out + share * torch.tanh(rows @ matrix.T)
        return out.to(routed.rows.dtype)


class LocalExchange:
    """All experts are here; every message takes a while, in a thread that records it."""

    def __init__(self, pause_s: float) -> None:
        self.pause_s = pause_s

    def _later(self, value: Any) -> Callable[[], Any]:
        def travel() -> None:
            with trace.span("wire", "communication"):
                time.sleep(self.pause_s)

        thread = threading.Thread(target=travel)
        thread.start()

        def wait() -> Any:
            thread.join()
            return value

        return wait

    def dispatch(self, tokens: Any, expert: Any, weight: Any) -> Any:
        return self._later(Routed(tokens, expert, weight, None))

    def combine(self, rows: Any, handle: Any) -> Any:
        return self._later(rows)

    def combine_backward(self, grad: Any, handle: Any) -> Any:
        return self._later(grad)

    def dispatch_backward(self, grad: Any, weight_grad: Any, handle: Any) -> Any:
        return self._later((grad, weight_grad))


def plain(layers: list[Layer], x: torch.Tensor) -> torch.Tensor:
    """The layers in one graph, without any exchange."""
    for layer in layers:
        residual, tokens, expert, weight = layer.attention(x)
        x = layer.merge(residual, layer.experts(Routed(tokens, expert, weight, None)))
    return x


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    shape = (CHUNKS * ROWS, HIDDEN)
    return torch.randn(shape, generator=random), torch.randn(shape, generator=random)


def truth(layers: list[Layer], seeds: list[int]) -> list[list[torch.Tensor]]:
    for seed in seeds:
        x, y = batch(seed)
        for part, label in zip(x.chunk(CHUNKS), y.chunk(CHUNKS), strict=True):
            nn.functional.mse_loss(plain(layers, part), label).backward()
    return [[p.grad for p in layer.parameters()] for layer in layers]


def alone(rank: int, size: int) -> tuple[float, float]:
    """DualPipeV on one rank, messages that take 10 ms, compute of 40 ms: error and overlap."""
    set_p2p_tensor_shapes([(ROWS, HIDDEN)])
    set_p2p_tensor_dtype(torch.float32)
    exchange = LocalExchange(0.010)
    layers = [Layer(n, exchange, 0, EXPERTS, 0.040) for n in range(2)]
    pipe = DualPipeV((layers[0], layers[1]))
    x, y = batch(0)
    trace.start()
    pipe.step(x, num_chunks=CHUNKS, criterion=nn.functional.mse_loss, labels=[y])
    events = trace.stop()
    wanted = truth([Layer(n, exchange, 0, EXPERTS, 0.0) for n in range(2)], [0])
    error = max(
        float((p.grad - w).abs().max())
        for layer, grads in zip(layers, wanted, strict=True)
        for p, w in zip(layer.parameters(), grads, strict=True)
    )
    return error, overlap(events)


def overlap(events: list[trace.Event]) -> float:
    """The share of communication under compute, in overlapped actions alone."""
    pairs = [e for e in events if e.args.get("kind") == "FB"]
    inside = [
        {"ph": "X", "cat": e.category, "name": e.name, "ts": e.start_ns / 1e3,
         "dur": e.duration_ns / 1e3, "pid": 0, "tid": e.track or e.thread}
        for e in events
        if any(p.start_ns <= e.start_ns <= p.start_ns + p.duration_ns for p in pairs)
    ]  # fmt: skip
    found = trace.summarize(inside)
    assert found.communication_us > 0
    return found.overlap_ratio


def two_ranks(rank: int, size: int) -> tuple[float, float, set[str]]:
    """Two expert-parallel ranks, each a whole pipeline; experts over both through ep.Buffer.

    Gives error, overlap and what moved, with compute of 20 ms a part.
    """
    from whalefall.ep import Buffer

    own = [dist.new_group([r]) for r in range(size)][rank]
    local = EXPERTS // size
    buffer = Buffer(dist.group.WORLD, 1 << 24, 0, explicitly_destroy=True)
    exchange = BufferExchange(buffer, EXPERTS)
    set_p2p_tensor_shapes([(ROWS, HIDDEN)])
    set_p2p_tensor_dtype(torch.float32)
    layers = [Layer(n, exchange, rank * local, local, 0.020) for n in range(2)]
    pipe = DualPipeV((layers[0], layers[1]), process_group=own)
    x, y = batch(rank)
    with torch.no_grad():  # compiles what moves tokens
        pipe.step(x, num_chunks=CHUNKS)
    trace.start()
    pipe.step(x, num_chunks=CHUNKS, criterion=nn.functional.mse_loss, labels=[y])
    events = trace.stop()
    moved = {e.name for e in events if e.category == "communication"}
    whole = [Layer(n, LocalExchange(0), 0, EXPERTS, 0.0) for n in range(2)]
    wanted = truth(whole, list(range(size)))
    mine = slice(rank * local, (rank + 1) * local)
    error = 0.0
    for layer, grads in zip(layers, wanted, strict=True):
        # experts saw the tokens of both ranks
        expert_grad = grads[2][mine]
        difference = (layer.up.grad - expert_grad).norm() / expert_grad.norm()
        error = max(error, float(difference))
    buffer.destroy()
    return error, overlap(events), moved


def sends(rank: int, size: int) -> tuple[list[float], float]:
    """Real messages of 16 MB under compute of 100 ms: milliseconds they took, share hidden."""
    set_p2p_tensor_shapes([(1 << 22,)])
    set_p2p_tensor_dtype(torch.float32)
    pipe = Pipeline([Slow()], "zb1p")
    x, y = torch.ones(8 << 22), torch.ones(8 << 22)
    inputs, labels = ((x,) if rank == 0 else ()), ([y] if rank else [])
    pipe.step(*inputs, num_chunks=8, criterion=nn.functional.mse_loss, labels=labels)
    trace.start()
    pipe.step(*inputs, num_chunks=8, criterion=nn.functional.mse_loss, labels=labels)
    events = trace.stop()
    found = trace.summarize(
        {"ph": "X", "cat": e.category, "name": e.name, "ts": e.start_ns / 1e3,
         "dur": e.duration_ns / 1e3, "pid": 0, "tid": e.track}
        for e in events
    )  # fmt: skip
    took = [e.duration_ns / 1e6 for e in events if e.category == "communication"]
    return took, found.overlap_ratio


class Slow(nn.Module):
    """Waits, as for an accelerator, in forward, backward and for its weights."""

    def forward(self, x: torch.Tensor) -> Any:
        return SplitPause.apply(x.requires_grad_())


class SplitPause(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.1)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        time.sleep(0.1)
        WeightGradStore.put(lambda: time.sleep(0.1))
        return grad
