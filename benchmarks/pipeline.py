"""Pipelines against torch.distributed.pipelining, and against our own simulator.

Same modules, same chunks, same gloo group, in turns. Idle shares are measured with stages that
sleep, since a small machine has fewer cores than ranks: they show waiting, not speed.
`whalefall bench pipeline` (`--quick`: fewer rounds).
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from whalefall import trace
from whalefall.pipeline import Action, Result, Times, make, simulate
from whalefall.pipeline.torch import (
    DualPipe,
    DualPipeV,
    Pipeline,
    WeightGradStore,
    set_p2p_tensor_dtype,
    set_p2p_tensor_shapes,
)
from whalefall.testing.benchmark import Row, save

WIDTH, ROWS, LAYERS = 256, 32, 4
# torch's ZBV has no counterpart of that name here: DualPipeV lays its stages out the same way
OURS = {"zbv": "dualpipev"}
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "whalefall.pipeline.torch"])
# Long beside what a message and two wake-ups cost (0.2-1 ms each): the idle share is a small
# difference of large numbers, and every delay on the critical path is inherited by all ranks.
F_S, I_S, W_S = 0.12, 0.12, 0.08


def stage(number: int) -> nn.Module:
    """A few layers; the same weights wherever it is made."""
    torch.manual_seed(number)
    layers: list[nn.Module] = []
    for _ in range(LAYERS):
        layers += [nn.Linear(WIDTH, WIDTH), nn.Tanh()]
    return nn.Sequential(*layers)


def batch(chunks: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1000)
    return torch.randn(chunks * ROWS, WIDTH), torch.randn(chunks * ROWS, WIDTH)


def ours(name: str, stages: list[nn.Module], rank: int, size: int, chunks: int) -> Any:
    """A step with whalefall."""
    set_p2p_tensor_shapes([(ROWS, WIDTH)])
    set_p2p_tensor_dtype(torch.float32)
    pipe = DualPipeV(tuple(stages)) if name == "dualpipev" else Pipeline(stages, name)
    x, y = batch(chunks)
    last = 0 if name == "dualpipev" else size - 1
    inputs, labels = ((x,) if rank == 0 else ()), ([y] if rank == last else [])
    return lambda: pipe.step(
        *inputs, num_chunks=chunks, criterion=nn.functional.mse_loss, labels=labels
    )


def theirs(name: str, stages: list[nn.Module], rank: int, size: int, chunks: int) -> Any:
    """A step with torch.distributed.pipelining."""
    from torch.distributed import pipelining
    from torch.distributed.pipelining import schedules

    kinds = {
        "1f1b": schedules.Schedule1F1B,
        "interleaved": schedules.ScheduleInterleaved1F1B,
        "dualpipev": schedules.ScheduleDualPipeV,
        "zbv": schedules.ScheduleZBVZeroBubble,
    }
    layout = make(OURS.get(name, name), size, chunks)
    numbers, total = layout.stages_of(rank), layout.num_stages
    x, y = batch(chunks)
    parts = [
        pipelining.PipelineStage(module, number, total, torch.device("cpu"))
        for module, number in zip(stages, numbers, strict=True)
    ]
    schedule = kinds[name](
        parts[0] if name == "1f1b" else parts, chunks, loss_fn=nn.functional.mse_loss,
        scale_grads=False,
    )  # fmt: skip
    inputs = (x,) if rank == 0 else ()
    ends = rank == (0 if layout.name == "dualpipev" else size - 1)
    more = {"target": y, "losses": []} if ends else {}
    return lambda: schedule.step(*inputs, **more)


def compare(rank: int, size: int, name: str, chunks: int, rounds: int) -> dict[str, Any]:
    """Step times in turns, and the largest difference of gradients."""
    own = OURS.get(name, name)
    numbers = make(own, size, chunks).stages_of(rank)
    models = [[stage(n) for n in numbers] for _ in range(2)]
    steps = [ours(own, models[0], rank, size, chunks), theirs(name, models[1], rank, size, chunks)]
    for step in steps:
        step()
    pairs = zip(nn.ModuleList(models[0]).parameters(), nn.ModuleList(models[1]).parameters(),
                strict=True)  # fmt: skip
    error = max(float((p.grad - q.grad).abs().max()) for p, q in pairs)
    samples: list[list[float]] = [[], []]
    for _ in range(rounds):
        for which, step in enumerate(steps):
            dist.barrier()
            begin = time.perf_counter()
            step()
            dist.barrier()
            samples[which].append(time.perf_counter() - begin)
    return {"ours": statistics.median(samples[0]), "theirs": statistics.median(samples[1]),
            "error": error}  # fmt: skip


class Sleep(torch.autograd.Function):
    """Sleeps F in forward, I in backward, W when weight gradients are due."""

    share = 1.0  # of these times; less to warm up

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        time.sleep(F_S * Sleep.share)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        time.sleep(I_S * Sleep.share)
        if WeightGradStore.enabled:
            WeightGradStore.put(lambda: time.sleep(W_S * Sleep.share))
        else:
            time.sleep(W_S * Sleep.share)
        return grad


class Sleeper(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Sleep.apply(x.requires_grad_())


def message_s(rank: int, rounds: int = 40) -> float:
    """What a message from rank 0 to rank 1 takes, from its send to the receiver's waking.

    Every rank gets the mean; the ranks' clocks are one, the machine's.
    """
    tensor, times = torch.zeros(ROWS, WIDTH), []
    for _ in range(rounds):
        if rank == 0:
            time.sleep(0.02)
            times.append(time.perf_counter())
            dist.send(tensor, 1)
        elif rank == 1:
            dist.recv(tensor, 0)
            times.append(time.perf_counter())
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, times)
    return statistics.fmean(b - a for a, b in zip(every[0], every[1], strict=True))


def idle(rank: int, size: int, name: str, chunks: int, rounds: int) -> list[dict[str, Any]]:
    """Compute time of this rank, and when it began and ended, from the trace of each round."""
    set_p2p_tensor_shapes([(ROWS, WIDTH)])
    set_p2p_tensor_dtype(torch.float32)
    held = make(name, size, chunks).stages_of(rank)
    stages = tuple(Sleeper() for _ in held)
    x, y = batch(chunks)
    if name == "dualpipe":
        pipe: Pipeline = DualPipe(stages)
        half = len(x) // 2
        inputs, labels = ((x[:half],), [y[half:]]) if rank in (0, size - 1) else ((), [])
    else:
        pipe = DualPipeV(stages) if name == "dualpipev" else Pipeline(stages, name)
        last = 0 if name == "dualpipev" else size - 1
        inputs, labels = ((x,) if rank == 0 else ()), ([y] if rank == last else [])
    found, message = [], message_s(rank)
    for number in range(rounds + 1):
        Sleep.share = 1.0 if number else 0.02  # the first warms up
        dist.barrier()
        trace.start()
        pipe.step(*inputs, num_chunks=chunks, criterion=nn.functional.mse_loss, labels=labels)
        runs = [event for event in trace.stop() if event.category == "compute"]
        one = {
            "message": message,
            "busy": sum(r.duration_ns for r in runs) / 1e9,
            "start": min(r.start_ns for r in runs) / 1e9,
            "end": max(r.start_ns + r.duration_ns for r in runs) / 1e9,
            "took": [(r.name, r.duration_ns / 1e9) for r in runs],
        }
        found.append(one)
    return found[1:]


def on_ranks(function: Any, size: int, *args: Any) -> list[Any]:
    """`function(rank, size, *args)` on each rank of a gloo group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(size):
        here, there = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=_rank, args=(there, function, rank, size, port, args))
        process.start()
        there.close()
        started.append((process, here))
    results = [pipe.recv() for _, pipe in started]
    for process, _ in started:
        process.join()
    return results


