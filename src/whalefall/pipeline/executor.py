"""Pipeline room: runs a rank's actions, whatever they are.

In: a list of actions and a worker that knows how to compute and communicate. Out: the work done, in
order, with every action in the trace. The one executor of training and inference schedules.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from whalefall import trace
from whalefall.errors import ConfigError
from whalefall.pipeline.actions import Action, Task

__all__ = ["Worker", "execute"]


class Worker(Protocol):
    """What a rank can do. Both methods see each action once."""

    def run(self, action: Action) -> Any:
        """Compute; returns when done."""

    def begin(self, action: Action) -> Callable[[], Any]:
        """Start a communication without waiting; the returned call waits until it is done.

        The call may return (start, end) in `time.perf_counter_ns`: when data moved.
        """


def execute(actions: Iterable[Action], worker: Worker) -> None:
    """Do a rank's actions in order.

    Compute is recorded under the category "compute"; a communication in a lane of its own, under
    "communication" where the worker knows when data moved. Else its time is from its beginning to
    the end of waiting for it, most of which nothing moves: the category "pipeline", which no
    overlap counts. So are actions of a worker whose parts record themselves (`records_parts`).

    Raises: ConfigError for a wait without a beginning; whatever the worker raises.
    """
    begun: dict[tuple[str, Task], tuple[Callable[[], Any], int]] = {}
    compute = "pipeline" if getattr(worker, "records_parts", False) else "compute"
    for action in actions:
        key = (action.kind, action.task)
        if action.phase == "run":
            with trace.span(str(action), compute, compute, kind=action.kind, **_numbers(action)):
                worker.run(action)
        elif action.phase == "begin":
            start = time.perf_counter_ns()
            begun[key] = worker.begin(action), start
        elif key in begun:
            wait, start = begun.pop(key)
            known = wait()
            end, category = time.perf_counter_ns(), "pipeline"
            if isinstance(known, tuple):
                (start, end), category = known, "communication"
            name = f"{action.kind}{action.task.chunk}.{action.task.stage}"
            trace.record(name, start, end, category, "communication", **_numbers(action))
        else:
            raise ConfigError(f"pipeline: {action} waits for what was never begun")


def _numbers(action: Action) -> dict[str, int]:
    return {"pipeline_stage": action.task.stage, "chunk": action.task.chunk}
