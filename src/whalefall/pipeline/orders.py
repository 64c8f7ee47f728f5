"""Pipeline room: the order in which each rank computes, schedule by schedule.

In: the rank, the number of ranks and chunks. Out: compute actions only; `schedules` adds messages.
Sources: 1F1B (PipeDream-flush); interleaved 1F1B (Megatron-LM); ZB1P (Zero Bubble, ZB-H1);
DualPipe and DualPipeV (DeepSeek-V3 report, 3.2.1, and the eight steps of the original's code).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

from whalefall.pipeline.actions import Action, Task

__all__ = ["dual", "interleaved", "one_f_one_b", "zero_bubble"]


def one_f_one_b(rank: int, ranks: int, chunks: int) -> list[Action]:
    """1F1B: as many forwards ahead as there are ranks behind, then one backward for each."""
    ahead = min(ranks - 1 - rank, chunks)
    order = [Action("F", Task(rank, c)) for c in range(ahead)]
    for c in range(chunks - ahead):
        order += [Action("F", Task(rank, ahead + c)), Action("B", Task(rank, c))]
    return order + [Action("B", Task(rank, c)) for c in range(chunks - ahead, chunks)]


def zero_bubble(rank: int, ranks: int, chunks: int) -> list[Action]:
    """ZB1P: 1F1B with the weight gradients of rank r held back r chunks, to fill the end."""
    ahead = min(ranks - 1 - rank, chunks)
    order = [Action("F", Task(rank, c)) for c in range(ahead)]
    weights = 0
    for c in range(chunks):
        if ahead + c < chunks:
            order.append(Action("F", Task(rank, ahead + c)))
        order.append(Action("I", Task(rank, c)))
        if c >= rank:
            order.append(Action("W", Task(rank, weights)))
            weights += 1
    return order + [Action("W", Task(rank, c)) for c in range(weights, chunks)]


def interleaved(rank: int, ranks: int, chunks: int, per_rank: int) -> list[Action]:
    """Interleaved 1F1B: rank r holds stages r, r + ranks, …; chunks pass in groups of `ranks`."""
    total = chunks * per_rank

    def task(step: int, forward: bool) -> Task:
        turn = step // ranks % per_rank
        depth = turn if forward else per_rank - 1 - turn
        chunk = step // (ranks * per_rank) * ranks + step % ranks
        return Task(depth * ranks + rank, chunk)

    ahead = min((ranks - rank - 1) * 2 + (per_rank - 1) * ranks, total)
    order = [Action("F", task(step, True)) for step in range(ahead)]
    for step in range(total - ahead):
        order += [Action("F", task(ahead + step, True)), Action("B", task(step, False))]
    return order + [Action("B", task(step, False)) for step in range(total - ahead, total)]


def dual(
    distance: int, half: int, chunks: int, phases: tuple[Callable[[int], Task], ...],
    keep_middle: bool,
) -> list[Action]:  # fmt: skip
    """The eight steps that DualPipe and DualPipeV share.

    Args:
        distance: of the rank from its nearer end (h); for V the rank.
        half: ranks from an end to the middle (n); for V all ranks.
        chunks: chunks of one phase.
        phases: for each phase, chunk number within it → task. Phase 0 starts nearer this rank.
        keep_middle: the first pair of step 4 is not overlapped on the innermost rank.
    """
    forward, backward = [count(), count()], [count(), count()]
    split_tasks: list[Task] = []  # whose weight gradients are due, oldest first
    weights = count()
    order: list[Action] = []

    def f(phase: int) -> None:
        order.append(Action("F", phases[phase](next(forward[phase]))))

    def b(phase: int, split: bool = False) -> None:
        task = phases[phase](next(backward[phase]))
        order.append(Action("I" if split else "B", task))
        if split:
            split_tasks.append(task)

    def fb(front: int, back: int) -> None:
        first = phases[front](next(forward[front]))
        second = phases[back](next(backward[back]))
        order.append(Action("FB", first, second=second))

    def w() -> None:
        order.append(Action("W", split_tasks[next(weights)]))

    rest = half - distance - 1
    for _ in range(2 * rest):  # 1
        f(0)
    for _ in range(distance + 1):  # 2
        f(0)
        f(1)
    for _ in range(rest):  # 3
        b(1, split=True)
        w()
        f(1)
    for n in range(chunks - 2 * half + distance + 1):  # 4
        if n == 0 and keep_middle:
            f(0)
            b(1)
        else:
            fb(0, 1)
        fb(1, 0)
    for _ in range(rest):  # 5
        b(1)
        fb(1, 0)
    for n in range(2 * (distance + 1)):  # 6: the second half is split
        b(1 - n % 2, split=n >= distance + 1)
    for _ in range(rest):  # 7
        w()
        b(0, split=True)
    for _ in range(distance + 1):  # 8
        w()
    return order
