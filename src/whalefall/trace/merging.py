"""Trace room: several processes' traces as one, on one clock.

In: trace files (ours or the PyTorch profiler's). Out: one file. Processes of one boot share their
monotonic clock; others are aligned by wall clock, or by offsets that `clock_offset` measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from whalefall.errors import ConfigError, CorruptError
from whalefall.trace import chrome
from whalefall.trace.ids import SPACE_BITS, as_number, ids_of, move_ids
from whalefall.trace.reader import TraceFile, args_of, as_time

__all__ = ["clock_offset", "merge"]

LATEST_NS = 10**19


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


def _last_space(file: TraceFile) -> int:
    """Read a file, its header too, which may follow the events; the last space of its ids."""
    found = (as_number(place[key]) for event in file for place, key in ids_of(event))
    spaces = ((number or 0) >> SPACE_BITS for number in found)
    return max((space for space in spaces if space < 0xFFFF), default=0)  # above: −1 and the like


def _origin_ns(file: TraceFile) -> tuple[str, int | None, int | None]:
    """A file's boot, and what its time zero is on the monotonic and on the wall clock.

    Raises: CorruptError for a header that says none of these.
    """
    ours = file.header.get("whalefall") or {}
    if not isinstance(ours, dict):
        raise CorruptError(f"trace: {file.path}: whalefall is {ours!r:.60}; wanted an object")
    boot = ours.get("boot", "")
    if not isinstance(boot, str):
        raise CorruptError(f"trace: {file.path}: whalefall.boot is {boot!r:.60}; wanted text")
    return (
        boot,
        _nanoseconds(file, "whalefall.monotonic_ns", ours.get("monotonic_ns")),
        _nanoseconds(file, "baseTimeNanoseconds", file.header.get("baseTimeNanoseconds")),
    )


def _nanoseconds(file: TraceFile, key: str, value: Any) -> int | None:
    if value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and -LATEST_NS < value < LATEST_NS):
        raise CorruptError(
            f"trace: {file.path}: {key} is {value!r:.60}; wanted nanoseconds within ±1e19"
        )
    return int(value)


def merge(
    paths: Sequence[str | Path],
    output: str | Path,
    offsets_ns: Mapping[str, int] | None = None,
) -> int:
    """Write one trace that holds all events of `paths`, times from the earliest file's zero.

    A process whose number an earlier file has is renamed; devices keep theirs, and an event's
    argument `file` tells apart those of different files (none: the first). From the second file on
    ids of flows and of asynchronous events are renamed, so that none runs from file to file.

    Args:
        paths: the files, each of one process or several.
        output: the file to write (`.gz` compresses it).
        offsets_ns: path → how far that file's clock is ahead (`clock_offset`); subtracted.
    Returns: the number of events written.
    Raises: ConfigError without files, and for a file without a clock beside one with a clock,
        unless `offsets_ns` names it; CorruptError, MissingError as the reader does, and for clocks
        that are no numbers.
    """
    if not paths:
        raise ConfigError("trace.merge: no files given")
    files = [TraceFile(path) for path in paths]
    spaces = [_last_space(file) for file in files]
    origins = [_origin_ns(file) for file in files]
    boots = {boot for boot, _, _ in origins}
    one_boot = len(boots) == 1 and all(m is not None for _, m, _ in origins) and boots != {""}
    offsets = offsets_ns or {}
    if not one_boot:
        _check_walls({str(p): w for p, (_, _, w) in zip(paths, origins, strict=True)}, offsets)
    zero = [(m if one_boot else w) or 0 for _, m, w in origins]
    ahead = [offsets.get(str(path), 0) for path in paths]
    starts = [z - a for z, a in zip(zero, ahead, strict=True)]
    shifts_us = [(start - min(starts)) / 1000 for start in starts]
    walls = [w for _, _, w in origins if w is not None]
    header: dict[str, Any] = {"baseTimeNanoseconds": min(walls)} if walls else {}
    if dropped := sum(file.dropped for file in files):
        header["whalefall"] = {"dropped": dropped}
    return chrome.write(output, _shifted(files, shifts_us, max(spaces)), header)


def _check_walls(walls: Mapping[str, int | None], offsets_ns: Mapping[str, int]) -> None:
    """ConfigError where a file has no wall clock, nor an offset, and another has one."""
    clocked = [path for path, wall in walls.items() if wall is not None]
    for path, wall in walls.items():
        if clocked and wall is None and path not in offsets_ns:
            raise ConfigError(
                f"trace.merge: {path} has no baseTimeNanoseconds, {clocked[0]} has; merge files "
                "that have, or say in offsets_ns how far its clock is ahead"
            )


def _shifted(
    files: Sequence[TraceFile], shifts_us: Sequence[float], last_space: int
) -> Iterator[dict[str, Any]]:
    taken: set[str] = set()  # pids in the merged trace
    sources: dict[tuple[int, str], int] = {}  # (file, its own file) → number in the merged trace
    for number, (file, shift) in enumerate(zip(files, shifts_us, strict=True)):
        own: dict[str, Any] = {}  # this file's pid → its pid in the merged trace
        for event in file:
            key = json.dumps(event.get("pid", 0))
            if key not in own:
                own[key] = _free(event.get("pid", 0), number, taken)
            event["pid"] = own[key]
            if (at := as_time(event.get("ts"))) is not None:
                event["ts"] = at + shift
            if number:
                move_ids(event, last_space + number)
            args = args_of(event)
            if "device" in args:  # every file counts its devices from 0
                came = number, json.dumps(args.get("file"))
                if source := sources.setdefault(came, len(sources)):
                    args["file"] = source
            yield event


def _free(pid: Any, number: int, taken: set[str]) -> Any:
    """`pid`, or a name after it and its file, that no process has yet; it is taken then."""
    name, n = pid, number
    while (key := json.dumps(name)) in taken:
        name, n = f"{pid} (file {n})", n + 1
    taken.add(key)
    return name
