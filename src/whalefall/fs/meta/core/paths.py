"""File-system room: from a path to an inode — permissions, symbolic links, limits of names."""

from __future__ import annotations

import errno
import stat
from dataclasses import dataclass

from whalefall.fs.kv.interface import Transaction
from whalefall.fs.meta.core.records import (
    ROOT,
    Context,
    Entry,
    Inode,
    InodeKind,
    MetaError,
    dent,
    load,
    load_inode,
)

__all__ = ["EXECUTE", "READ", "WRITE", "Spot", "check", "check_sticky", "find", "locate", "split"]

READ, WRITE, EXECUTE = 4, 2, 1
MAX_NAME_BYTES = 255
MAX_PATH_BYTES = 4096
MAX_LINKS = 10


@dataclass(frozen=True)
class Spot:
    """A place in the tree: an existing directory, a name in it, and what is there."""

    parent: Inode
    name: str
    entry: Entry | None
    path: str


def split(path: str) -> list[str]:
    """The names of a path; "." and "" left out, ".." resolved against what comes before.

    Raises: MetaError(ENAMETOOLONG, EINVAL).
    """
    if len(path.encode()) > MAX_PATH_BYTES:
        raise MetaError(errno.ENAMETOOLONG, path[:60] + "…", f"at most {MAX_PATH_BYTES} bytes")
    names: list[str] = []
    for name in path.split("/"):
        if name in ("", "."):
            continue
        if len(name.encode()) > MAX_NAME_BYTES:
            raise MetaError(errno.ENAMETOOLONG, name[:60] + "…", f"at most {MAX_NAME_BYTES} bytes")
        if "\0" in name:
            raise MetaError(errno.EINVAL, name, "a name has no zero byte")
        names.append(name)
    return names


def check(context: Context, inode: Inode, wanted: int, path: str) -> None:
    """Refuse (EACCES) unless the mode bits allow `wanted`."""
    if context.uid == 0:
        return
    if context.uid == inode.uid:
        granted = inode.mode >> 6
    elif inode.gid == context.gid or inode.gid in context.groups:
        granted = inode.mode >> 3
    else:
        granted = inode.mode
    if granted & wanted != wanted:
        raise MetaError(errno.EACCES, path, f"mode is {inode.mode:o}, owner {inode.uid}")


def check_sticky(context: Context, parent: Inode, inode: Inode, path: str) -> None:
    """In a sticky directory only the owner of it or of the file may take a name away."""
    if parent.mode & stat.S_ISVTX and context.uid not in (0, parent.uid, inode.uid):
        raise MetaError(errno.EACCES, path, "the directory is sticky")


def locate(t: Transaction, context: Context, path: str, follow: bool = False) -> Spot:
    """The directory and name that a path leads to; the name need not exist.

    Args:
        follow: whether a symbolic link at the end is followed.
    Raises: MetaError (ENOENT, ENOTDIR, ELOOP, EACCES, ENAMETOOLONG).
    """
    todo = split(path)[::-1]
    here = load_inode(t, ROOT, "/", snapshot=True)
    links = 0
    while True:
        if not todo:
            return Spot(here, "", Entry(here.id, InodeKind.DIRECTORY), path)
        name = todo.pop()
        check(context, here, EXECUTE, path)
        if name == "..":
            here = load_inode(t, here.parent or ROOT, path, snapshot=True)
            continue
        entry = load(t.get(dent(here.id, name), snapshot=True), Entry)
        if entry is None:
            if todo:
                raise MetaError(errno.ENOENT, path, f"there is no {name!r}")
            return Spot(here, name, None, path)
        if entry.kind is InodeKind.SYMLINK and (todo or follow):
            links += 1
            if links > MAX_LINKS:
                raise MetaError(errno.ELOOP, path, f"more than {MAX_LINKS} symbolic links")
            target = load_inode(t, entry.inode, path, snapshot=True).target
            todo += split(target)[::-1]
            if target.startswith("/"):
                here = load_inode(t, ROOT, "/", snapshot=True)
            continue
        if not todo:
            return Spot(here, name, entry, path)
        if entry.kind is not InodeKind.DIRECTORY:
            raise MetaError(errno.ENOTDIR, path, f"{name!r} is no directory")
        here = load_inode(t, entry.inode, path, snapshot=True)


def find(t: Transaction, context: Context, path: str, follow: bool = True) -> Inode:
    """The inode at a path (a snapshot read).

    Raises: MetaError(ENOENT, …).
    """
    spot = locate(t, context, path, follow)
    if spot.entry is None:
        raise MetaError(errno.ENOENT, path)
    return load_inode(t, spot.entry.inode, path, snapshot=True)
