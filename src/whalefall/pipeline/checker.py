"""Pipeline room: proves that a schedule can be run as it stands.

In: a schedule. Out: what is wrong with it, in words; an empty list is a proof of: every chunk
passes every stage once each way, inputs are there before they are used, every message has both
ends, no deadlock, and no more activations than stated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from whalefall.pipeline.actions import Schedule, Task
from whalefall.pipeline.schedules import gives, needs
from whalefall.pipeline.simulator import simulate

__all__ = ["check"]


def check(schedule: Schedule, max_activations: int | None = None) -> list[str]:
    """Everything that is wrong with a schedule; empty if it is sound.

    Args:
        schedule: a training step, or a forward-only one.
        max_activations: most chunk activations a rank may hold; None: not checked.
    """
    problems = [*_once_each(schedule), *_in_order(schedule), *_both_ends(schedule)]
    result = simulate(schedule)
    for rank, action in enumerate(result.stuck):
        if action is not None:
            problems.append(f"deadlock: rank {rank} never gets past {action}")
    if max_activations is not None:
        for rank, live in enumerate(result.live):
            if live > max_activations:
                problems.append(f"rank {rank} holds {live} activations, {max_activations} allowed")
    return problems


def _once_each(schedule: Schedule) -> Iterator[str]:
    """Every task has one forward and one backward (or I and W), on its own rank."""
    seen: Counter[tuple[str, Task]] = Counter()
    training = False
    for rank in range(schedule.num_ranks):
        for action in schedule.compute(rank):
            for kind, task in action.parts():
                seen[kind, task] += 1
                training |= kind != "F"
                inside = task.stage < schedule.num_stages and task.chunk < schedule.num_chunks
                if not inside or schedule.rank_of(task) != rank:
                    yield f"rank {rank} runs {action}, which is not its own"
    for chunk in range(schedule.num_chunks):
        for stage in range(schedule.num_stages):
            task = Task(stage, chunk)
            f, b, i, w = (seen[kind, task] for kind in "FBIW")
            if f != 1:
                yield f"chunk {chunk} passes stage {stage} forward {f} times"
            if training and (b + i != 1 or i != w):
                yield f"chunk {chunk} at stage {stage}: B {b}, I {i}, W {w} times"


def _in_order(schedule: Schedule) -> Iterator[str]:
    """On its rank, each computation comes after what it needs."""
    last = schedule.num_stages - 1
    for rank in range(schedule.num_ranks):
        done: set[tuple[str, Task]] = set()
        for action in schedule.ranks[rank]:
            if action.phase == "wait":
                done.add((action.kind, action.task))
            if not action.is_compute:
                continue
            for kind, task in action.parts():
                for wanted in _inputs(schedule, kind, task, last):
                    if not any(option in done for option in wanted):
                        yield f"rank {rank}: {action} comes before {wanted[0][0]} of {wanted[0][1]}"
            done.update(action.parts())


def _inputs(
    schedule: Schedule, kind: str, task: Task, last: int
) -> Iterator[tuple[tuple[str, Task], ...]]:
    """What must be done before a computation; each entry a choice of equivalents."""
    message = needs(schedule, kind, task)
    if message is not None:
        yield ((message[0], task),)
    elif kind == "F" and task.stage > 0:
        yield (("F", Task(task.stage - 1, task.chunk)),)
    elif kind in ("B", "I") and task.stage < last:
        after = Task(task.stage + 1, task.chunk)
        yield (("B", after), ("I", after))
    if kind in ("B", "I"):
        yield (("F", task),)
    if kind == "W":
        yield (("I", task),)


def _both_ends(schedule: Schedule) -> Iterator[str]:
    """Every message is begun once by sender and receiver, waited for by both, and wanted."""
    ends: Counter[tuple[str, str, Task, int, int]] = Counter()
    wanted: Counter[tuple[str, Task, int, int]] = Counter()
    for rank in range(schedule.num_ranks):
        made: set[tuple[str, Task]] = set()
        begun: set[tuple[str, Task]] = set()
        for action in schedule.ranks[rank]:
            if action.is_compute:
                for kind, task in action.parts():
                    message = gives(schedule, kind, task)
                    if message is not None:
                        made.add(message[:2])
                        wanted[message[0][-1], message[1], rank, message[2]] += 1
                continue
            sender = action.kind.startswith("SEND")
            source, target = (rank, action.peer) if sender else (action.peer, rank)
            end = f"{action.phase} {action.kind[:4]}"
            ends[end, action.kind[-1], action.task, source, target] += 1
            if sender and action.phase == "begin" and (action.kind, action.task) not in made:
                yield f"rank {rank}: {action} before its tensor is computed"
            if action.phase == "begin":
                begun.add((action.kind, action.task))
            elif (action.kind, action.task) not in begun:
                yield f"rank {rank}: {action} was never begun"
    messages = {key[1:] for key in ends} | set(wanted)
    for way, task, source, target in sorted(messages):
        counts = [
            ends[end, way, task, source, target]
            for end in ("begin SEND", "wait SEND", "begin RECV", "wait RECV")
        ]
        if [wanted[way, task, source, target], *counts] != [1] * 5:
            what = "activation" if way == "F" else "gradient"
            yield (
                f"{what} for chunk {task.chunk}, stage {task.stage}, rank {source} to {target}: "
                f"wanted {wanted[way, task, source, target]}, sent {counts[0]}, send awaited "
                f"{counts[1]}, receive begun {counts[2]}, awaited {counts[3]} times"
            )
