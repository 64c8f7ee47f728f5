"""File-system room: procedures that run in step in a simulated process, as `driver.drive_all` runs
them in a real one: a round ends when everything that was asked for in it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from whalefall.fs.core import effects
from whalefall.fs.core.effects import Refused, Unreachable
from whalefall.fs.core.messages import Many, ManyDone, Update

if TYPE_CHECKING:
    from whalefall.fs.simulation.process import SimProcess

__all__ = ["InStep"]


class InStep:
    """One `Together` of a process.

    Args:
        resume: gets each procedure's result or exception once all have ended.
    """

    def __init__(
        self, process: SimProcess, procedures: Sequence[Any], resume: Callable[[Any], None]
    ) -> None:
        self.process, self.life = process, process.life
        self.procedures, self.resume = procedures, resume
        self.results: list[Any] = [None] * len(procedures)
        self.outcomes: dict[int, Any] = {}
        self.waits = 0
        self._round(dict.fromkeys(range(len(procedures))))

    def _round(self, outcomes: dict[int, Any]) -> None:
        if self.life != self.process.life:
            return
        asked: dict[int, Any] = {}
        for index, outcome in outcomes.items():
            procedure, failed = self.procedures[index], isinstance(outcome, Exception)
            try:
                asked[index] = procedure.throw(outcome) if failed else procedure.send(outcome)
            except StopIteration as stop:
                self.results[index] = stop.value
            except (Refused, Unreachable) as failure:
                self.results[index] = failure
        if not asked:
            self.resume(self.results)
            return
        self.outcomes, self.waits = {}, len(asked)
        calls: dict[int, list[int]] = {}
        locks: list[int] = []
        for index, effect in asked.items():
            if isinstance(effect, effects.Acquire):
                locks.append(index)
            elif isinstance(effect, effects.Call) and isinstance(effect.message, Update):
                calls.setdefault(effect.node, []).append(index)
            else:
                self.process.perform(effect, partial(self._one, index))
        self._lock(asked, sorted(locks, key=lambda i: (asked[i].target, asked[i].chunk)))
        for group in calls.values():
            self._call(group, [asked[index] for index in group])

    def _one(self, index: int, outcome: Any) -> None:
        self.outcomes[index] = outcome
        self.waits -= 1
        if not self.waits:
            self._round(self.outcomes)

    def _lock(self, asked: dict[int, Any], left: list[int]) -> None:
        """Take one lock after the other."""
        if left and self.life == self.process.life:

            def taken(outcome: Any) -> None:
                # The last one taken may begin the next round: what is left goes first.
                self._lock(asked, left[1:])
                self._one(left[0], outcome)

            self.process.perform(asked[left[0]], taken)

    def _call(self, group: list[int], calls: list[effects.Call]) -> None:
        """The updates for one node, as one message."""
        message = Many([c.message for c in calls], [len(c.data) for c in calls])
        data = b"".join(bytes(c.data) for c in calls)

        def answered(outcome: Any) -> None:
            together = not isinstance(outcome, Exception) and isinstance(outcome[0], ManyDone)
            for place, index in enumerate(group):
                self._one(index, (outcome[0].replies[place], b"") if together else outcome)

        self.process.perform(
            effects.Call(calls[0].node, message, data, calls[0].timeout_s), answered
        )
