"""Trace room: what a trace says: busy streams, top kernels, overlap, gaps, steps.

In: a trace file, or events. Out: a `Summary`, whose `as_dict` is the command's JSON. One pass;
memory holds names and idle gaps, not events. Overlap: the share of communication time during which
a compute kernel runs on the same device; in merged traces, the same device of the same file.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from whalefall.trace.intervals import Collector, gaps, intersection_length, length, union
from whalefall.trace.reader import TraceFile, args_of, as_time
from whalefall.trace.rules import DEVICE, Rules

__all__ = ["Kernel", "Overlap", "Stream", "Summary", "completed", "summarize"]

_STEP = re.compile(r"^(ProfilerStep#|step\b)", re.IGNORECASE)
TOP_GAPS = 10


@dataclass(frozen=True)
class Stream:
    """One lane: its process and thread (or device and stream), and how busy it is."""

    id: str
    kernels: int
    busy_us: float
    span_us: float


@dataclass(frozen=True)
class Kernel:
    """All events of one name."""

    name: str
    kind: str
    count: int
    total_us: float


@dataclass(frozen=True)
class Overlap:
    """Compute and communication of one device, as covered time.

    Attributes:
        device: its number; of several merged files' devices of that number, with the file.
    """

    device: str
    compute_us: float
    communication_us: float
    overlapped_us: float


@dataclass(frozen=True)
class Gap:
    """A time in which a lane was idle between two events; `start_us` from the trace's beginning."""

    stream: str
    start_us: float
    duration_us: float


@dataclass
class Summary:
    """A trace in numbers; times in microseconds, summed over devices.

    Attributes:
        dropped: events that the recorder's buffer had no room for, missing in all other numbers.
    """

    streams: list[Stream] = field(default_factory=list)
    compute_us: float = 0.0
    communication_us: float = 0.0
    overlapped_us: float = 0.0
    overlap_ratio: float = 0.0
    kernels: list[Kernel] = field(default_factory=list)
    span_us: float = 0.0
    devices: list[Overlap] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    steps: dict[str, dict[str, float]] = field(default_factory=dict)
    dropped: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, as `whalefall trace summary --json` prints them."""
        return asdict(self)


Device = tuple[str, str]  # its number, and of which merged file


class _Lanes:
    """What is gathered of one class of events: those on devices, or those on host threads."""

    def __init__(self) -> None:
        self.spans: dict[str, Collector] = {}
        self.counts: dict[str, int] = {}
        self.kinds: dict[tuple[Device, str], Collector] = {}
        self.names: dict[tuple[str, str], list[float]] = {}

    def add(
        self, lane: str, device: Device, kind: str, name: str, start: float, took: float
    ) -> None:
        if lane not in self.spans:
            self.spans[lane], self.counts[lane] = Collector(), 0
        self.spans[lane].add(start, start + took)
        self.counts[lane] += 1
        if kind != "other":
            self.kinds.setdefault((device, kind), Collector()).add(start, start + took)
        total = self.names.setdefault((name, kind), [0, 0.0])
        total[0] += 1
        total[1] += took


def completed(events: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Events with a duration: complete ones, and begin and end joined into one.

    `ts` and `dur` of what comes are numbers, `dur` not negative; events without a time, or that end
    before they begin, are left out (`check` reports them).
    """
    open_: dict[tuple[str, str], list[tuple[float, dict[str, Any]]]] = {}
    for event in events:
        phase = event.get("ph")
        if phase not in ("X", "B", "E"):
            continue
        at = as_time(event.get("ts"))
        if at is None:
            continue
        if phase == "X":
            took = as_time(event.get("dur", 0.0))
            if took is not None and took >= 0:
                sound = event["ts"] is at and event.get("dur") is took  # no copy where none is due
                yield event if sound else {**event, "ts": at, "dur": took}
            continue
        stack = open_.setdefault((str(event.get("pid")), str(event.get("tid"))), [])
        if phase == "B":
            stack.append((at, event))
        elif stack:
            began, begin = stack.pop()
            if at >= began:
                yield {**begin, "ph": "X", "ts": began, "dur": at - began}


