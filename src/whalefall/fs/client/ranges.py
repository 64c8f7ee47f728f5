"""File-system room: many ranges of many files, read at once.

In: inodes, offsets, buffers. Out: of each range how many bytes were read, or what kept it from
being read. Holes read as zeros; what was removed and collected meanwhile is no hole.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import msgspec

from whalefall.fs.client.connection import Connection
from whalefall.fs.core.client import Piece
from whalefall.fs.core.layout import MAX_CHUNKS, chunk_id
from whalefall.fs.errors import FsError, StorageError, fs_error
from whalefall.fs.meta.core.records import Inode

__all__ = ["WINDOW_BYTES", "Range", "check_bounds", "read_each"]

WINDOW_BYTES = 32 << 20
WINDOW_PIECES = 512
UNREAD = -1


class Range(msgspec.Struct):
    """Read `length` bytes of a file at `offset` into `into` (writable, as long)."""

    inode: Inode
    offset: int
    length: int
    into: Any


def check_bounds(inode: Inode, offset: int, length: int = 0) -> None:
    """Refuse a place that no file of this layout has.

    Raises: FsError (EINVAL, EFBIG).
    """
    if offset < 0:
        raise fs_error(errno.EINVAL, f"inode {inode.id}", f"byte {offset}, wanted 0 or more")
    most = MAX_CHUNKS * inode.layout.chunk_bytes if inode.layout else 0
    if offset + length > most:
        raise fs_error(
            errno.EFBIG, f"inode {inode.id}",
            f"byte {offset + length}, wanted at most {most} with chunks of its size",
        )  # fmt: skip


def read_each(
    connection: Connection,
    gone: Callable[[Iterable[int]], set[int]],
    ranges: Sequence[Range],
    relaxed: bool = False,
    stop: bool = False,
) -> list[int | FsError | StorageError]:
    """Read ranges; each one's bytes read, fewer only at its file's end, or its error.

    Args:
        gone: which of some inode numbers are no more.
        stop: raise the first StorageError instead of reading what else can be read.
    Raises: FsError for an offset that cannot be.
    """
    pieces: list[Piece] = []
    results: list[Any] = []
    counts = []
    for wanted in ranges:
        length = max(0, min(wanted.length, wanted.inode.length - wanted.offset))
        mine = _pieces(wanted, length)
        results.append(length)
        counts.append(len(mine))
        pieces += mine
    _read(connection, pieces, relaxed, stop)
    short = [piece for piece in pieces if piece.got < piece.length]
    lost = gone({_inode(p.chunk) for p in short if p.got == 0}) if short else set()
    for piece in short:
        hole = memoryview(piece.into)[max(piece.got, 0) :]
        hole[:] = bytes(hole.nbytes)
    if lost or any(piece.got == UNREAD for piece in short):
        at = 0
        for index, count in enumerate(counts):
            error = _error(pieces[at : at + count], lost, connection.retry_s)
            results[index] = error or results[index]
            at += count
    return results


def _read(connection: Connection, pieces: list[Piece], relaxed: bool, stop: bool) -> None:
    """Fill the pieces; what could not be read stays UNREAD, and its chain is asked no more."""
    down: dict[int, str] = {}
    for window in _windows(pieces):
        asked = [piece for piece in window if piece.chain not in down] if down else window
        try:
            if asked:
                connection.read(asked, relaxed)
        except StorageError:
            if stop:
                raise
            good = {piece.chain for piece in asked if piece.got != UNREAD}
            down |= {p.chain: p.last for p in asked if p.chain not in good}
    for piece in pieces if down else ():
        piece.last = piece.last or down.get(piece.chain, "")


def _error(pieces: list[Piece], lost: set[int], tried_s: float) -> Exception | None:
    """Why a range could not be read; None: it was."""
    for piece in pieces:
        if piece.got == UNREAD:
            return StorageError(
                errno.EIO, f"fs: read chunk {piece.chunk.hex()} of chain {piece.chain}: "
                f"gave up after {tried_s} s; last: {piece.last}",
            )  # fmt: skip
        number = _inode(piece.chunk)
        if piece.got == 0 and number in lost:
            return fs_error(
                errno.ESTALE, f"inode {number}", "it was removed meanwhile; open it by its name"
            )
    return None


def _inode(chunk: bytes) -> int:
    return int.from_bytes(chunk[2:10], "big")


def _pieces(wanted: Range, length: int) -> list[Piece]:
    layout = wanted.inode.layout
    if not length or layout is None:
        return []
    check_bounds(wanted.inode, wanted.offset, length)
    view = memoryview(wanted.into).cast("B")
    size, stripe, number = layout.chunk_bytes, layout.chains, wanted.inode.id
    index, inside = divmod(wanted.offset, size)
    if inside + length <= size:  # most ranges: worth a way of its own
        chain = stripe[index % len(stripe)]
        return [Piece(chain, chunk_id(number, index), inside, length, view[:length], UNREAD)]
    pieces, at = [], 0
    while at < length:
        index, inside = divmod(wanted.offset + at, size)
        take = min(size - inside, length - at)
        chain, into = stripe[index % len(stripe)], view[at : at + take]
        pieces.append(Piece(chain, chunk_id(number, index), inside, take, into, UNREAD))
        at += take
    return pieces


def _windows(pieces: list[Piece]) -> Iterator[list[Piece]]:
    window: list[Piece] = []
    size = 0
    for piece in pieces:
        if window and (size + piece.length > WINDOW_BYTES or len(window) >= WINDOW_PIECES):
            yield window
            window, size = [], 0
        window.append(piece)
        size += piece.length
    if window:
        yield window
