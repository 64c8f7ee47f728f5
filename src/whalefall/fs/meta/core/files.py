"""File-system room: opening, closing, measuring and collecting files.

A session, for reading or writing, keeps an unlinked file's data. A length is what writers report
when they sync or close, never smaller without a truncation; a report from before one is void.
"""

from __future__ import annotations

import errno
import stat

import msgspec

from whalefall.fs.core.layout import MAX_CHUNKS
from whalefall.fs.kv.interface import Transaction
from whalefall.fs.meta.core.directories import add_entry, claim, drop_name, remove_entry
from whalefall.fs.meta.core.paths import READ, WRITE, check, check_sticky, locate
from whalefall.fs.meta.core.records import (
    Context,
    Garbage,
    Inode,
    InodeKind,
    Layout,
    MetaError,
    Session,
    gcfi,
    inod,
    inos,
    load,
    load_inode,
    save,
    span,
)

__all__ = ["begin_file", "close_file", "condemn", "create", "forget", "garbage", "open_file",
           "publish", "report_length", "sessions", "set_length"]  # fmt: skip


def new_file(context: Context, mode: int, layout: Layout, nlink: int) -> Inode:
    """A fresh, empty file's inode."""
    now = context.now
    return Inode(
        context.new_inode(), InodeKind.FILE, stat.S_IMODE(mode), context.uid, context.gid, nlink,
        now, now, now, layout=layout,
    )  # fmt: skip


def create(
    t: Transaction, context: Context, path: str, mode: int, layout: Layout, session: str,
    exclusive: bool = False,
) -> Inode:  # fmt: skip
    """Open a file for writing, made where missing; with `session` "" it is only made.

    Raises: MetaError(EEXIST if `exclusive`, EISDIR, EACCES, …).
    """
    spot = locate(t, context, path, follow=not exclusive)
    if spot.entry is not None:
        if exclusive:
            raise MetaError(errno.EEXIST, path)
        return open_file(t, context, path, session, write=True)
    claim(t, context, spot)
    inode = new_file(context, mode, layout, 1)
    save(t, inod(inode.id), inode)
    add_entry(t, context, spot, inode)
    if session:
        save(t, inos(inode.id, session), Session(context.client, True, context.now))
    return inode


def open_file(
    t: Transaction, context: Context, path: str, session: str, write: bool = False
) -> Inode:
    """Open an existing file.

    Raises: MetaError(ENOENT, EISDIR, EACCES).
    """
    spot = locate(t, context, path, follow=True)
    if spot.entry is None:
        raise MetaError(errno.ENOENT, path)
    if spot.entry.kind is InodeKind.DIRECTORY:
        raise MetaError(errno.EISDIR, path)
    inode = load_inode(t, spot.entry.inode, path)
    check(context, inode, WRITE if write else READ, path)
    if session:
        save(t, inos(inode.id, session), Session(context.client, write, context.now))
    return inode


def begin_file(t: Transaction, context: Context, mode: int, layout: Layout, session: str) -> Inode:
    """A new file without a name yet: `publish` gives it one when its content is complete."""
    inode = new_file(context, mode, layout, 0)
    save(t, inod(inode.id), inode)
    save(t, gcfi(inode.id), Garbage(context.now))
    save(t, inos(inode.id, session), Session(context.client, True, context.now))
    return inode


def publish(
    t: Transaction, context: Context, inode: int, path: str, session: str, length: int,
    replace: bool = True,
) -> Inode:  # fmt: skip
    """Name a file begun with `begin_file`, in place of what has the name; closes the session.

    Raises: MetaError(EISDIR, EEXIST if not `replace`, ENOENT).
    """
    spot = locate(t, context, path, follow=True)
    claim(t, context, spot)
    fresh = load_inode(t, inode, path)
    if fresh.nlink:
        raise MetaError(errno.EEXIST, path, "this file has a name already")
    if spot.entry is not None:
        if not replace:
            raise MetaError(errno.EEXIST, path)
        there = load_inode(t, spot.entry.inode, path)
        if there.kind is InodeKind.DIRECTORY:
            raise MetaError(errno.EISDIR, path)
        check(context, there, WRITE, path)
        check_sticky(context, spot.parent, there, path)
        drop_name(t, context, there)
        remove_entry(t, context, spot)
    named = msgspec.structs.replace(
        fresh, nlink=1, length=length, mtime=context.now, ctime=context.now
    )
    save(t, inod(inode), named)
    t.delete(gcfi(inode))
    t.delete(inos(inode, session))
    add_entry(t, context, spot, named)
    return named


def report_length(
    t: Transaction, context: Context, inode: int, length: int, truncate_version: int
) -> Inode:
    """A writer says how far its acknowledged writes reach."""
    old = load_inode(t, inode)
    if truncate_version != old.truncate_version:
        return old  # from before a truncation
    after = msgspec.structs.replace(
        old, length=max(old.length, length), mtime=context.now, ctime=context.now
    )
    save(t, inod(inode), after)
    return after


def set_length(t: Transaction, context: Context, inode: int, length: int) -> Inode:
    """A truncation: from now on older reports are void.

    Raises: MetaError(EINVAL, EFBIG for the length, EACCES).
    """
    old = load_inode(t, inode)
    check(context, old, WRITE, f"inode {inode}")
    most = MAX_CHUNKS * old.layout.chunk_bytes if old.layout else 0
    if not 0 <= length <= most:
        number = errno.EINVAL if length < 0 else errno.EFBIG
        raise MetaError(number, f"inode {inode}", f"length {length}, wanted 0 … {most}")
    after = msgspec.structs.replace(
        old, length=length, truncate_version=old.truncate_version + 1,
        mtime=context.now, ctime=context.now,
    )  # fmt: skip
    save(t, inod(inode), after)
    return after


def close_file(
    t: Transaction, context: Context, inode: int, session: str, length: int = -1,
    truncate_version: int = 0,
) -> None:  # fmt: skip
    """End a session, with the writer's last report of its length (-1: none)."""
    t.delete(inos(inode, session))
    if length >= 0 and t.get(inod(inode), snapshot=True) is not None:
        report_length(t, context, inode, length, truncate_version)


def sessions(t: Transaction, inode: int) -> list[Session]:
    """Who has a file open."""
    found = t.range(*span(inos(inode)))
    return [s for _, value in found if (s := load(value, Session)) is not None]


def garbage(t: Transaction, limit: int = 256) -> list[tuple[int, Garbage]]:
    """Inodes without a name."""
    rows = t.range(*span(b"GCFI"), limit=limit, snapshot=True)
    found = [(int.from_bytes(key[4:], "big"), load(value, Garbage)) for key, value in rows]
    return [(inode, record) for inode, record in found if record is not None]


def condemn(t: Transaction, inode: int) -> Inode | None:
    """Take a nameless inode that nobody has open out of reach; its chunks may go then.

    Returns: the inode; None while it is open, or if it has a name after all.
    """
    record = load(t.get(gcfi(inode)), Garbage)
    if record is None or record.condemned is not None:
        return record.condemned if record else None
    if sessions(t, inode):
        return None
    there = load(t.get(inod(inode)), Inode)
    if there is None or there.nlink > 0:
        t.delete(gcfi(inode))
        return None
    t.delete(inod(inode))
    save(t, gcfi(inode), Garbage(record.since, there))
    return there


def forget(t: Transaction, inode: int) -> None:
    """A condemned inode's chunks are gone."""
    t.delete(gcfi(inode))
