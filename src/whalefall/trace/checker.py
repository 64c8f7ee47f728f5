"""Trace room: finds what is wrong with a trace: schema, unmatched begins, negative durations.

In: a trace file. Out: a `Report` of problem kinds with counts and first examples; one pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from whalefall.errors import CorruptError, LimitError
from whalefall.trace.reader import TraceFile, as_time

__all__ = ["Problem", "Report", "check"]

PHASES = frozenset("BEXiICbnesTtfMPNODSFpvRc()")
TIMED = frozenset("BEXiIC")
SHOWN = 100  # characters of a value in a report


@dataclass
class Problem:
    """One kind of fault: how often, and the first case."""

    kind: str
    count: int
    example: str


@dataclass
class Report:
    """Events read, their time range, and problems; no problems: a sound trace."""

    path: str
    events: int = 0
    problems: dict[str, Problem] = field(default_factory=dict)

    def note(self, kind: str, example: str) -> None:
        """Count a fault of `kind`; the first `example` of each is kept."""
        found = self.problems.setdefault(kind, Problem(kind, 0, example))
        found.count += 1


def check(path: str | Path) -> Report:
    """Read the whole trace and report every kind of fault in it; damage ends the reading.

    Raises: MissingError if there is no such file.
    """
    report = Report(str(path))
    open_: dict[tuple[str, str], list[dict[str, Any]]] = {}
    file = TraceFile(path)
    try:
        for event in file:
            _check_event(report, event, open_)
            report.events += 1
    except (CorruptError, LimitError) as error:
        report.note("damaged", str(error))
    if file.truncated:
        report.note("no closing bracket", f"after event {report.events}")
    if file.dropped:
        report.note("dropped", "the recorder's buffer was full; start(max_events=) enlarges it")
        report.problems["dropped"].count = file.dropped
    for kind, where in file.flaws.items():
        report.note(kind, where)
    for lane, stack in open_.items():
        for begin in stack:
            report.note("begin without end", f"{_shown(begin.get('name'))} on {'/'.join(lane)}")
    if not report.events and not report.problems:
        report.note("no events", report.path)
    return report


def _check_event(
    report: Report, event: dict[str, Any], open_: dict[tuple[str, str], list[dict[str, Any]]]
) -> None:
    where = f"event {report.events} ({_shown(event.get('name'))})"
    phase = event.get("ph")
    if not isinstance(phase, str) or phase not in PHASES:
        report.note("unknown phase", f"{where}: ph is {_shown(phase)}")
        return
    if phase in TIMED and not _is_sound(report, event, "ts", where):
        return
    if phase in "XBM" and not isinstance(event.get("name"), str):
        report.note("no name", where)
    if phase in "XBE" and ("pid" not in event or "tid" not in event):
        report.note("no lane", f"{where}: pid or tid is missing")
    if phase == "X" and _is_sound(report, event, "dur", where) and event["dur"] < 0:
        report.note("negative duration", f"{where}: dur is {_shown(event['dur'])}")
    lane = (str(event.get("pid")), str(event.get("tid")))
    if phase == "B":
        open_.setdefault(lane, []).append(event)
    elif phase == "E":
        _close(report, event, where, open_.get(lane, []))


def _close(report: Report, end: dict[str, Any], where: str, stack: list[dict[str, Any]]) -> None:
    if not stack:
        report.note("end without begin", where)
        return
    begin = stack.pop()
    if end.get("name") not in (None, begin.get("name")):
        report.note("begin and end differ", f"{where} ends {_shown(begin.get('name'))}")
    if end["ts"] < begin["ts"]:
        report.note("negative duration", f"{where} ends before it begins")


def _is_sound(report: Report, event: dict[str, Any], key: str, where: str) -> bool:
    """Whether `key` holds a number that a time can be; a fault where not."""
    value, what = event.get(key), "time" if key == "ts" else "duration"
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        report.note(f"no {what}", f"{where}: {key} is {_shown(value)}")
    elif as_time(value) is None:
        report.note(
            f"{what} out of range",
            f"{where}: {key} is {_shown(value)}; wanted microseconds within ±1e18",
        )
    else:
        return True
    return False


def _shown(value: Any) -> str:
    """A value as Python writes it, cut where it would fill the screen."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}… ({len(text)} characters)"
