"""File-system room: making, linking, removing and renaming names."""

from __future__ import annotations

import errno
import stat

import msgspec

from whalefall.fs.kv.interface import Transaction
from whalefall.fs.meta.core.paths import EXECUTE, WRITE, Spot, check, check_sticky, locate, split
from whalefall.fs.meta.core.records import (
    ROOT,
    Context,
    Entry,
    Garbage,
    Inode,
    InodeKind,
    MetaError,
    Times,
    dent,
    dsub,
    dtim,
    gcfi,
    inod,
    load_inode,
    save,
    span,
)

__all__ = ["add_entry", "drop_name", "format_root", "link", "mkdir", "remove", "remove_entry",
           "rename", "symlink"]  # fmt: skip

MAX_LINKS = 65535


def format_root(t: Transaction, now: float) -> None:
    """Make the root directory, once."""
    if t.get(inod(ROOT)) is None:
        root = Inode(ROOT, InodeKind.DIRECTORY, 0o1777, 0, 0, 2, now, now, now, parent=ROOT)
        save(t, inod(ROOT), root)


# ---- entries


def claim(t: Transaction, context: Context, spot: Spot) -> None:
    """Prepare to change a name: permission, and conflicts with whoever changes it too."""
    if not spot.name:
        raise MetaError(errno.EBUSY, spot.path, "it is the root")
    check(context, spot.parent, WRITE | EXECUTE, spot.path)
    t.conflict(inod(spot.parent.id))  # against its removal
    t.conflict(dent(spot.parent.id, spot.name))


def add_entry(t: Transaction, context: Context, spot: Spot, inode: Inode) -> None:
    """Give an inode a name."""
    save(t, dent(spot.parent.id, spot.name), Entry(inode.id, inode.kind))
    if inode.kind is InodeKind.DIRECTORY:
        t.put(dsub(spot.parent.id, spot.name), b"")
    save(t, dtim(spot.parent.id), Times(context.now))


def remove_entry(t: Transaction, context: Context, spot: Spot) -> None:
    """Take a name away; the inode is another matter."""
    t.delete(dent(spot.parent.id, spot.name))
    if spot.entry is not None and spot.entry.kind is InodeKind.DIRECTORY:
        t.delete(dsub(spot.parent.id, spot.name))
    save(t, dtim(spot.parent.id), Times(context.now))


def drop_name(t: Transaction, context: Context, inode: Inode) -> None:
    """One name less; without any left, the inode waits for its sessions and the collector."""
    after = msgspec.structs.replace(inode, nlink=inode.nlink - 1, ctime=context.now)
    if after.nlink > 0:
        save(t, inod(inode.id), after)
    elif inode.kind is InodeKind.FILE:
        save(t, inod(inode.id), after)
        save(t, gcfi(inode.id), Garbage(context.now))
    else:
        t.delete(inod(inode.id))


# ---- operations


def mkdir(
    t: Transaction, context: Context, path: str, mode: int = 0o755, parents: bool = False,
    exist_ok: bool = False,
) -> Inode:  # fmt: skip
    """Make a directory, with `parents` all that are missing on the way.

    Raises: MetaError(EEXIST, ENOENT, ENOTDIR, EACCES).
    """
    names = split(path)
    if parents:
        for count in range(1, len(names)):
            above = "/" + "/".join(names[:count])
            if locate(t, context, above, follow=True).entry is None:
                mkdir(t, context, above, mode, exist_ok=True)
    spot = locate(t, context, path, follow=exist_ok)
    if spot.entry is not None:
        if exist_ok and spot.entry.kind is InodeKind.DIRECTORY:
            return load_inode(t, spot.entry.inode, path)
        raise MetaError(errno.EEXIST, path)
    claim(t, context, spot)
    now = context.now
    gid = spot.parent.gid if spot.parent.mode & stat.S_ISGID else context.gid
    inode = Inode(
        context.new_inode(), InodeKind.DIRECTORY, stat.S_IMODE(mode), context.uid, gid, 2,
        now, now, now, parent=spot.parent.id, name=spot.name,
    )  # fmt: skip
    save(t, inod(inode.id), inode)
    add_entry(t, context, spot, inode)
    return inode


def symlink(t: Transaction, context: Context, target: str, path: str) -> Inode:
    """Make a symbolic link."""
    spot = locate(t, context, path)
    if spot.entry is not None:
        raise MetaError(errno.EEXIST, path)
    claim(t, context, spot)
    now = context.now
    inode = Inode(
        context.new_inode(), InodeKind.SYMLINK, 0o777, context.uid, context.gid, 1, now, now, now,
        length=len(target.encode()), target=target,
    )  # fmt: skip
    save(t, inod(inode.id), inode)
    add_entry(t, context, spot, inode)
    return inode


