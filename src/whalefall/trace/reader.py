"""Trace room: reads Chrome trace JSON as a stream.

In: a `.json` or `.json.gz` of any size: an object with `traceEvents`, or a bare array. Out: events
one by one; memory holds a few megabytes of text, never the file.
Source: "Trace Event Format" (Google).
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from whalefall.errors import CorruptError, LimitError, MissingError

__all__ = ["TraceFile", "args_of", "as_time"]

CHUNK = 1 << 20
LARGEST = 1 << 26  # characters of one event or header entry
_SPACE = " \t\r\n"


class TraceFile:
    """A trace file to iterate over once or several times.

    Attributes:
        path: the file.
        header: top-level entries beside the events, those read so far.
        truncated: a bare array ended without its bracket, which the format allows.
        flaws: kind → where first: commas that lack or are too many, which is forgiven.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise MissingError(f"trace: no file {self.path}")
        self.header: dict[str, Any] = {}
        self.truncated = False
        self.flaws: dict[str, str] = {}

    @property
    def dropped(self) -> int:
        """Events that the recorder's buffer had no room for, by the header as read so far."""
        ours = self.header.get("whalefall")
        count = ours.get("dropped") if isinstance(ours, dict) else None
        return count if isinstance(count, int) and count > 0 else 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the events in file order.

        Raises: CorruptError for what is no trace or ends early, naming the event reached;
            LimitError for a single event of more than 64 Mi characters.
        """
        with self.path.open("rb") as raw, _unpacked(raw) as file:
            text = _Text(file, self.path)
            first = text.peek()
            if first == "[":
                yield from self._events(text, bare=True)
            elif first == "{":
                yield from self._object(text)
            else:
                raise CorruptError(
                    f"trace: {self.path} starts with {first!r}; wanted a JSON object or array"
                )
            if not self.truncated:
                text.end()

    def _object(self, text: _Text) -> Iterator[dict[str, Any]]:
        text.skip("{")
        found = False
        while text.peek() != "}":
            key = text.value()
            if not isinstance(key, str):
                raise CorruptError(f"trace: {self.path} has the key {key!r:.60}; wanted text")
            text.skip(":")
            if key == "traceEvents":
                found = True
                yield from self._events(text, bare=False)
            else:
                self.header[key] = text.value()
            self._next(text, "}")
        text.skip("}")
        if not found:
            raise CorruptError(f"trace: {self.path} has no traceEvents; it is no Chrome trace")

    def _events(self, text: _Text, bare: bool) -> Iterator[dict[str, Any]]:
        text.skip("[")
        count = 0
        while True:
            mark = text.peek(bare)
            if mark == "]":
                text.skip("]")
                return
            if mark == "":
                self.truncated = True
                return
            try:
                event = text.value()
            except CorruptError as error:
                if bare and text.ended:
                    self.truncated = True
                    return
                raise CorruptError(f"{error} (in event {count})") from None
            if not isinstance(event, dict):
                raise CorruptError(
                    f"trace: event {count} of {self.path} is {type(event).__name__}, not an object"
                )
            count += 1
            yield event
            self._next(text, "]", bare, count)

    def _next(self, text: _Text, end: str, bare: bool = False, count: int = 0) -> None:
        """Pass the comma before a further entry; `end` stays."""
        mark = text.peek(bare)
        if mark in (end, ""):
            return
        where = f"event {count}" if end == "]" else "an entry of the header"
        if mark == ",":
            text.skip(",")
            if text.peek(bare) == end:
                self.flaws.setdefault("comma before a bracket", f"after {where}")
        elif mark == ("{" if end == "]" else '"'):
            self.flaws.setdefault("no comma", f"after {where}")
        else:
            raise CorruptError(
                f"trace: {self.path} has {mark!r} after {where}; wanted a comma or {end!r}"
            )


def _unpacked(raw: IO[bytes]) -> IO[bytes] | gzip.GzipFile:
    """The file's plain bytes. Its name may lie: profilers write compressed .json files."""
    magic = raw.read(2)
    raw.seek(0)
    return gzip.GzipFile(fileobj=raw) if magic == b"\x1f\x8b" else raw


class _Text:
    """A window of the file's text that moves forward."""

    def __init__(self, file: IO[bytes] | gzip.GzipFile, path: Path) -> None:
        self.file = file
        self.path = path
        self.decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self.scan = json.JSONDecoder(strict=False).raw_decode
        self.text = ""
        self.place = 0
        self.ended = False

    def more(self, size: int = CHUNK) -> bool:
        """Read on; False at the end of the file."""
        if self.ended:
            return False
        try:
            data = self.file.read(size)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            self.ended = True
            raise CorruptError(f"trace: {self.path} is damaged gzip: {error}") from None
        self.ended = not data
        self.text = self.text[self.place :] + self.decode(data, self.ended)
        self.place = 0
        return not self.ended

    def peek(self, end_allowed: bool = False) -> str:
        """The next character that is no white space; "" at the end, where that is allowed."""
        while True:
            text, place = self.text, self.place
            size = len(text)
            while place < size and text[place] in _SPACE:
                place += 1
            self.place = place
            if place < size:
                return text[place]
            if not self.more():
                if end_allowed:
                    return ""
                raise CorruptError(f"trace: {self.path} ends early; it was cut off or half-written")

    def skip(self, mark: str) -> None:
        """Pass `mark`, which must come next."""
        found = self.peek()
        if found != mark:
            raise CorruptError(f"trace: {self.path} has {found!r} where {mark!r} belongs")
        self.place += 1

    def end(self) -> None:
        """Raise CorruptError unless nothing but white space is left."""
        if rest := self.peek(True):
            raise CorruptError(f"trace: {self.path} goes on with {rest!r} after its end")

    def value(self) -> Any:
        """Parse the JSON value that comes next, reading on as far as it goes."""
        self.peek()
        size = CHUNK
        while True:
            try:
                value, end = self.scan(self.text, self.place)
            except json.JSONDecodeError as error:
                # broken in the middle of what was read: reading on would not mend it
                if error.pos < len(self.text) - 64 and '"' not in error.msg and size > CHUNK:
                    raise CorruptError(f"trace: {self.path} is no JSON: {error.msg}") from None
            except ValueError as error:  # an integer of more digits than Python reads
                raise CorruptError(
                    f"trace: {self.path} has a number too long to read: {str(error).split(';')[0]}"
                ) from None
            except RecursionError:
                raise CorruptError(f"trace: {self.path} nests too deeply to be a trace") from None
            else:
                # a number at the very end may go on in the next chunk
                if end < len(self.text) or self.ended:
                    self.place = end
                    return value
            if len(self.text) - self.place > LARGEST:
                raise LimitError(
                    f"trace: {self.path} has an entry of more than {LARGEST} characters, "
                    "or broken JSON"
                )
            if not self.more(size):
                raise CorruptError(f"trace: {self.path} ends early; it was cut off or half-written")
            size *= 2


def as_time(value: Any) -> float | None:
    """A time as a number; None for what is none, or lies beyond ±10¹⁸ µs (`check` reports it)."""
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if -1e18 < found < 1e18 else None


def args_of(event: dict[str, Any]) -> dict[str, Any]:
    """What an event says of itself; nothing where that is no object."""
    args = event.get("args")
    return args if isinstance(args, dict) else {}
