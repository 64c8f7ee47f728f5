"""Trace: what ran when, over all ranks, and how much communication hid behind compute.

Follows DeepSeek's profile-data: `span` records in any process, `merge` joins ranks, `summarize`
reads our own traces and the PyTorch profiler's. A bottom layer: every room may record into it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from whalefall.trace.checker import check
    from whalefall.trace.cutting import cut
    from whalefall.trace.merging import clock_offset, merge
    from whalefall.trace.page import write_page
    from whalefall.trace.reader import TraceFile
    from whalefall.trace.rules import Rules
    from whalefall.trace.summary import Summary, summarize

__all__ = [
    "Event",
    "Rules",
    "Summary",
    "TraceFile",
    "check",
    "clock_offset",
    "cut",
    "instant",
    "is_recording",
    "merge",
    "record",
    "save",
    "span",
    "start",
    "stop",
    "summarize",
    "write_page",
]
# read on demand: a process that only records needs neither numpy nor the reader
_LATER = {
    "Rules": "rules",
    "Summary": "summary",
    "TraceFile": "reader",
    "check": "checker",
    "clock_offset": "merging",
    "cut": "cutting",
    "merge": "merging",
    "summarize": "summary",
    "write_page": "page",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        from importlib import import_module

        return getattr(import_module(f"whalefall.trace.{_LATER[name]}"), name)
    raise AttributeError(f"module 'whalefall.trace' has no attribute {name!r}")