def link(t: Transaction, context: Context, old: str, new: str) -> Inode:
    """Give a file one more name.

    Raises: MetaError(EPERM) for a directory, EMLINK, EEXIST.
    """
    source, spot = locate(t, context, old), locate(t, context, new)
    if source.entry is None:
        raise MetaError(errno.ENOENT, old)
    if spot.entry is not None:
        raise MetaError(errno.EEXIST, new)
    claim(t, context, spot)
    inode = load_inode(t, source.entry.inode, old)
    if inode.kind is InodeKind.DIRECTORY:
        raise MetaError(errno.EPERM, old, "a directory has one name")
    if inode.nlink >= MAX_LINKS:
        raise MetaError(errno.EMLINK, old, f"at most {MAX_LINKS} names")
    t.conflict(dent(source.parent.id, source.name))
    after = msgspec.structs.replace(inode, nlink=inode.nlink + 1, ctime=context.now)
    save(t, inod(inode.id), after)
    add_entry(t, context, spot, after)
    return after


def remove(t: Transaction, context: Context, path: str, directory: bool | None = None) -> int:
    """Remove a name: a file's (directory=False), an empty directory's (True), either (None).

    Returns: the inode's number.
    Raises: MetaError(EISDIR, ENOTDIR, ENOTEMPTY, ENOENT, EACCES).
    """
    spot = locate(t, context, path)
    if spot.entry is None:
        raise MetaError(errno.ENOENT, path)
    is_directory = spot.entry.kind is InodeKind.DIRECTORY
    if directory is True and not is_directory:
        raise MetaError(errno.ENOTDIR, path)
    if directory is False and is_directory:
        raise MetaError(errno.EISDIR, path)
    claim(t, context, spot)
    inode = load_inode(t, spot.entry.inode, path)
    check_sticky(context, spot.parent, inode, path)
    if is_directory:
        require_empty(t, inode, path)
        t.delete(inod(inode.id))
        t.delete(dtim(inode.id))
    else:
        drop_name(t, context, inode)
    remove_entry(t, context, spot)
    return inode.id


def require_empty(t: Transaction, inode: Inode, path: str) -> None:
    """Refuse unless a directory has no entries, now and at the commit."""
    children = span(dent(inode.id))
    t.conflict_range(*children)
    if t.range(*children, limit=1, snapshot=True):
        raise MetaError(errno.ENOTEMPTY, path)


def rename(t: Transaction, context: Context, old: str, new: str, replace: bool = True) -> None:
    """Move a name, atomically replacing what is at the new one.

    Raises: MetaError as rename(2): EINVAL into itself, EISDIR, ENOTDIR, ENOTEMPTY, EEXIST where
        `replace` is off.
    """
    source, spot = locate(t, context, old), locate(t, context, new)
    if source.entry is None:
        raise MetaError(errno.ENOENT, old)
    if (source.parent.id, source.name) == (spot.parent.id, spot.name):
        return
    claim(t, context, source)
    claim(t, context, spot)
    inode = load_inode(t, source.entry.inode, old)
    check_sticky(context, source.parent, inode, old)
    if inode.kind is InodeKind.DIRECTORY:
        forbid_loop(t, inode, spot)
    if spot.entry is not None:
        if not replace:
            raise MetaError(errno.EEXIST, new)
        if spot.entry.inode == inode.id:
            return  # two names of one file: POSIX leaves both
        displace(t, context, inode, spot)
    remove_entry(t, context, source)
    after = msgspec.structs.replace(inode, ctime=context.now)
    if inode.kind is InodeKind.DIRECTORY:
        after = msgspec.structs.replace(after, parent=spot.parent.id, name=spot.name)
    save(t, inod(inode.id), after)
    add_entry(t, context, spot, after)


def forbid_loop(t: Transaction, inode: Inode, spot: Spot) -> None:
    """A directory must not move below itself, whoever else moves directories meanwhile."""
    above = spot.parent
    while True:
        t.conflict(inod(above.id))
        if above.id == inode.id:
            raise MetaError(errno.EINVAL, spot.path, "it lies inside what is moved")
        if above.id == ROOT:
            return
        above = load_inode(t, above.parent, spot.path, snapshot=True)


def displace(t: Transaction, context: Context, inode: Inode, spot: Spot) -> None:
    """Remove what a rename replaces."""
    assert spot.entry is not None
    there = load_inode(t, spot.entry.inode, spot.path)
    check_sticky(context, spot.parent, there, spot.path)
    if there.kind is InodeKind.DIRECTORY:
        if inode.kind is not InodeKind.DIRECTORY:
            raise MetaError(errno.EISDIR, spot.path)
        require_empty(t, there, spot.path)
        t.delete(inod(there.id))
        t.delete(dtim(there.id))
    elif inode.kind is InodeKind.DIRECTORY:
        raise MetaError(errno.ENOTDIR, spot.path)
    else:
        drop_name(t, context, there)
    remove_entry(t, context, spot)
