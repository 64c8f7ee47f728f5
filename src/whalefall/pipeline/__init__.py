"""Pipeline: layers over ranks, chunks over time, so that nobody waits.

Follows DeepSeek's DualPipe. Schedules are data (`make`), checked (`check`), simulated (`simulate`)
and run by one executor (`execute`), all without torch; `DualPipe` and `DualPipeV` train torch
modules with them, and the inference system's dual-batch overlap is one of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from whalefall.pipeline.actions import Action, Schedule, Task
from whalefall.pipeline.checker import check
from whalefall.pipeline.executor import Worker, execute
from whalefall.pipeline.overlap import decode_overlap, prefill_overlap
from whalefall.pipeline.schedules import Theory, forward_only, make, theory
from whalefall.pipeline.simulator import Result, Times, simulate

if TYPE_CHECKING:
    from whalefall.pipeline.torch import (
        DualPipe,
        DualPipeV,
        Pipeline,
        WeightGradStore,
        set_p2p_tensor_dtype,
        set_p2p_tensor_shapes,
        sync_mirrors,
    )

_TORCH = (
    "DualPipe",
    "DualPipeV",
    "Pipeline",
    "WeightGradStore",
    "set_p2p_tensor_dtype",
    "set_p2p_tensor_shapes",
    "sync_mirrors",
)
__all__ = [
    "Action",
    "DualPipe",
    "DualPipeV",
    "Pipeline",
    "Result",
    "Schedule",
    "Task",
    "Theory",
    "Times",
    "WeightGradStore",
    "Worker",
    "check",
    "decode_overlap",
    "execute",
    "forward_only",
    "make",
    "prefill_overlap",
    "set_p2p_tensor_dtype",
    "set_p2p_tensor_shapes",
    "simulate",
    "sync_mirrors",
    "theory",
]


def __getattr__(name: str) -> Any:
    if name in _TORCH:
        from importlib import import_module

        return getattr(import_module("whalefall.pipeline.torch"), name)
    raise AttributeError(f"module 'whalefall.pipeline' has no attribute {name!r}")
