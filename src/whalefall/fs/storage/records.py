"""File-system room: a chunk's record, in memory and as a row of the journal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from whalefall.fs.core.messages import ChunkMeta, Remembered
from whalefall.fs.core.replica import Entry
from whalefall.fs.storage import native_io
from whalefall.fs.storage.slots import Place

__all__ = ["REMEMBERED", "Placed", "Record", "Row", "record_of", "row_of", "tag_row"]


@dataclass
class Record(Entry):
    """A chunk as the engine keeps it: metadata, where each content lies, and that for native code.

    Only the last two change; a new state of the chunk is a new record.
    """

    committed_at: Place | None = None
    committed_crcs: bytes = b""
    pending_at: Place | None = None
    pending_crcs: bytes = b""
    committed_content: bytes | None = None
    pending_content: bytes | None = None

    def describe(self, pending: bool, file: Callable[[int], int]) -> bytes:
        """What native code needs to know of a content, made once.

        Args:
            file: a size class's descriptor.
        """
        place = self.pending_at if pending else self.committed_at
        meta = self.pending if pending else self.committed
        crcs = self.pending_crcs if pending else self.committed_crcs
        assert place is not None and meta is not None
        made = native_io.content(file(place.size_class), place.offset, meta.length, crcs)
        if pending:
            self.pending_content = made
        else:
            self.committed_content = made
        return made


@dataclass(frozen=True)
class Placed:
    """An update's outcome in its slot, before it is recorded; `file`: to be flushed first."""

    chunk: bytes
    meta: ChunkMeta
    place: Place | None = None
    crcs: bytes = b""
    file: int = -1


class Row(msgspec.Struct, array_like=True):
    """A record on disk."""

    committed: ChunkMeta | None
    committed_at: Place | None
    committed_crcs: bytes
    pending: ChunkMeta | None
    pending_at: Place | None
    pending_crcs: bytes


_ROW = msgspec.msgpack.Decoder(Row)
REMEMBERED = msgspec.msgpack.Decoder(Remembered)


def record_of(value: bytes) -> Record:
    """A row as the record it was made of."""
    row = _ROW.decode(value)
    return Record(
        row.committed, row.pending, row.committed_at, row.committed_crcs,
        row.pending_at, row.pending_crcs,
    )  # fmt: skip


def row_of(record: Record | None) -> bytes | None:
    """A record as its row; None, which deletes it, where there is none."""
    if record is None:
        return None
    return msgspec.msgpack.encode(Row(
        record.committed, record.committed_at, record.committed_crcs,
        record.pending, record.pending_at, record.pending_crcs,
    ))  # fmt: skip


def tag_row(remembered: Remembered) -> tuple[str, int, bytes]:
    """A remembered operation as its row."""
    return remembered.tag.client, remembered.tag.channel, msgspec.msgpack.encode(remembered)
