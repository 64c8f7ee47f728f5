"""Tasks on a Ray cluster: the way to many machines. Needs `whalefall[ray]`, and a `data_root` that
all hosts share. Ray places the tasks; retries stay the scheduler's.
"""

from __future__ import annotations

import pickle
import time
from typing import Any

from whalefall.data.executor.base import (
    Died,
    Done,
    Executor,
    Outcome,
    Raised,
    Work,
    pack,
    perform,
    portable_error,
)
from whalefall.errors import MissingError

__all__ = ["RayExecutor"]


def serve(data: bytes) -> tuple[Any, ...]:
    """Run one attempt inside a Ray worker; the answer as the local worker gives it."""
    begin = time.perf_counter()
    try:
        outputs = perform(pickle.loads(data))
        return ("done", outputs, time.perf_counter() - begin)
    except BaseException as error:  # SystemExit too: code that exits will exit again
        return ("raised", *portable_error(error))


class RayExecutor(Executor):
    """Runs tasks on the cluster at `address`.

    Args:
        address: as `ray.init` takes it; "local" starts a cluster of this host. A connection that
            this process has already is used, and left open.
        local_slots: cores of this host, where the cluster does not say.
    Raises: MissingError without Ray.
    """

    def __init__(self, address: str, local_slots: int) -> None:
        try:
            import ray
        except ImportError:
            raise MissingError(
                "ray_address: Ray is not installed; pip install 'whalefall[ray]'"
            ) from None
        self._ray = ray
        self._owned = not ray.is_initialized()
        if self._owned:
            ray.init(
                address=address, log_to_driver=False,
                **({"include_dashboard": False} if address == "local" else {}),
            )  # fmt: skip
        self.slots = max(1, int(ray.cluster_resources().get("CPU", local_slots)))
        self._call = ray.remote(max_retries=0)(serve)
        self._running: dict[Any, str] = {}

    def start(self, work: Work) -> None:
        cpus = max(1, min(int(work.task.cpu_limit), self.slots))
        name = work.task.label
        reference = self._call.options(num_cpus=cpus, name=name).remote(pack(work))
        self._running[reference] = work.task.key

    def wait(self, timeout_s: float) -> list[Outcome]:
        ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=timeout_s)
        return [self._outcome(reference) for reference in ready]

    def _outcome(self, reference: Any) -> Outcome:
        key = self._running.pop(reference)
        try:
            kind, *rest = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            return Died(key, f"{type(error).__name__}: {str(error).splitlines()[0]}", "ray")
        if kind == "done":
            return Done(key, rest[0], rest[1], "ray")
        return Raised(key, rest[0], rest[1], "ray")

    def cancel(self) -> None:
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running.clear()

    def close(self) -> None:
        self.cancel()
        if self._owned:
            self._ray.shutdown()
