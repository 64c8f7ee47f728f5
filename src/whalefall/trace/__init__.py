"""Trace: what ran when, over all ranks, and how much communication hid behind compute.

Follows DeepSeek's profile-data: `span` records in any process, `merge` joins ranks, `summarize`
reads our own traces and the PyTorch profiler's. A bottom layer: every room may record into it.
"""

from __future__ import annotations

from typing import Any

from whalefall.trace.recorder import (
    Event,
    instant,
    is_recording,
    record,
    save,
    span,
    start,
    stop,
)

__all__ = [
    "Event",
    "instant",
    "is_recording",
    "record",
    "save",
    "span",
    "start",
    "stop",
]
_LATER: dict[str, str] = {}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        from importlib import import_module

        return getattr(import_module(f"whalefall.trace.{_LATER[name]}"), name)
    raise AttributeError(f"module 'whalefall.trace' has no attribute {name!r}")
