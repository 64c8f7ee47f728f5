"""What ranks do in the pipeline tests, and the single process that says what is right."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from whalefall import pipeline
from whalefall.pipeline.torch import (
    DualPipe,
    DualPipeV,
    Pipeline,
    WeightGradStore,
    set_p2p_tensor_dtype,
    set_p2p_tensor_shapes,
    sync_mirrors,
)
from whalefall.pipeline.torch.worker import StepWorker

ROWS, WIDTH = 3, 8


class DelayedLinear(torch.autograd.Function):
    """x W^T whose weight gradient can be put aside."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        x, weight = ctx.saved_tensors

        def weight_grad() -> torch.Tensor:
            return grad.flatten(0, -2).T @ x.flatten(0, -2)

        def later() -> None:
            now = weight_grad()
            weight.grad = now if weight.grad is None else weight.grad + now

        if WeightGradStore.enabled:
            WeightGradStore.put(later)
            return grad @ weight, None
        return grad @ weight, weight_grad()


class Stage(nn.Module):
    """Two layers; its weight depends on the stage number alone."""

    def __init__(self, stage: int, dtype: torch.dtype) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(100 + stage)
        self.first = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=random).to(dtype) / 3)
        self.second = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=random).to(dtype) / 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + DelayedLinear.apply(torch.tanh(DelayedLinear.apply(x, self.first)), self.second)


class HookedStage(Stage):
    """The same with the overlap hook; counts its calls."""

    calls = 0

    @classmethod
    def overlapped_forward_backward(
        cls, module0: nn.Module, inputs0: list, criterion0: Any, labels0: list,
        module1: nn.Module, loss1: Any, outputs1: list, output_grads1: list,
    ) -> tuple[list, Any]:  # fmt: skip
        HookedStage.calls += 1
        outputs0 = [module0(*inputs0)]
        loss0 = None if criterion0 is None else criterion0(*outputs0, *labels0)
        if loss1 is not None:
            loss1.backward()
        else:
            torch.autograd.backward(outputs1, output_grads1)
        return outputs0, loss0


