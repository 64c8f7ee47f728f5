"""File-system room: what metadata is made of, and the keys it lies under.

INOD id            inode                  DENT parent name   entry: inode number, kind
DTIM id            a directory's mtime    DSUB parent name   a sub-directory (counts nlink)
INOS id session    an open file           IDEM client req    result of a request, for its retry
GCFI id            to be collected        CLNT client        when a client was last heard
"""

from __future__ import annotations

import enum
import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from whalefall.fs.kv.interface import Transaction

__all__ = [
    "ROOT", "Context", "Entry", "Garbage", "Inode", "InodeKind", "Layout", "MetaError", "Session",
    "Times", "dent", "dsub", "dtim", "gcfi", "inod", "inos", "load", "load_inode", "save", "span",
]  # fmt: skip

ROOT = 1
T = TypeVar("T")


class InodeKind(enum.IntEnum):
    """What a name leads to."""

    FILE = 0
    DIRECTORY = 1
    SYMLINK = 2


class MetaError(Exception):
    """A refusal with an errno, the path it is about, and what would be right."""

    def __init__(self, number: int, path: str, detail: str = "") -> None:
        super().__init__(number, path, detail)
        self.errno, self.path, self.detail = number, path, detail


class Layout(msgspec.Struct, frozen=True, array_like=True):
    """Where a file's chunks go: striped over chains of a table, shuffled by a seed.

    Attributes:
        chains: the chains of its stripe, in order.
        chunk_bytes: a power of two, 64 KiB to 64 MiB.
    """

    chains: tuple[int, ...]
    chunk_bytes: int


class Inode(msgspec.Struct, frozen=True, array_like=True):
    """A file, directory or symbolic link.

    Attributes:
        truncate_version: grows with every truncation; an older length hint is void.
        parent, name: of a directory, to walk up.
        target: of a symbolic link.
    """

    id: int
    kind: InodeKind
    mode: int
    uid: int
    gid: int
    nlink: int
    atime: float
    mtime: float
    ctime: float
    length: int = 0
    truncate_version: int = 0
    layout: Layout | None = None
    parent: int = 0
    name: str = ""
    target: str = ""


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """A name in a directory."""

    inode: int
    kind: InodeKind


class Session(msgspec.Struct, frozen=True, array_like=True):
    """One open file of one client."""

    client: str
    write: bool
    opened: float


class Garbage(msgspec.Struct, frozen=True, array_like=True):
    """A file that lost its last name; `condemned` once nobody has it open either."""

    since: float
    condemned: Inode | None = None


class Times(msgspec.Struct, frozen=True, array_like=True):
    """A directory's modification time, apart from its inode so that creates do not conflict."""

    mtime: float


@dataclass(frozen=True)
class Context:
    """Who asks, when, and where new inode numbers come from."""

    client: str
    request: int
    uid: int
    gid: int
    groups: tuple[int, ...]
    now: float
    new_inode: Callable[[], int]


def inod(number: int) -> bytes:
    """Key of an inode; little-endian, so that neighbours in time do not share a hot range."""
    return b"INOD" + number.to_bytes(8, "little")


def dent(parent: int, name: str = "") -> bytes:
    """Key of an entry; without a name, the prefix of all."""
    return b"DENT" + parent.to_bytes(8, "little") + name.encode()


def dsub(parent: int, name: str = "") -> bytes:
    """Key that counts a sub-directory."""
    return b"DSUB" + parent.to_bytes(8, "little") + name.encode()


def dtim(number: int) -> bytes:
    """Key of a directory's mtime."""
    return b"DTIM" + number.to_bytes(8, "little")


def inos(number: int, session: str = "") -> bytes:
    """Key of a session; without one, the prefix of all."""
    return b"INOS" + number.to_bytes(8, "little") + session.encode()


def gcfi(number: int) -> bytes:
    """Key of an inode to be collected."""
    return b"GCFI" + number.to_bytes(8, "big")


def span(prefix: bytes) -> tuple[bytes, bytes]:
    """The range of all keys under a prefix."""
    return prefix, prefix + b"\xff" * 260


def load(data: bytes | None, kind: type[T]) -> T | None:
    """A stored record, or None."""
    return None if data is None else _DECODERS[kind].decode(data)


# Made once, before there are threads.
_DECODERS: dict[Any, msgspec.msgpack.Decoder[Any]] = {
    kind: msgspec.msgpack.Decoder(kind)
    for kind in (Entry, Garbage, Inode, Session, Times, int, float)
}


def save(t: Transaction, key: bytes, record: Any) -> None:
    """Write a record."""
    t.put(key, msgspec.msgpack.encode(record))


def load_inode(t: Transaction, number: int, path: str = "", snapshot: bool = False) -> Inode:
    """An inode.

    Raises: MetaError(ENOENT).
    """
    inode = load(t.get(inod(number), snapshot), Inode)
    if inode is None:
        raise MetaError(errno.ENOENT, path or f"inode {number}")
    return inode
