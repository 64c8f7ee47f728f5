"""Pipeline room: which schedule and which cut into stages is fastest, and fits.

In: what each layer costs, ranks, chunks, a memory limit. Out: candidates, fastest first, each with
its cut, simulated step time, idle share and memory. The cut starts from the most even one and moves
layers between neighbours while the simulated step gets shorter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from whalefall.errors import ConfigError
from whalefall.pipeline.actions import Schedule, Task
from whalefall.pipeline.schedules import NAMES, make
from whalefall.pipeline.simulator import Result, Times, simulate

__all__ = ["Candidate", "Layer", "Workload", "even_cut", "plan", "uniform"]


@dataclass(frozen=True)
class Layer:
    """What one layer costs for one chunk: seconds (or any unit), bytes (or any unit).

    Attributes:
        f, b, w: forward, full backward, its weight part.
        parameters: memory of its parameters, gradients and optimizer states.
        activations: memory kept from its forward to its backward.
    """

    f: float = 1.0
    b: float = 2.0
    w: float = 1.0
    parameters: float = 0.0
    activations: float = 0.0


@dataclass(frozen=True)
class Workload:
    """A model and how it is run.

    Attributes:
        layers: in order.
        num_ranks, num_chunks: of the pipeline.
        overlapped: time of an overlapped F&B as a share of F + B; 1: nothing is gained.
        communication: time of one message.
        memory_limit: per rank; None: none.
    """

    layers: Sequence[Layer]
    num_ranks: int
    num_chunks: int
    overlapped: float = 1.0
    communication: float = 0.0
    memory_limit: float | None = None


@dataclass(frozen=True)
class Candidate:
    """A schedule with a cut, simulated.

    Attributes:
        cut: layers per stage.
        step: time of one step.
        idle: share of all ranks' time in which nothing runs.
        memory: of the fullest rank.
        fits: whether that is within the limit.
        result: the simulated step.
    """

    schedule: Schedule
    cut: tuple[int, ...]
    step: float
    idle: float
    memory: float
    fits: bool
    result: Result = field(repr=False)


def uniform(num_layers: int, f: float, b: float, w: float) -> list[Layer]:
    """Layers that all cost the same."""
    return [Layer(f, b, w) for _ in range(num_layers)]


def plan(work: Workload, names: Sequence[str] = NAMES) -> list[Candidate]:
    """Simulate every schedule that these sizes allow; those that fit first, then by step time.

    Raises: ConfigError if no schedule can be made of these sizes, saying why for each.
    """
    found, refused = [], []
    for name in names:
        try:
            schedule = make(name, work.num_ranks, work.num_chunks)
            found.append(_best_cut(work, schedule))
        except ConfigError as error:
            refused.append(str(error))
    if not found:
        raise ConfigError("; ".join(refused) or "pipeline: no schedules given")
    return sorted(found, key=lambda candidate: (not candidate.fits, candidate.step))


def even_cut(costs: Sequence[float], num_stages: int) -> tuple[int, ...]:
    """Layers per stage, at least one each, so that the costliest stage is as cheap as possible.

    Raises: ConfigError for fewer layers than stages.
    """
    if len(costs) < num_stages:
        raise ConfigError(f"pipeline: {len(costs)} layers cannot make {num_stages} stages")
    total = [0.0, *accumulate(costs)]
    # best[n]: cheapest worst stage when the first n layers make s stages, and its last boundary
    best = [(total[n], 0) for n in range(len(costs) + 1)]
    history = [best]
    for stages in range(2, num_stages + 1):
        row = [(float("inf"), 0)] * (len(costs) + 1)
        for n in range(stages, len(costs) + 1):
            row[n] = min((max(best[k][0], total[n] - total[k]), k) for k in range(stages - 1, n))
        best = row
        history.append(row)
    cut, end = [], len(costs)
    for stages in range(num_stages, 0, -1):
        start = history[stages - 1][end][1] if stages > 1 else 0
        cut.append(end - start)
        end = start
    return tuple(reversed(cut))


def _best_cut(work: Workload, schedule: Schedule) -> Candidate:
    costs = [layer.f + layer.b for layer in work.layers]
    best = _evaluate(work, schedule, even_cut(costs, schedule.num_stages))
    improved = True
    while improved:
        improved = False
        for stage in range(schedule.num_stages - 1):
            for step in (1, -1):
                cut = list(best.cut)
                cut[stage] -= step
                cut[stage + 1] += step
                if min(cut) < 1:
                    continue
                other = _evaluate(work, schedule, tuple(cut))
                if (not other.fits, other.step) < (not best.fits, best.step * (1 - 1e-9)):
                    best, improved = other, True
    return best


def _evaluate(work: Workload, schedule: Schedule, cut: tuple[int, ...]) -> Candidate:
    bounds = [0, *accumulate(cut)]
    stages = [work.layers[a:b] for a, b in pairwise(bounds)]
    f, b, w, parameters, activations = (
        [sum(getattr(layer, name) for layer in stage) for stage in stages]
        for name in ("f", "b", "w", "parameters", "activations")
    )
    times = Times(
        f.__getitem__, b.__getitem__, w.__getitem__,
        lambda front, back: work.overlapped * (f[front] + b[back]), work.communication,
    )  # fmt: skip
    result = simulate(schedule, times)
    memory = max(
        sum(parameters[stage] for stage in schedule.stages_of(rank))
        + _most_held(schedule, rank, activations)
        for rank in range(schedule.num_ranks)
    )
    idle = sum(result.idle) / max(result.total * schedule.num_ranks, 1e-30)
    fits = work.memory_limit is None or memory <= work.memory_limit
    return Candidate(schedule, cut, result.total, idle, memory, fits, result)


def _most_held(schedule: Schedule, rank: int, activations: Sequence[float]) -> float:
    """The most activation memory that a rank holds at once."""
    held: set[Task] = set()
    now = most = 0.0
    for action in schedule.compute(rank):
        parts = action.parts()
        for kind, task in parts:
            if kind == "F":
                held.add(task)
                now += activations[task.stage]
        most = max(most, now)
        for kind, task in parts:
            if kind in ("B", "W") and task in held:
                held.discard(task)
                now -= activations[task.stage]
    return most