def criterion(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return ((output - label) ** 2).mean()


def data(chunks: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(7)
    shape = (chunks * ROWS, 2, WIDTH)
    return torch.randn(shape, generator=random).to(dtype), torch.randn(shape, generator=random).to(
        dtype
    )


def truth(stages: int, chunks: int, dtype: torch.dtype) -> tuple[list, torch.Tensor, torch.Tensor]:
    """Gradients of every stage, losses and outputs, computed in one process."""
    modules = [Stage(stage, dtype) for stage in range(stages)]
    x, y = data(chunks, dtype)
    losses, outputs = [], []
    for part, label in zip(x.chunk(chunks), y.chunk(chunks), strict=True):
        for module in modules:
            part = module(part)
        loss = criterion(part, label)
        loss.backward()
        losses.append(loss.detach())
        outputs.append(part.detach())
    grads = [[p.grad for p in module.parameters()] for module in modules]
    return grads, torch.stack(losses), torch.cat(outputs)


def build(name: str, stage_type: type, rank: int, size: int, chunks: int, dtype: Any,
          **options: Any) -> Pipeline:  # fmt: skip
    schedule = pipeline.make(name, size, chunks)
    place = options.get("rank_mapping", list(range(size)))[rank]
    modules = [stage_type(stage, dtype) for stage in schedule.stages_of(place)]
    set_p2p_tensor_shapes([(ROWS, 2, WIDTH)])
    set_p2p_tensor_dtype(dtype)
    if name == "dualpipe":
        return DualPipe(tuple(modules), **options)
    if name == "dualpipev":
        return DualPipeV(tuple(modules), **options)
    return Pipeline(modules, name, **options)


def feed(name: str, rank: int, size: int, chunks: int, dtype: Any) -> tuple[tuple, list]:
    """This rank's inputs and labels: for DualPipe each end's half, the labels crossed."""
    x, y = data(chunks, dtype)
    if name == "dualpipe":
        half = len(x) // 2
        if rank == 0:
            return (x[:half],), [y[half:]]
        return ((x[half:],), [y[:half]]) if rank == size - 1 else ((), [])
    first = (x,) if rank == 0 else ()
    ends_here = rank == (0 if name == "dualpipev" else size - 1)
    return first, [y] if ends_here else []


def count_live() -> list[int]:
    """Most chunk activations held at once, from here on: graphs, and weight gradients put aside."""
    most, original = [0], StepWorker._keep

    def keep(self: StepWorker, *arguments: Any) -> None:
        original(self, *arguments)
        held = len(self.edges) + len(self.live_loss) + len(WeightGradStore.funcs_queue)
        most[0] = max(most[0], held)

    StepWorker._keep = keep  # type: ignore[method-assign]
    return most


def largest_error(rank: int, size: int, name: str, chunks: int, dtype_name: str,
                  hooked: bool = False, mapping: list | None = None) -> dict:  # fmt: skip
    """Run a step and compare everything this rank has with the single process."""
    dtype = getattr(torch, dtype_name)
    options = {} if mapping is None else {"rank_mapping": mapping}
    HookedStage.calls = 0
    pipe = build(name, HookedStage if hooked else Stage, rank, size, chunks, dtype, **options)
    schedule = pipe.schedule(chunks)
    inputs, labels = feed(name, pipe.rank, size, chunks, dtype)
    live = count_live()
    loss, outputs = pipe.step(
        *inputs, num_chunks=chunks, criterion=criterion, labels=labels, return_outputs=True
    )
    if name == "dualpipe":
        sync_mirrors(pipe)
    grads, losses, whole = truth(schedule.num_stages, chunks, dtype)
    error = 0.0
    for stage, module in zip(schedule.stages_of(pipe.rank), pipe.module, strict=True):
        for mine, wanted in zip(module.parameters(), grads[stage], strict=True):
            error = max(error, float((mine.grad - wanted).abs().max()))
    found = {"grad": error, "calls": HookedStage.calls, "loss": None, "output": None}
    found["live"] = (live[0], pipeline.simulate(schedule).live[pipe.rank])
    if loss is not None:
        share = slice(None)
        if name == "dualpipe":
            share = slice(chunks // 2, None) if pipe.rank == 0 else slice(0, chunks // 2)
        found["loss"] = float((loss - losses[share]).abs().max())
        rows = slice(None) if share.start is None and share.stop is None else slice(
            (share.start or 0) * ROWS, None if share.stop is None else share.stop * ROWS
        )  # fmt: skip
        found["output"] = float((outputs - whole[rows]).abs().max())
    return found


def inference(rank: int, size: int, name: str, chunks: int) -> float | None:
    """Outputs without gradients, against the single process."""
    pipe = build(name, Stage, rank, size, chunks, torch.float64)
    inputs, _ = feed(name, rank, size, chunks, torch.float64)
    with torch.no_grad():
        loss, outputs = pipe.step(*inputs, num_chunks=chunks, return_outputs=True)
    assert loss is None
    assert all(p.grad is None for p in pipe.parameters())
    if outputs is None:
        return None
    _, _, whole = truth(pipe.schedule(chunks).num_stages, chunks, torch.float64)
    half = len(whole) // 2
    parts = {0: whole[half:], size - 1: whole[:half]} if name == "dualpipe" else {rank: whole}
    return float((outputs - parts[rank]).abs().max())


def in_subgroup(rank: int, size: int) -> dict | None:
    """A pipeline over ranks 2 and 1 of three; the third takes no part."""
    group = dist.new_group([1, 2])
    if rank == 0:
        return None
    dtype, chunks = torch.float64, 4
    place = dist.get_rank(group)
    pipe = build("dualpipev", Stage, place, 2, chunks, dtype, process_group=group,
                 rank_mapping=[1, 0])  # fmt: skip
    inputs, labels = feed("dualpipev", pipe.rank, 2, chunks, dtype)
    pipe.step(*inputs, num_chunks=chunks, criterion=criterion, labels=labels)
    grads, _, _ = truth(4, chunks, dtype)
    error = 0.0
    for stage, module in zip(pipe.schedule(chunks).stages_of(pipe.rank), pipe.module, strict=True):
        for mine, wanted in zip(module.parameters(), grads[stage], strict=True):
            error = max(error, float((mine.grad - wanted).abs().max()))
    return {"grad": error, "rank": pipe.rank}


def refuses(rank: int, size: int) -> list[str]:
    """What a single rank's DualPipeV says to bad input."""
    set_p2p_tensor_shapes([(ROWS, 2, WIDTH)])
    set_p2p_tensor_dtype(torch.float64)
    stages = (Stage(0, torch.float64), Stage(1, torch.float64))
    pipe = DualPipeV(stages)
    x, y = data(2, torch.float64)
    said = []
    for call in (
        lambda: DualPipe(stages),
        lambda: pipe.step(x, num_chunks=1, criterion=criterion, labels=[y]),
        lambda: pipe.step(x, num_chunks=4, criterion=criterion, labels=[y]),
        lambda: pipe.step(x, num_chunks=2, labels=[y]),
        lambda: DualPipeV(stages, rank_mapping=[3]),
        lambda: WeightGradStore.pop(),
        lambda: Pipeline(stages, "1f1b").step(x, num_chunks=2, criterion=criterion, labels=[y]),
    ):
        try:
            call()
            said.append("nothing")
        except pipeline_errors() as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def wrong_shape(rank: int, size: int) -> str:
    """Both ranks declare a shape that their stages do not produce."""
    pipe = build("dualpipev", Stage, rank, size, 4, torch.float64)
    set_p2p_tensor_shapes([(ROWS, 2, WIDTH + 1)])
    inputs, labels = feed("dualpipev", rank, size, 4, torch.float64)
    try:
        pipe.step(*inputs, num_chunks=4, criterion=criterion, labels=labels)
    except pipeline_errors() as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def survivor(rank: int, size: int) -> str | None:
    """Rank 1 dies in the middle of a step; the others say who."""
    pipe = build("1f1b", Stage, rank, size, 6, torch.float64)
    inputs, labels = feed("1f1b", rank, size, 6, torch.float64)
    if rank == 1:
        calls = []

        def die(*_: Any) -> None:
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        pipe.module[0].register_forward_pre_hook(die)
    try:
        pipe.step(*inputs, num_chunks=6, criterion=criterion, labels=labels)
    except pipeline_errors() as error:
        return f"{type(error).__name__} of {getattr(error, 'rank', None)}: {error}"
    return "nothing"


def pipeline_errors() -> type[Exception]:
    from whalefall.errors import WhalefallError

    return WhalefallError
