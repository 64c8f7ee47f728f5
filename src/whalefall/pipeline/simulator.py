"""Pipeline room: how long a schedule takes, without running it.

In: a schedule and times. Out: when each action runs on each rank, idle time, live activations.
A message leaves when it is begun and arrives after its time; ranks wait only where the list says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from whalefall.errors import ConfigError
from whalefall.pipeline.actions import Action, Schedule, Task

__all__ = ["Result", "Run", "Times", "simulate"]

Cost = float | Callable[[int], float]


@dataclass(frozen=True)
class Times:
    """Durations, each a number or a function of the stage.

    Attributes:
        f: forward of a chunk at a stage.
        b: full backward.
        w: its weight-gradient part; the input-gradient part is b − w.
        fb: overlapped forward and backward; a function gets both stages; None: their sum.
        communication: of one message between ranks.
        parts: of the parts of the inference schedules, compute and communication, by kind.
    """

    f: Cost = 1.0
    b: Cost = 2.0
    w: Cost = 1.0
    fb: float | Callable[[int, int], float] | None = None
    communication: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)

    def of(self, action: Action) -> float:
        """The duration of a compute action."""
        if action.kind == "FB":
            second = action.second or action.task
            if callable(self.fb):
                return self.fb(action.task.stage, second.stage)
            if self.fb is not None:
                return self.fb
            return _at(self.f, action.task) + _at(self.b, second)
        if action.kind in self.parts:
            return self.parts[action.kind]
        if action.kind == "I":
            return _at(self.b, action.task) - _at(self.w, action.task)
        costs: Mapping[str, Cost] = {"F": self.f, "B": self.b, "W": self.w}
        return _at(costs[action.kind], action.task)


def _at(cost: Cost, task: Task) -> float:
    return cost(task.stage) if callable(cost) else cost


@dataclass(frozen=True)
class Run:
    """One compute action on the clock."""

    action: Action
    start: float
    end: float


@dataclass
class Result:
    """A simulated step.

    Attributes:
        runs: [rank] its compute actions with their times.
        busy, idle: [rank] compute time, and the rest of the step.
        live: [rank] most chunk activations held at once.
        total: when the last rank ends.
        stuck: [rank] the action it could not get past, None if it ended; not None: a deadlock.
    """

    runs: list[list[Run]] = field(default_factory=list)
    live: list[int] = field(default_factory=list)
    stuck: list[Action | None] = field(default_factory=list)

    @property
    def total(self) -> float:
        return max((runs[-1].end for runs in self.runs if runs), default=0.0)

    @property
    def busy(self) -> list[float]:
        return [sum(run.end - run.start for run in runs) for runs in self.runs]

    @property
    def idle(self) -> list[float]:
        return [self.total - busy for busy in self.busy]

    @property
    def deadlock(self) -> bool:
        return any(action is not None for action in self.stuck)


class _Rank:
    """Where a rank is in its list."""

    def __init__(self, actions: tuple[Action, ...]) -> None:
        self.actions = actions
        self.place = 0
        self.now = 0.0
        self.runs: list[Run] = []
        self.held: set[Task] = set()
        self.most = 0
        self.link_free = 0.0  # when this rank's expert communication has ended
        self.ends: dict[tuple[str, Task], float] = {}

    def count(self, action: Action) -> None:
        """Activations live from a task's forward until its (last part of the) backward."""
        for kind, task in action.parts():
            if kind == "F":
                self.held.add(task)
        self.most = max(self.most, len(self.held))
        for kind, task in action.parts():
            if kind in ("B", "W"):
                self.held.discard(task)


def simulate(schedule: Schedule, times: Times | None = None) -> Result:
    """Play a schedule with given durations; a deadlock ends it and is reported, not raised.

    Raises: ConfigError for a negative duration.
    """
    times = times or Times()
    arrivals: dict[tuple[str, Task, int, int], float] = {}
    ranks = [_Rank(actions) for actions in schedule.ranks]
    moved = True
    while moved:
        moved = False
        for number, rank in enumerate(ranks):
            while rank.place < len(rank.actions):
                if not _step(number, rank, times, arrivals):
                    break
                moved = True
    stuck = [r.actions[r.place] if r.place < len(r.actions) else None for r in ranks]
    return Result([r.runs for r in ranks], [r.most for r in ranks], stuck)


def _step(
    number: int, rank: _Rank, times: Times, arrivals: dict[tuple[str, Task, int, int], float]
) -> bool:
    """Do a rank's next action; False if it must wait for a message that nobody sent yet."""
    action = rank.actions[rank.place]
    if action.phase == "run":
        took = times.of(action)
        if took < 0:
            raise ConfigError(f"pipeline: {action} takes {took}; the weight part exceeds B?")
        rank.count(action)
        rank.runs.append(Run(action, rank.now, rank.now + took))
        rank.now += took
    elif action.phase == "begin" and action.kind.startswith("SEND"):
        key = (action.kind[-1], action.task, number, action.peer)
        arrivals[key] = rank.now + times.communication
    elif action.phase == "begin" and action.kind in ("DISPATCH", "COMBINE"):
        rank.link_free = max(rank.link_free, rank.now) + times.parts.get(action.kind, 0.0)
        rank.ends[action.kind, action.task] = rank.link_free
    elif action.phase == "wait" and action.kind in ("DISPATCH", "COMBINE"):
        rank.now = max(rank.now, rank.ends[action.kind, action.task])
    elif action.phase == "wait" and action.kind.startswith("RECV"):
        key = (action.kind[-1], action.task, action.peer, number)
        if key not in arrivals:
            return False
        rank.now = max(rank.now, arrivals[key])
    rank.place += 1
    return True
