"""Trace room: several processes' traces as one, on one clock.

In: trace files (ours or the PyTorch profiler's). Out: one file. Processes of one boot share their
monotonic clock; others are aligned by wall clock, or by offsets that `clock_offset` measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from whalefall.errors import ConfigError
from whalefall.trace import chrome
from whalefall.trace.reader import TraceFile, as_time

__all__ = ["clock_offset", "cut", "merge"]


def clock_offset(exchanges: Sequence[tuple[int, int, int]]) -> tuple[int, int]:
    """How far another host's clock is ahead, from message exchanges.

    Args:
        exchanges: (sent here, stamped there, answer received here), nanoseconds, several.
    Returns: offset in nanoseconds, and the most it can be wrong: half the shortest round trip.
    Raises: ConfigError without exchanges.
    Source: Cristian's algorithm, as NTP uses it.
    """
    if not exchanges:
        raise ConfigError("trace.clock_offset: no exchanges; send at least one message")
    sent, there, received = min(exchanges, key=lambda e: e[2] - e[0])
    return there - (sent + received) // 2, (received - sent + 1) // 2


def _origin_ns(file: TraceFile) -> tuple[str, int | None, int | None]:
    """A file's boot, and what its time zero is on the monotonic and on the wall clock."""
    # the header may follow the events: read it all, keeping nothing
    for _ in file:
        pass
    ours = file.header.get("whalefall") or {}
    wall = file.header.get("baseTimeNanoseconds")
    return str(ours.get("boot", "")), ours.get("monotonic_ns"), wall


def merge(
    paths: Sequence[str | Path],
    output: str | Path,
    offsets_ns: Mapping[str, int] | None = None,
) -> int:
    """Write one trace that holds all events of `paths`, times from the earliest file's zero.

    Args:
        paths: the files, each of one process or several.
        output: the file to write (`.gz` compresses it).
        offsets_ns: path → how far that file's clock is ahead (`clock_offset`); subtracted.
    Returns: the number of events written.
    Raises: ConfigError without files; CorruptError, MissingError as the reader does.
    """
    if not paths:
        raise ConfigError("trace.merge: no files given")
    files = [TraceFile(path) for path in paths]
    origins = [_origin_ns(file) for file in files]
    boots = {boot for boot, _, _ in origins}
    one_boot = len(boots) == 1 and all(m is not None for _, m, _ in origins) and boots != {""}
    zero = [(m if one_boot else w) or 0 for _, m, w in origins]
    ahead = [(offsets_ns or {}).get(str(path), 0) for path in paths]
    starts = [z - a for z, a in zip(zero, ahead, strict=True)]
    shifts_us = [(start - min(starts)) / 1000 for start in starts]
    header: dict[str, Any] = {"baseTimeNanoseconds": min((w or 0) for _, _, w in origins)}
    return chrome.write(output, _shifted(files, shifts_us), header)


def _shifted(files: Sequence[TraceFile], shifts_us: Sequence[float]) -> Iterator[dict[str, Any]]:
    taken: set[str] = set()
    for number, (file, shift) in enumerate(zip(files, shifts_us, strict=True)):
        own: dict[str, Any] = {}  # this file's pid → its pid in the merged trace
        for event in file:
            pid = event.get("pid", 0)
            key = json.dumps(pid)
            if key not in own:
                own[key] = f"{pid} (file {number})" if key in taken else pid
            event["pid"] = own[key]
            if (at := as_time(event.get("ts"))) is not None:
                event["ts"] = at + shift
            yield event
        taken.update(own)


def cut(path: str | Path, output: str | Path, from_us: float, to_us: float) -> int:
    """Write the part of a trace between two times, counted from its first timed event.

    Events that reach into the part are kept whole; names of processes and lanes stay.

    Returns: the number of events written.
    Raises: ConfigError if the part is empty.
    """
    if not from_us < to_us:
        raise ConfigError(f"trace.cut: from {from_us} to {to_us} us holds nothing")
    file = TraceFile(path)
    times = (as_time(e.get("ts")) for e in file if e.get("ph") in ("X", "B", "i", "I"))
    first = min((at for at in times if at is not None), default=0.0)

    def kept() -> Iterator[dict[str, Any]]:
        for event in file:
            start = (as_time(event.get("ts")) or 0.0) - first
            inside = start < to_us and start + (as_time(event.get("dur")) or 0.0) >= from_us
            if event.get("ph") == "M" or inside:
                yield event

    keys = ("distributedInfo", "baseTimeNanoseconds", "whalefall", "deviceProperties")
    return chrome.write(output, kept(), {k: file.header[k] for k in keys if k in file.header})
