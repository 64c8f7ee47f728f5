"""File-system room: reading and changing attributes, and listing directories."""

from __future__ import annotations

import errno
import stat
from typing import Any

import msgspec

from whalefall.fs.kv.interface import Transaction
from whalefall.fs.meta.core.paths import READ, check, find, locate
from whalefall.fs.meta.core.records import (
    Context,
    Entry,
    Inode,
    InodeKind,
    MetaError,
    Times,
    dent,
    dsub,
    dtim,
    inod,
    load,
    load_inode,
    save,
    span,
)

__all__ = ["access", "list_directory", "readlink", "set_attributes", "stat_inode", "stat_path"]


def complete(t: Transaction, inode: Inode) -> Inode:
    """A directory's inode with its mtime and link count filled in."""
    if inode.kind is not InodeKind.DIRECTORY:
        return inode
    times = load(t.get(dtim(inode.id), snapshot=True), Times)
    children = len(t.range(*span(dsub(inode.id)), snapshot=True))
    mtime = max(inode.mtime, times.mtime) if times else inode.mtime
    return msgspec.structs.replace(inode, mtime=mtime, nlink=2 + children)


def stat_path(
    t: Transaction, context: Context, path: str, follow: bool = True, wanted: int = 0
) -> Inode:
    """Attributes of what is at a path.

    Raises: MetaError(EACCES) if the mode bits do not allow `wanted` (0: nothing is asked for).
    """
    inode = find(t, context, path, follow)
    check(context, inode, wanted, path)
    return complete(t, inode)


def stat_inode(t: Transaction, context: Context, inode: int, wanted: int = 0) -> Inode:
    """Attributes by inode number; `wanted` as for `stat_path`."""
    there = load_inode(t, inode, snapshot=True)
    check(context, there, wanted, f"inode {inode}")
    return complete(t, there)


def list_directory(
    t: Transaction, context: Context, path: str, after: str = "", limit: int = 1000
) -> list[tuple[str, Inode]]:
    """Up to `limit` names after `after`, in order, with attributes.

    Raises: MetaError(ENOTDIR, EACCES, ENOENT).
    """
    inode = find(t, context, path)
    if inode.kind is not InodeKind.DIRECTORY:
        raise MetaError(errno.ENOTDIR, path)
    check(context, inode, READ, path)
    begin, end = span(dent(inode.id))
    if after:
        begin = dent(inode.id, after) + b"\0"
    found = []
    for key, value in t.range(begin, end, limit, snapshot=True):
        entry = load(value, Entry)
        child = load(t.get(inod(entry.inode), snapshot=True), Inode) if entry else None
        if child is not None:
            found.append((key[12:].decode(), complete(t, child)))
    return found


def readlink(t: Transaction, context: Context, path: str) -> str:
    """Where a symbolic link points."""
    inode = find(t, context, path, follow=False)
    if inode.kind is not InodeKind.SYMLINK:
        raise MetaError(errno.EINVAL, path, "it is no symbolic link")
    return inode.target


def access(t: Transaction, context: Context, path: str, wanted: int) -> bool:
    """Whether the mode bits allow reading (4), writing (2), executing (1)."""
    try:
        check(context, find(t, context, path), wanted, path)
    except MetaError as error:
        if error.errno == errno.EACCES:
            return False
        raise
    return True


def set_attributes(
    t: Transaction, context: Context, path: str, changes: dict[str, Any], follow: bool = True
) -> Inode:
    """Change mode, uid, gid, atime or mtime.

    Raises: MetaError(EPERM) for whoever is not the owner (uid and gid: root).
    """
    spot = locate(t, context, path, follow)
    if spot.entry is None:
        raise MetaError(errno.ENOENT, path)
    inode = load_inode(t, spot.entry.inode, path)
    unknown = set(changes) - {"mode", "uid", "gid", "atime", "mtime"}
    if unknown:
        raise MetaError(errno.EINVAL, path, f"no attribute {sorted(unknown)}")
    if context.uid not in (0, inode.uid):
        raise MetaError(errno.EPERM, path, f"owner is {inode.uid}")
    if context.uid != 0 and "uid" in changes and changes["uid"] != inode.uid:
        raise MetaError(errno.EPERM, path, "only root gives a file away")
    if "mode" in changes:
        changes["mode"] = stat.S_IMODE(changes["mode"])
    after = msgspec.structs.replace(inode, ctime=context.now, **changes)
    save(t, inod(inode.id), after)
    if inode.kind is InodeKind.DIRECTORY and "mtime" in changes:
        save(t, dtim(inode.id), Times(changes["mtime"]))
    return complete(t, after)
