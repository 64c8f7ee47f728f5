"""Executors: where tasks run. `LocalExecutor` keeps processes here, `RayExecutor` uses Ray."""

from whalefall.data.executor.base import Died, Done, Executor, Outcome, Raised, Work

__all__ = ["Died", "Done", "Executor", "Outcome", "Raised", "Work"]
