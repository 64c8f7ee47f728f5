"""Which task starts when: a state machine without IO, clock or threads.

In: what happened to running tasks. Out: what to start next, or that the job has failed. Tasks start
in the plan's order as slots allow; the first that waits is never overtaken, so a wide one is not
starved. A task whose process died runs again, up to `max_retries` times; an error of the user's
ends the job.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from whalefall.data.constants import DEFAULT_MAX_RETRY_COUNT

__all__ = ["GiveUp", "Scheduler", "Start", "broken_invariants"]


@dataclass(frozen=True)
class Start:
    """Run a task; `attempt` counts from 0."""

    key: str
    attempt: int


@dataclass(frozen=True)
class GiveUp:
    """The job has failed because of this task."""

    key: str
    reason: str


@dataclass
class Scheduler:
    """The state of one run.

    Args:
        order: the tasks' keys, inputs first.
        inputs: key → keys of the tasks that must finish before; those not in `order` have.
        cpus: key → slots that it takes; more than there are count as all.
        slots: how many there are.
    """

    order: Sequence[str]
    inputs: Mapping[str, Sequence[str]]
    cpus: Mapping[str, int]
    slots: int
    max_retries: int = DEFAULT_MAX_RETRY_COUNT
    running: dict[str, int] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    deaths: dict[str, int] = field(default_factory=dict)
    failed: GiveUp | None = None

    def __post_init__(self) -> None:
        self._rank = {key: index for index, key in enumerate(self.order)}
        self._waiting: dict[str, int] = {}
        self._readers: dict[str, list[str]] = {}
        self._ready: list[int] = []
        for key in self.order:
            needed = {k for k in self.inputs[key] if k in self._rank}
            self._waiting[key] = len(needed)
            for other in needed:
                self._readers.setdefault(other, []).append(key)
            if not needed:
                heapq.heappush(self._ready, self._rank[key])

    def width(self, key: str) -> int:
        """Slots that a task takes."""
        return max(1, min(self.cpus[key], self.slots))

    @property
    def free(self) -> int:
        """Slots that no task has."""
        return self.slots - sum(self.width(key) for key in self.running)

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self.failed is not None or len(self.done) == len(self.order)

    def starts(self) -> list[Start]:
        """Take the tasks that can start now; they count as running from here on."""
        made: list[Start] = []
        free = self.free
        while self._ready and self.failed is None:
            key = self.order[self._ready[0]]
            if self.width(key) > free:
                break
            heapq.heappop(self._ready)
            attempt = self.deaths.get(key, 0)
            self.running[key] = attempt
            free -= self.width(key)
            made.append(Start(key, attempt))
        return made

    def succeeded(self, key: str) -> None:
        """A running task has finished."""
        del self.running[key]
        self.done.add(key)
        for reader in self._readers.get(key, ()):
            self._waiting[reader] -= 1
            if self._waiting[reader] == 0:
                heapq.heappush(self._ready, self._rank[reader])

    def died(self, key: str, reason: str) -> None:
        """A running task's process is gone: run it again, or give up."""
        del self.running[key]
        self.deaths[key] = self.deaths.get(key, 0) + 1
        if self.deaths[key] > self.max_retries:
            self.failed = GiveUp(key, f"failed {self.deaths[key]} times: {reason}")
        else:
            heapq.heappush(self._ready, self._rank[key])

    def raised(self, key: str, reason: str) -> None:
        """A running task's own code failed: that is final."""
        del self.running[key]
        self.failed = GiveUp(key, reason)


def broken_invariants(state: Scheduler) -> list[str]:
    """What is wrong with a state; empty where all is well."""
    wrong = []
    if state.free < 0:
        wrong.append(f"{-state.free} slots too many in use")
    if state.done & set(state.running):
        wrong.append("a finished task is running")
    for key in [*state.running, *state.done]:
        missing = [k for k in state.inputs[key] if k in state._rank and k not in state.done]
        if missing:
            wrong.append(f"{key} started before {missing[0]} finished")
    if not state.finished and not state.running and not state._ready:
        wrong.append("nothing runs and nothing is ready, yet the job has not ended")
    return wrong
