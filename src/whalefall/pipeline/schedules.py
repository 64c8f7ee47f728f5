"""Pipeline room: complete schedules by name, and what theory says of them.

In: a name, ranks, chunks. Out: a `Schedule` with every message in place; bubble, activations and
parameters by formula. Source: DeepSeek's DualPipe, its table; see `orders` for each order's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from whalefall.errors import ConfigError
from whalefall.pipeline.actions import Action, Schedule, Task
from whalefall.pipeline.orders import dual, interleaved, one_f_one_b, zero_bubble

__all__ = ["NAMES", "Theory", "forward_only", "make", "theory"]

NAMES = ("1f1b", "zb1p", "interleaved", "dualpipe", "dualpipev")


def make(
    name: str, num_ranks: int, num_chunks: int, *, stages_per_rank: int = 2, prefetch: int = 2
) -> Schedule:
    """A schedule of one training step.

    Args:
        name: one of `NAMES`.
        num_ranks: devices; even for DualPipe.
        num_chunks: micro-batches, both directions together; DualPipe: even, at least 2 a rank;
            DualPipeV: at least 2 a rank; interleaved: a multiple of the ranks.
        stages_per_rank: for "interleaved".
        prefetch: how many compute actions ahead of its use a receive is begun.
    Raises: ConfigError naming what the schedule cannot do.
    """
    if name not in NAMES:
        raise ConfigError(f"pipeline: no schedule {name!r}; there are {', '.join(NAMES)}")
    _check(name, num_ranks, num_chunks, stages_per_rank)
    ranks = range(num_ranks)
    routes: tuple[tuple[int, ...], ...]
    if name == "dualpipe":
        routes = (tuple(ranks), tuple(reversed(ranks)))
        orders = [_dualpipe(rank, num_ranks, num_chunks // 2) for rank in ranks]
    elif name == "dualpipev":
        routes = ((*ranks, *reversed(ranks)),)
        orders = [_dualpipev(rank, num_ranks, num_chunks) for rank in ranks]
    elif name == "interleaved":
        routes = (tuple(ranks) * stages_per_rank,)
        orders = [interleaved(rank, num_ranks, num_chunks, stages_per_rank) for rank in ranks]
    else:
        routes = (tuple(ranks),)
        order = one_f_one_b if name == "1f1b" else zero_bubble
        orders = [order(rank, num_ranks, num_chunks) for rank in ranks]
    bare = Schedule(name, len(routes[0]), num_chunks, routes, tuple(map(tuple, orders)))
    return _connected(bare, prefetch)


def _check(name: str, ranks: int, chunks: int, stages_per_rank: int) -> None:
    if ranks < 1 or chunks < 1:
        raise ConfigError(
            f"pipeline: {name} with {ranks} ranks and {chunks} chunks; give 1 or more"
        )
    if name == "dualpipe" and ranks % 2:
        raise ConfigError(f"pipeline: dualpipe needs an even number of ranks, not {ranks}")
    if name == "dualpipe" and chunks % 2:
        raise ConfigError(f"pipeline: dualpipe needs an even number of chunks, not {chunks}")
    if name in ("dualpipe", "dualpipev") and chunks < 2 * ranks:
        raise ConfigError(
            f"pipeline: {name} on {ranks} ranks needs at least {2 * ranks} chunks, not {chunks}"
        )
    if name == "interleaved" and (chunks % ranks or stages_per_rank < 1):
        raise ConfigError(
            f"pipeline: interleaved on {ranks} ranks needs a multiple of {ranks} chunks and at "
            f"least 1 stage a rank, not {chunks} and {stages_per_rank}"
        )


def _dualpipe(rank: int, ranks: int, per_direction: int) -> list[Action]:
    """Direction 0 enters at rank 0, direction 1 at the last; a rank's phase 0 is the nearer one."""

    def down(chunk: int) -> Task:
        return Task(rank, chunk)

    def up(chunk: int) -> Task:
        return Task(ranks - 1 - rank, per_direction + chunk)

    distance = min(rank, ranks - 1 - rank)
    phases: tuple[Callable[[int], Task], ...] = (down, up) if rank < ranks // 2 else (up, down)
    return dual(distance, ranks // 2, per_direction, phases, distance == ranks // 2 - 1)


def _dualpipev(rank: int, ranks: int, chunks: int) -> list[Action]:
    """Phase 0 goes down the ranks, phase 1 back up: stages r and 2·ranks − 1 − r."""

    def down(chunk: int) -> Task:
        return Task(rank, chunk)

    def back(chunk: int) -> Task:
        return Task(2 * ranks - 1 - rank, chunk)

    return dual(rank, ranks, chunks, (down, back), rank == ranks - 1)


def needs(schedule: Schedule, kind: str, task: Task) -> tuple[str, Task, int] | None:
    """The message a computation consumes: kind, its task, and the rank it comes from.

    None where the input is the user's, the loss, or already on this rank.
    """
    if kind == "F" and task.stage > 0:
        source = schedule.rank_of(Task(task.stage - 1, task.chunk))
    elif kind in ("B", "I") and task.stage < schedule.num_stages - 1:
        source = schedule.rank_of(Task(task.stage + 1, task.chunk))
    else:
        return None
    if source == schedule.rank_of(task):
        return None
    return ("RECV_F" if kind == "F" else "RECV_B"), task, source


def gives(schedule: Schedule, kind: str, task: Task) -> tuple[str, Task, int] | None:
    """The message a computation produces: kind, the task that consumes it, and its rank."""
    if kind == "F" and task.stage < schedule.num_stages - 1:
        target = Task(task.stage + 1, task.chunk)
    elif kind in ("B", "I") and task.stage > 0:
        target = Task(task.stage - 1, task.chunk)
    else:
        return None
    peer = schedule.rank_of(target)
    if peer == schedule.rank_of(task):
        return None
    return ("SEND_F" if kind == "F" else "SEND_B"), target, peer


def _connected(bare: Schedule, prefetch: int) -> Schedule:
    """Put the messages of each rank's computations around them."""
    ranks = tuple(tuple(_connect(bare, order, prefetch)) for order in bare.ranks)
    return Schedule(bare.name, bare.num_stages, bare.num_chunks, bare.routes, ranks)


def _connect(schedule: Schedule, order: Sequence[Action], prefetch: int) -> list[Action]:
    receives = [
        [Action(kind, task, "begin", peer) for kind, task, peer in _messages(needs, schedule, a)]
        for a in order
    ]
    out: list[Action] = []
    begun = 0
    sends: list[Action] = []
    for n, action in enumerate(order):
        while begun < len(order) and begun <= n + prefetch:
            out += receives[begun]
            begun += 1
        out += [receive._replace(phase="wait") for receive in receives[n]]
        out.append(action)
        for kind, task, peer in _messages(gives, schedule, action):
            sends.append(Action(kind, task, "begin", peer))
            out.append(sends[-1])
    return out + [send._replace(phase="wait") for send in sends]


def _messages(
    rule: Callable[[Schedule, str, Task], tuple[str, Task, int] | None],
    schedule: Schedule, action: Action,
) -> list[tuple[str, Task, int]]:  # fmt: skip
    found = (rule(schedule, kind, task) for kind, task in action.parts())
    return [message for message in found if message is not None]


def forward_only(schedule: Schedule, prefetch: int = 2) -> Schedule:
    """The same order without backwards, for inference."""
    ranks = []
    for rank in range(schedule.num_ranks):
        forwards = [
            Action("F", task)
            for action in schedule.compute(rank)
            for kind, task in action.parts()
            if kind == "F"
        ]
        ranks.append(tuple(forwards))
    bare = Schedule(
        schedule.name, schedule.num_stages, schedule.num_chunks, schedule.routes, tuple(ranks)
    )
    return _connected(bare, prefetch)


@dataclass(frozen=True)
class Theory:
    """What the original's table says of a schedule over `num_stages` stages (PP).

    Attributes:
        bubble: idle time of a rank, in the unit of the times given.
        activations: most chunk activations a rank holds, counted per stage it passes.
        parameters: how many stages' parameters a rank holds.
        devices: ranks.
    """

    bubble: float
    activations: int
    parameters: int
    devices: int


def theory(name: str, num_stages: int, f: float, b: float, w: float, fb: float) -> Theory:
    """The original's table: PP stages; times of F, full B, its part W, and overlapped F&B.

    Raises: ConfigError for a schedule that is not in the table.
    """
    pp = num_stages
    rows = {
        "1f1b": ((pp - 1) * (f + b), pp, 1, pp),
        "zb1p": ((pp - 1) * (f + b - 2 * w), pp, 1, pp),
        "dualpipe": ((pp / 2 - 1) * (fb + b - 3 * w), pp + 1, 2, pp),
        "dualpipev": ((pp / 2 - 1) * (fb + b - 3 * w), pp + 1, 2, pp // 2),
    }
    if name not in rows:
        raise ConfigError(f"pipeline: no formula for {name!r}; there are {', '.join(rows)}")
    return Theory(*rows[name])
