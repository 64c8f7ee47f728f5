"""Data room: lazy data frames over DuckDB and files, and a task graph that runs them.

In: Parquet, CSV, JSON, FFRecord files; Arrow tables; pandas frames; SQL and Python functions.
Out: the same, in partitions. No service: a job is a script. A frame is a node of a logical plan; an
optimiser fuses the steps within a partition into one DuckDB query; a planner makes tasks, which
processes of this host (or Ray) run, each of which may die without harm.
Follows smallpond, whose names and arguments these are; `sort`, `group_by`, `join`, `distinct`,
`sql` go beyond it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from whalefall.data.frame import DataFrame
    from whalefall.data.session import Session, init

__all__ = ["DataFrame", "Session", "init"]

_HOMES = {"init": "session", "Session": "session", "DataFrame": "frame"}


def __getattr__(name: str) -> Any:
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(f"whalefall.data.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'whalefall.data' has no attribute {name!r}")
