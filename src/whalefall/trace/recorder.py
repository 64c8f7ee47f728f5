"""Trace room: records what ran when, in any process, for next to nothing.

In: `with span(name, category=…)` around work, anywhere. Out: events in memory, and with
`stop(path)` or `save(path)` a Chrome trace file. Not started, a span is one call that returns a
shared object.
Times are `CLOCK_MONOTONIC` nanoseconds, which all processes of one host share.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from whalefall import env
from whalefall.arguments import whole
from whalefall.errors import ConfigError

__all__ = ["Event", "instant", "is_recording", "record", "save", "span", "start", "stop"]


_now = time.perf_counter_ns
_thread = threading.get_ident


class Event(NamedTuple):
    """One thing that happened: `duration_ns` is −1 for an instant."""

    name: str
    category: str
    start_ns: int
    duration_ns: int
    thread: int
    track: str
    args: dict[str, Any]


class Session:
    """What one `start` … `stop` recorded, and the clocks at its beginning."""

    def __init__(self, name: str, rank: int | None, max_events: int) -> None:
        self.name = name
        self.rank = rank
        self.max_events = max_events
        self.kept: list[tuple[Any, ...]] = []
        self.dropped = 0
        self.monotonic_ns = time.perf_counter_ns()
        self.wall_ns = time.time_ns()
        self.thread_names: dict[int, str] = {}

    @property
    def events(self) -> list[Event]:
        """The kept events, in the order in which they ended."""
        return [Event(*fields) for fields in self.kept]

    def add(self, event: Event) -> None:
        """Keep `event`, or count it as dropped where the buffer is full (list.append is atomic)."""
        if len(self.kept) < self.max_events:
            self.kept.append(event)
        else:
            self.dropped += 1


_session: Session | None = None


class _Nothing:
    """The span of a process that does not record."""

    __slots__ = ()

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *_: object) -> None:
        return None


_NOTHING = _Nothing()


class _Span:
    """A running span: times the block it is used with."""

    __slots__ = ("args", "category", "name", "session", "start_ns", "track")

    def __init__(
        self, session: Session, name: str, category: str, track: str, args: dict[str, Any]
    ) -> None:
        self.session = session
        self.name = name
        self.category = category
        self.track = track
        self.args = args
        self.start_ns = 0

    def __enter__(self) -> _Span:
        self.start_ns = _now()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        took = _now() - self.start_ns
        session = self.session
        kept = session.kept
        if len(kept) < session.max_events:
            kept.append(
                # a plain tuple: an Event costs three times as much, and is made at the end
                (
                    self.name,
                    self.category,
                    self.start_ns,
                    took,
                    _thread(),
                    self.track,
                    self.args,
                )
            )
        else:
            session.dropped += 1


def span(name: str, category: str = "", track: str = "", **args: Any) -> _Span | _Nothing:
    """A context manager that records its block as one event.

    Args:
        name: what runs, e.g. "dispatch".
        category: "compute" or "communication" take part in the overlap; any other text is shown.
        track: the lane it is drawn in; by default the thread's own.
        **args: shown beside the event, JSON types.
    """
    session = _session
    if session is None:
        return _NOTHING
    return _Span(session, name, category, track, args)


def instant(name: str, category: str = "", track: str = "", **args: Any) -> None:
    """Record that something happened now, without a duration."""
    if _session is not None:
        now = time.perf_counter_ns()
        _session.add(Event(name, category, now, -1, threading.get_ident(), track, args))


def record(
    name: str, start_ns: int, end_ns: int, category: str = "", track: str = "", **args: Any
) -> None:
    """Record work timed elsewhere (a native thread), in `time.perf_counter_ns` nanoseconds."""
    if _session is not None:
        took = max(0, end_ns - start_ns)
        _session.add(Event(name, category, start_ns, took, threading.get_ident(), track, args))


def is_recording() -> bool:
    """Whether `start` was called and `stop` not yet."""
    return _session is not None


def start(name: str = "", *, rank: int | None = None, max_events: int = 1_000_000) -> None:
    """Begin to record in this process.

    Args:
        name: of the process, as the trace shows it (default: whalefall and its pid).
        rank: of the process in its group; becomes the trace's process number.
        max_events: a bound on memory; later events are counted as dropped, not kept.
    Raises: ConfigError if this process records already, or `max_events` is below 1.
    """
    global _session
    if _session is not None:
        raise ConfigError("trace.start: this process records already; call trace.stop() first")
    whole("trace.start: max_events", max_events, 1)
    _session = Session(name or f"whalefall {os.getpid()}", rank, max_events)


def stop(path: str | Path | None = None) -> list[Event]:
    """End the recording; write it to `path` (Chrome trace JSON, gzip for `.gz`) where one is given.

    Raises: ConfigError if this process does not record; OSError if `path` cannot be written: the
        recording goes on then, so that nothing is lost.
    """
    global _session
    session = _current("stop")
    _session = None
    try:
        if path is not None:
            _write(session, Path(path))
    except BaseException as error:
        if _session is None:  # else another recording has begun
            _session = session
        if isinstance(error, OSError) and error.errno is not None:
            why = (
                f"{error.strerror}; the recording goes on, stop it with a path that can be written"
            )
            raise OSError(error.errno, why, error.filename or str(path)) from None
        raise
    return session.events


def save(path: str | Path) -> None:
    """Write what was recorded so far to `path`, and go on recording."""
    _write(_current("save"), Path(path))


def _current(where: str) -> Session:
    if _session is None:
        raise ConfigError(f"trace.{where}: nothing is being recorded; call trace.start() first")
    return _session


def _write(session: Session, path: Path) -> None:
    from whalefall.trace.chrome import write_session

    session.thread_names = {t.ident: t.name for t in threading.enumerate() if t.ident is not None}
    write_session(session, path)


def _forget_in_child() -> None:
    """A forked child starts without its parent's events."""
    global _session
    if _session is not None:
        _session = Session(f"whalefall {os.getpid()}", _session.rank, _session.max_events)


def _save_at_exit() -> None:
    if _session is not None:
        folder = Path(env.get("WHALEFALL_TRACE"))
        folder.mkdir(parents=True, exist_ok=True)
        stop(folder / f"trace-{os.getpid()}.json.gz")


os.register_at_fork(after_in_child=_forget_in_child)
if env.get("WHALEFALL_TRACE"):
    start()
    atexit.register(_save_at_exit)
