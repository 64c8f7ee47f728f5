"""A temporary folder beside what is being written, and the removal of those that nobody owns.

The owner holds a lock on the folder for as long as its process lives; so whoever gets the lock of a
folder knows that its owner is gone. The folder's name says on which host that was, because a lock
need not be seen from another.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["scratch_folder"]


@contextmanager
def scratch_folder(target: str) -> Iterator[str]:
    """A new folder beside `target`; what then has its name is removed when the block ends.

    Those that killed processes of this host left beside the same target go away first.
    """
    parent, base = os.path.split(os.path.abspath(target))
    head = f".{base}.{hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]}-"
    _sweep(parent, head)
    path, handle = "", None
    while handle is None:  # a sweeper may take the folder before it is locked
        path = os.path.join(parent, f"{head}{uuid.uuid4().hex[:8]}.tmp")
        os.mkdir(path)
        handle = _lock(path, fcntl.LOCK_EX)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(handle)


def _lock(path: str, how: int) -> int | None:
    """The folder, locked and open; None where it is gone or another's."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, how)
    except OSError:
        if how == fcntl.LOCK_EX:  # no locks on this file system: then nobody sweeps either
            return handle
        os.close(handle)
        return None
    if os.path.isdir(path) and os.path.samestat(os.fstat(handle), os.stat(path)):
        return handle
    os.close(handle)
    return None


def _sweep(parent: str, head: str) -> None:
    for name in os.listdir(parent):
        if not (name.startswith(head) and name.endswith(".tmp")):
            continue
        path = os.path.join(parent, name)
        handle = _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if handle is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(handle)
