"""File-system room: the chunk store of a simulated disk — the engine's rules on a dictionary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from whalefall.comm import crc32c
from whalefall.fs.core import effects
from whalefall.fs.core.effects import Refused
from whalefall.fs.core.messages import ChunkMeta, Code, Kind, Remembered, Tag, Update
from whalefall.fs.core.replica import Entry

__all__ = ["SimStore", "Unsynced"]
K = TypeVar("K")
T = TypeVar("T")


@dataclass(frozen=True)
class Unsynced:
    """An effect on disk whose writes are lost if the node crashes (only a broken core asks)."""

    effect: Any

    @property
    def target(self) -> int:
        """The wrapped effect's target."""
        return int(self.effect.target)


@dataclass(frozen=True)
class Undo:
    """What a chunk was before something that a crash may take back.

    Attributes:
        channel: whose last operation was then `remembered`.
        late: lost only if nothing was stored since.
    """

    chunk: bytes
    entry: Entry | None
    content: bytes | None
    pending: bytes | None
    channel: tuple[str, int] | None
    remembered: Remembered | None
    late: bool


class SimStore:
    """One target. What was done `Unsynced` is lost in a crash, a commit too unless more was stored.

    Args:
        committed: called with (chunk, tag, version) of each commit.
    Attributes:
        full: refuses new content.
        flip: the next content is stored wrong, with a checksum that matches it.
    """

    def __init__(self, committed: Callable[[bytes, Tag, int], None]) -> None:
        self._entries: dict[bytes, Entry] = {}
        self._content: dict[bytes, bytes] = {}
        self._pending: dict[bytes, bytes] = {}
        self._tags: dict[tuple[str, int], Remembered] = {}
        self._undo: list[Undo] = []
        self._on_commit = committed
        self.full = False
        self.flip = False

    # ---- from memory

    def entry(self, chunk: bytes) -> Entry | None:
        return self._entries.get(chunk)

    def entries(self) -> Mapping[bytes, Entry]:
        return dict(self._entries)

    def pendings(self) -> list[bytes]:
        return sorted(c for c, e in self._entries.items() if e.pending is not None)

    def remembered(self, client: str, channel: int) -> Remembered | None:
        return self._tags.get((client, channel))

    def tags(self) -> list[Remembered]:
        return list(self._tags.values())

    def last(self, prefix: bytes) -> tuple[bytes | None, int, int]:
        there = sorted(c for c, e in self._entries.items() if c.startswith(prefix) and e.committed)
        if not there:
            return None, 0, 0
        meta = self._entries[there[-1]].committed
        return there[-1], meta.length if meta else 0, len(there)

    def usage(self) -> tuple[int, int, int, int]:
        return 0, 0, len(self._entries), 0

    def content(self, chunk: bytes) -> bytes:
        """The committed content."""
        return self._content.get(chunk, b"")

    # ---- effects

    def perform(self, effect: Any) -> Any:
        """Do one effect on disk."""
        if isinstance(effect, Unsynced):
            chunk = effect.effect.chunk if hasattr(effect.effect, "chunk") else (
                effect.effect.update.chunk
            )  # fmt: skip
            self._undo.append(self._as_it_is(chunk, late=False))
            return self.perform(effect.effect)
        if isinstance(effect, effects.Commit):
            undo = self._as_it_is(effect.chunk, late=True, tag=effect.tag)
            self._commit(effect)
            self._undo.append(undo)
            return None
        if not isinstance(effect, effects.Load):
            # The engine writes a commit's record before any later one.
            self._undo = [undo for undo in self._undo if not undo.late]
        if isinstance(effect, effects.Store):
            return self._store(effect)
        if isinstance(effect, effects.Abort):
            return self._abort(effect.chunk)
        if isinstance(effect, effects.Load):
            return self._load(effect.chunk, effect.pending)
        if isinstance(effect, effects.Merge):
            for tag in effect.tags:
                mine = self._tags.get((tag.tag.client, tag.tag.channel))
                if mine is None or mine.tag.seq < tag.tag.seq:
                    self._tags[tag.tag.client, tag.tag.channel] = tag
            return None
        if isinstance(effect, effects.Forget):
            self._tags.clear()
            return None
        raise TypeError(f"no such effect: {effect!r}")

    def _store(self, effect: effects.Store) -> ChunkMeta:
        update = effect.update
        old = self._entries.get(update.chunk) or Entry()
        if update.kind is Kind.REMOVE:
            meta = ChunkMeta(effect.version, effect.chain_version, 0, 0, update.tag, removed=True)
            data = b""
        else:
            if self.full:
                raise Refused(Code.NO_SPACE, "the disk is full")
            data = self._outcome(update, bytes(effect.data))
            if update.kind is Kind.REPLACE and update.checksum not in (-1, crc32c(data)):
                raise Refused(Code.CORRUPT, "the data changed on its way here")
            if self.flip and data:
                self.flip = False
                data = bytes([data[0] ^ 1]) + data[1:]
            meta = ChunkMeta(
                effect.version, effect.chain_version, len(data), crc32c(data), update.tag
            )
        self._pending[update.chunk] = data
        self._entries[update.chunk] = Entry(old.committed, meta)
        return meta

    def _outcome(self, update: Update, data: bytes) -> bytes:
        old = self._content.get(update.chunk, b"")
        if update.kind is Kind.REPLACE:
            return data
        if update.kind is Kind.WRITE:
            return apply_write(old, update.offset, data)
        return old[: update.length].ljust(update.length, b"\0")

    def _commit(self, effect: effects.Commit) -> None:
        chunk = effect.chunk
        entry = self._entries.get(chunk)
        if entry is None or entry.pending is None:
            raise Refused(Code.NOT_READY, "nothing is pending")
        meta = msgspec.structs.replace(entry.pending, chain_version=effect.chain_version)
        if effect.tag is not None:
            self._on_commit(chunk, effect.tag, meta.version)
        last = self._tags.get((effect.tag.client, effect.tag.channel)) if effect.tag else None
        if effect.tag is not None and (last is None or last.tag.seq < effect.tag.seq):
            self._tags[effect.tag.client, effect.tag.channel] = Remembered(
                effect.tag, meta.version, effect.chain_version, meta.length, meta.checksum
            )
        data = self._pending.pop(chunk, b"")
        if meta.removed:
            self._entries.pop(chunk)
            self._content.pop(chunk, None)
        else:
            self._entries[chunk] = Entry(meta, None)
            self._content[chunk] = data

    def _abort(self, chunk: bytes) -> None:
        entry = self._entries.get(chunk)
        self._pending.pop(chunk, None)
        if entry is not None and entry.committed is None:
            del self._entries[chunk]
        elif entry is not None:
            self._entries[chunk] = Entry(entry.committed, None)

    def _load(self, chunk: bytes, pending: bool) -> bytes:
        where = self._pending if pending else self._content
        if chunk not in where:
            raise Refused(Code.NOT_FOUND, "no such content")
        return where[chunk]

    def _as_it_is(self, chunk: bytes, late: bool, tag: Tag | None = None) -> Undo:
        channel = (tag.client, tag.channel) if tag is not None else None
        return Undo(
            chunk, self._entries.get(chunk), self._content.get(chunk), self._pending.get(chunk),
            channel, self._tags.get(channel) if channel is not None else None, late,
        )  # fmt: skip

    def crash(self) -> None:
        """Lose what was not synced."""
        for undo in reversed(self._undo):
            restore(self._entries, undo.chunk, undo.entry)
            restore(self._content, undo.chunk, undo.content)
            restore(self._pending, undo.chunk, undo.pending)
            if undo.channel is not None:
                restore(self._tags, undo.channel, undo.remembered)
        self._undo.clear()


def restore(table: dict[K, T], key: K, value: T | None) -> None:
    """Put back what a table had of a key."""
    if value is None:
        table.pop(key, None)
    else:
        table[key] = value


def apply_write(old: bytes, offset: int, data: bytes) -> bytes:
    """A chunk's content after a write; a gap is filled with zeros."""
    content = bytearray(old.ljust(offset + len(data), b"\0"))
    content[offset : offset + len(data)] = data
    return bytes(content)
