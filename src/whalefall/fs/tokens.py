"""File-system room: where a client on the same host finds a cluster's token.

`token=` of the call, else WHALEFALL_FS_TOKEN, else a file that only this user may read, written
by whoever started the cluster.
"""

from __future__ import annotations

import os
from pathlib import Path

from whalefall.comm import read_token
from whalefall.env import cache_dir, get
from whalefall.fs.errors import ClusterError

__all__ = ["find_token", "publish_token"]


def _path(host: str, port: int) -> Path:
    return cache_dir() / "fs" / f"{host}-{port}.token"


def publish_token(host: str, port: int, token: bytes) -> Path:
    """Leave a cluster's token where this user's other processes find it."""
    path = _path(host, port)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(token)
    temporary.replace(path)
    return path


def find_token(host: str, port: int, token: str | None = None) -> bytes:
    """The token for a cluster.

    Raises: ClusterError if none is known here.
    """
    text = token or get("WHALEFALL_FS_TOKEN")
    if text:
        return text.encode()
    path = _path(host, port)
    if not path.exists():
        raise ClusterError(
            f"fs: no token for the cluster at {host}:{port}; "
            f"pass token=, or set WHALEFALL_FS_TOKEN to what its folder's file `token` holds"
        )
    return read_token(path)