def summarize(source: str | Path | Iterable[dict[str, Any]], rules: Rules | None = None) -> Summary:
    """Read a trace once and say what ran.

    Args:
        source: a trace file, or its events.
        rules: what counts as compute and communication; `rules.DEFAULT` if None.
    Returns: the summary of the device's streams where there are device events, else of host
        threads' events.
    Raises: CorruptError, MissingError as the reader does.
    """
    rules = rules or Rules()
    events = TraceFile(source) if isinstance(source, (str, Path)) else source
    device, host = _Lanes(), _Lanes()
    steps: dict[str, list[float]] = {}
    for event in completed(events):
        name, category = str(event.get("name", "")), str(event.get("cat", ""))
        start, took = event["ts"], event["dur"]
        if name[:1] in "PSs" and _STEP.match(name):
            steps.setdefault(re.sub(r"\d+$", "", name), []).append(took)
            continue
        lane = f"{event.get('pid')}/{event.get('tid')}"
        kind = rules.kind(category, name)
        if category in DEVICE:
            device.add(lane, _device(event), kind, name, start, took)
        elif category in ("compute", "communication", "cpu_op"):
            host.add(lane, _device(event), kind, name, start, took)
    found = _conclude(device if device.spans else host, steps)
    if isinstance(events, TraceFile):
        found.dropped = events.dropped
    return found


def _device(event: dict[str, Any]) -> Device:
    args = args_of(event)
    return str(args.get("device", event.get("pid"))), str(args.get("file", ""))


def _conclude(lanes: _Lanes, steps: dict[str, list[float]]) -> Summary:
    out = Summary()
    origin, end = np.inf, -np.inf
    for collector in lanes.spans.values():
        starts, ends = collector.spans()
        if len(starts):
            origin, end = min(origin, float(starts[0])), max(end, float(ends[-1]))
    out.span_us = max(0.0, end - origin) if lanes.spans else 0.0
    idle: list[Gap] = []
    for lane, collector in lanes.spans.items():
        spans = collector.spans()
        reach = float(spans[1][-1] - spans[0][0]) if len(spans[0]) else 0.0
        out.streams.append(Stream(lane, lanes.counts[lane], length(spans), reach))
        starts, ends = gaps(spans)
        for n in np.argsort(starts - ends, kind="stable")[:TOP_GAPS]:
            idle.append(Gap(lane, float(starts[n] - origin), float(ends[n] - starts[n])))
    out.streams.sort(key=lambda s: -s.busy_us)
    out.gaps = sorted(idle, key=lambda gap: -gap.duration_us)[:TOP_GAPS]
    out.devices = _overlaps(lanes)
    out.compute_us = sum(d.compute_us for d in out.devices)
    out.communication_us = sum(d.communication_us for d in out.devices)
    out.overlapped_us = sum(d.overlapped_us for d in out.devices)
    if out.communication_us > 0:
        out.overlap_ratio = out.overlapped_us / out.communication_us
    out.kernels = sorted(
        (Kernel(name, kind, int(n), us) for (name, kind), (n, us) in lanes.names.items()),
        key=lambda kernel: -kernel.total_us,
    )
    for name, took in steps.items():
        out.steps[name] = {
            "count": len(took),
            "mean_us": statistics.fmean(took),
            "min_us": min(took),
            "max_us": max(took),
        }
    return out


def _overlaps(lanes: _Lanes) -> list[Overlap]:
    nothing = union(np.empty(0), np.empty(0))
    devices = {device for device, _ in lanes.kinds}
    files_of = Counter(number for number, _ in devices)
    out = []
    for device in sorted(devices):
        spans = [
            lanes.kinds[device, kind].spans() if (device, kind) in lanes.kinds else nothing
            for kind in ("compute", "communication")
        ]
        shared = intersection_length(*spans)
        number, file = device
        name = f"{number} (file {file or 0})" if files_of[number] > 1 else number
        out.append(Overlap(name, length(spans[0]), length(spans[1]), shared))
    return out
