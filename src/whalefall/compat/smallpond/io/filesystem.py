"""smallpond.io.filesystem: Python objects in files, zstd over cloudpickle.

Load only files that you wrote: a pickle runs code.
"""

from __future__ import annotations

import os
import pickle
import shutil
import uuid
from typing import Any

import cloudpickle
import pyarrow as pa

from whalefall.errors import MissingError

__all__ = ["dump", "find_mount_point", "load", "remove_path"]


def dump(obj: Any, path: str, buffering: int = 2 << 20, atomic_write: bool = False) -> int:
    """Write an object; returns the file's size.

    Args:
        atomic_write: the file is there completely or not at all.
    Raises: TypeError for an object that cannot be pickled.
    """
    data = cloudpickle.dumps(obj)
    target = f"{path}.{uuid.uuid4().hex[:8]}.tmp" if atomic_write else path
    with pa.CompressedOutputStream(target, "zstd") as stream:
        stream.write(data)
    if atomic_write:
        os.replace(target, path)
    return os.path.getsize(path)


def load(path: str, buffering: int = 2 << 20) -> Any:
    """Read what `dump` wrote."""
    if not os.path.exists(path):
        raise MissingError(f"no such file: {path}")
    with pa.CompressedInputStream(pa.OSFile(path), "zstd") as stream:
        return pickle.loads(stream.read())


def remove_path(path: str) -> None:
    """Remove a file or folder, if there is one."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        os.remove(path)


def find_mount_point(path: str) -> str:
    """The mount point that a path lies under."""
    found = os.path.realpath(path)
    while not os.path.ismount(found):
        found = os.path.dirname(found)
    return found
