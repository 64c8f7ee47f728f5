"""Trace room: a part of a trace, by time.

In: a trace file and two times. Out: a file with the events that reach into that part, whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from whalefall.errors import ConfigError
from whalefall.trace import chrome
from whalefall.trace.reader import TraceFile, as_time

__all__ = ["cut"]

HEADER = ("distributedInfo", "baseTimeNanoseconds", "whalefall", "deviceProperties")


def cut(path: str | Path, output: str | Path, from_us: float, to_us: float) -> int:
    """Write the part of a trace between two times, counted from its first timed event.

    Events that reach into the part are kept whole, begin and end together; names of processes and
    lanes stay.

    Returns: the number of events written.
    Raises: ConfigError if the part is empty.
    """
    if not from_us < to_us:
        raise ConfigError(f"trace.cut: from {from_us} to {to_us} us holds nothing")
    file = TraceFile(path)
    times = (as_time(e.get("ts")) for e in file if e.get("ph") in ("X", "B", "i", "I"))
    first = min((at for at in times if at is not None), default=0.0)
    header = {key: file.header[key] for key in HEADER if _is_json(file.header.get(key))}
    return chrome.write(output, _kept(file, first + from_us, first + to_us), header)


def _is_json(value: Any) -> bool:
    """Whether it is there and strict JSON can say it, which knows no NaN."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return value is not None


def _kept(events: Iterable[dict[str, Any]], start: float, end: float) -> Iterator[dict[str, Any]]:
    """The events that reach from `start` on and begin before `end`."""
    lanes: dict[tuple[str, str], list[_Open]] = {}
    for event in events:
        phase, at = event.get("ph"), as_time(event.get("ts"))
        if phase in ("B", "E") and at is not None:
            stack = lanes.setdefault((str(event.get("pid")), str(event.get("tid"))), [])
            if phase == "B":
                stack.append(_Open(event, at < end))
            if at >= start:  # all that is open reaches into the part
                yield from _begun(stack)
            if phase == "B":
                continue
            if stack:
                if stack.pop().is_written:
                    yield event
                continue
        at = at or 0.0
        reach = at + (as_time(event.get("dur")) or 0.0)
        if phase == "M" or (at < end and reach >= start):
            yield event
    for stack in lanes.values():
        yield from _begun(stack)


class _Open:
    """A begin whose end has not come; `is_early`: it lies before the part's end."""

    def __init__(self, event: dict[str, Any], is_early: bool) -> None:
        self.event, self.is_early, self.is_written = event, is_early, False


def _begun(stack: list[_Open]) -> Iterator[dict[str, Any]]:
    """The begins of a lane that are open and not written yet."""
    for begin in stack:
        if begin.is_early and not begin.is_written:
            begin.is_written = True
            yield begin.event
