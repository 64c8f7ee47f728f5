"""Trace room: the Chrome trace format, written.

In: a recorder's session, or events as dictionaries. Out: a `.json` or `.json.gz` that
chrome://tracing, Perfetto and PyTorch-profiler tools read. A file appears whole or not at all.
Source: "Trace Event Format" (Google); the header fields are those of the PyTorch profiler.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec

from whalefall.writing import whole_file

if TYPE_CHECKING:
    from whalefall.trace.recorder import Event, Session

__all__ = ["session_events", "write", "write_session"]

# A lane with its own name gets a thread number above those of the threads.
FIRST_TRACK = 1000


def boot_id() -> str:
    """Names this boot of this host: traces with the same one share their monotonic clock."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def write(path: str | Path, events: Iterable[dict[str, Any]], header: dict[str, Any]) -> int:
    """Stream `events` to `path`; returns their number.

    Args:
        path: the file; `.gz` compresses it.
        events: Chrome trace events, times in microseconds.
        header: further top-level keys, e.g. `distributedInfo`.
    """
    path = Path(path)
    with whole_file(path) as raw:
        if path.suffix != ".gz":
            return _write_events(raw, events, header)
        with gzip.GzipFile("", "wb", 6, raw, 0) as packed:
            return _write_events(packed, events, header)


def _write_events(
    file: BinaryIO | gzip.GzipFile, events: Iterable[dict[str, Any]], header: dict[str, Any]
) -> int:
    encoder = msgspec.json.Encoder(enc_hook=str)
    keys = {"schemaVersion": 1, "displayTimeUnit": "ms", **header}
    # with spaces, as the profiler writes it: some readers search the header as text
    file.write(json.dumps(keys, default=str)[:-1].encode() + b',\n"traceEvents": [')
    count = 0
    for event in events:
        try:
            line = encoder.encode(event)
        except UnicodeEncodeError:  # half of a pair of surrogates: only as an escape
            line = json.dumps(event, default=str).encode()
        file.write((b",\n" if count else b"\n") + line)
        count += 1
    file.write(b"\n]}\n")
    return count


def write_session(session: Session, path: Path) -> None:
    """Write a recorder's session with the clocks that `merge` aligns it by."""
    header = {
        "baseTimeNanoseconds": session.wall_ns,
        "whalefall": {
            "boot": boot_id(),
            "monotonic_ns": session.monotonic_ns,
            "dropped": session.dropped,
        },
    }
    if session.rank is not None:
        header["distributedInfo"] = {"backend": "whalefall", "rank": session.rank}
    write(path, session_events(session), header)


def session_events(session: Session) -> Iterator[dict[str, Any]]:
    """A session as Chrome trace events: names of process and lanes first, times from its start."""
    pid = os.getpid() if session.rank is None else session.rank
    events = session.events  # once: other threads may be recording
    lanes = _lanes(events)
    yield _named("process_name", pid, 0, session.name)
    if session.rank is not None:
        yield {
            "ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0,
            "args": {"sort_index": session.rank},
        }  # fmt: skip
    for (thread, track), tid in lanes.items():
        yield _named(
            "thread_name", pid, tid, track or session.thread_names.get(thread, f"thread {tid}")
        )
    for event in events:
        tid = lanes[(0, event.track) if event.track else (event.thread, "")]
        yield _chrome(event, pid, tid, session.monotonic_ns)


def _lanes(events: Iterable[Event]) -> dict[tuple[int, str], int]:
    """(thread, "") or (0, track) → number of its lane, in the order of appearance."""
    lanes: dict[tuple[int, str], int] = {}
    threads, tracks = 0, FIRST_TRACK
    for event in events:
        key = (0, event.track) if event.track else (event.thread, "")
        if key not in lanes:
            lanes[key] = tracks if event.track else threads
            tracks, threads = tracks + bool(event.track), threads + (not event.track)
    return lanes


def _named(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}


def _chrome(event: Event, pid: int, tid: int, origin_ns: int) -> dict[str, Any]:
    out: dict[str, Any] = {
        "ph": "X", "cat": event.category or "span", "name": event.name, "pid": pid, "tid": tid,
        "ts": (event.start_ns - origin_ns) / 1000,
    }  # fmt: skip
    if event.duration_ns < 0:
        out |= {"ph": "i", "s": "t"}
    else:
        out["dur"] = event.duration_ns / 1000
    args = dict(event.args)
    if event.category in ("compute", "communication"):
        # the keys by which PyTorch-profiler tools know a kernel of a device's stream
        args = {"device": pid, "stream": tid, **args}
    if args:
        out["args"] = args
    return out
