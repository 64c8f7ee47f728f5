"""Pipeline room: what a schedule is made of.

An `Action` is one thing a rank does: compute (forward, backward, …), or one end of a communication,
begun at one place of the list and waited for at a later one, so that compute can run between.
A `Schedule` is one list of actions per rank, and the ranks that each chunk visits. Data, no code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["COMMUNICATION", "COMPUTE", "Action", "Schedule", "Task"]

# F forward; B full backward; I its input-gradient part, W its weight-gradient part;
# FB a forward and a full backward of another chunk, overlapped
COMPUTE = ("F", "B", "I", "W", "FB")
COMMUNICATION = ("SEND_F", "RECV_F", "SEND_B", "RECV_B", "DISPATCH", "COMBINE")


class Task(NamedTuple):
    """A chunk at a stage."""

    stage: int
    chunk: int


class Action(NamedTuple):
    """One entry of a rank's list.

    Attributes:
        kind: of `COMPUTE` or `COMMUNICATION`, or a layer part of the inference schedules.
        task: the stage and chunk; for FB those of the forward. A message carries the number of the
            task that consumes it.
        phase: "run" compute, "begin" a communication without waiting, "wait" until it is done.
        peer: the other rank of a SEND or RECV, −1 else.
        second: for FB, the task of the backward.
    """

    kind: str
    task: Task
    phase: str = "run"
    peer: int = -1
    second: Task | None = None

    def __str__(self) -> str:
        text = f"{self.kind}{self.task.chunk}.{self.task.stage}"
        if self.second is not None:
            text = f"F{self.task.chunk}.{self.task.stage}&B{self.second.chunk}.{self.second.stage}"
        return text if self.phase == "run" else f"{self.phase} {text}@{self.peer}"

    @property
    def is_compute(self) -> bool:
        """Whether it occupies the rank's compute."""
        return self.phase == "run"

    def parts(self) -> tuple[tuple[str, Task], ...]:
        """The plain computations in it: FB counts as an F and a B."""
        if self.second is not None:
            return (("F", self.task), ("B", self.second))
        return ((self.kind, self.task),)


@dataclass(frozen=True)
class Schedule:
    """Every rank's actions, in order.

    Attributes:
        name: as `schedules.make` knows it.
        num_stages: stages a chunk passes, in order.
        num_chunks: micro-batches of one step, all directions together.
        routes: for each direction, the rank of each stage. The chunks are divided evenly, the first
            share on route 0.
        ranks: [rank] its actions.
    """

    name: str
    num_stages: int
    num_chunks: int
    routes: tuple[tuple[int, ...], ...]
    ranks: tuple[tuple[Action, ...], ...]

    @property
    def num_ranks(self) -> int:
        """Ranks that take part."""
        return len(self.ranks)

    def route(self, chunk: int) -> tuple[int, ...]:
        """The rank of each stage, for one chunk."""
        return self.routes[chunk * len(self.routes) // self.num_chunks]

    def rank_of(self, task: Task) -> int:
        """Where a chunk's stage runs."""
        return self.route(task.chunk)[task.stage]

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages whose parameters a rank holds, by direction, then in order."""
        held = [s for route in self.routes for s, r in enumerate(route) if r == rank]
        return tuple(dict.fromkeys(held))

    def compute(self, rank: int) -> tuple[Action, ...]:
        """A rank's compute actions alone."""
        return tuple(action for action in self.ranks[rank] if action.is_compute)