def _rank(
    out: Connection, function: Any, rank: int, size: int, port: int, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    try:
        out.send(function(rank, size, *args))
    finally:
        dist.destroy_process_group()


def against_torch(rounds: int) -> list[Row]:
    rows = []
    for name, size in (("1f1b", 2), ("1f1b", 4), ("interleaved", 2), ("dualpipev", 2), ("zbv", 2)):
        chunks = 4 * size
        what = f"{OURS.get(name, name)}, {size} ranks, {chunks} chunks of {ROWS} x {WIDTH}, step"
        peer = f"torch.distributed.pipelining {torch.__version__}"
        peer += f", {name}" if name in OURS else ""
        try:
            found = on_ranks(compare, size, name, chunks, rounds)
        except EOFError:
            rows.append(Row(what, peer, "<= theirs", None, None, "ms", None, None, "theirs fails"))
            continue
        mine, other = (max(one[who] for one in found) * 1e3 for who in ("ours", "theirs"))
        error = max(one["error"] for one in found)
        rows.append(
            Row(what, peer, "<= theirs", mine, other, "ms", other / mine,
                mine <= other and error < 1e-5, f"gradients differ by at most {error:.1e}")
        )  # fmt: skip
    return rows


def against_simulator(rounds: int) -> list[Row]:
    """Idle share of each schedule's shortest step: what the machine does beside it adds to all."""
    rows = []
    for name, size in (("1f1b", 4), ("zb1p", 4), ("dualpipe", 4), ("dualpipev", 2)):
        chunks = 2 * size + 2
        every = zip(*on_ranks(idle, size, name, chunks, rounds), strict=True)
        found = min(every, key=_span)
        total = _span(found)
        measured = 100 * (1 - sum(one["busy"] for one in found) / (size * total))
        schedule = make(name, size, chunks)
        # the simulator gets every time as measured: it is judged on waiting alone
        took = dict(pair for one in found for pair in one["took"])
        message = found[0]["message"]
        result = simulate(schedule, Measured(communication=message, took=took))
        as_planned = simulate(schedule, Times(F_S, I_S + W_S, W_S))
        wanted = _idle_share(result)
        rows.append(
            Row(f"{name}, {size} ranks, {chunks} chunks, sleeping stages, idle share", "simulator",
                "within 10 %", measured, wanted, "%", wanted / max(measured, 1e-9),
                abs(measured - wanted) <= 0.1 * wanted,
                f"step {total * 1e3:.0f} ms, simulated {result.total * 1e3:.0f}, "
                f"a message {message * 1e3:.2f}; had all slept as told "
                f"{_idle_share(as_planned):.3g} %")
        )  # fmt: skip
    return rows


@dataclass(frozen=True)
class Measured(Times):
    """Each action's own time, by its name."""

    took: Mapping[str, float] = field(default_factory=dict)

    def of(self, action: Action) -> float:
        return self.took[str(action)]


def _idle_share(result: Result) -> float:
    return 100 * sum(result.idle) / (len(result.idle) * result.total)


def _span(ranks: Sequence[dict[str, Any]]) -> float:
    """A step's time, first start to last end."""
    return max(one["end"] for one in ranks) - min(one["start"] for one in ranks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    rows = [*against_simulator(1 if args.quick else 3), *against_torch(5 if args.quick else 41)]
    save("pipeline", rows, {"torch": torch.__version__})


if __name__ == "__main__":
    main()
