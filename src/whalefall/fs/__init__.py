"""File-system room: a distributed file system, strongly consistent by CRAQ, following 3FS.

Clients see every disk of every storage node; a cluster manager keeps chains of replicas; stateless
metadata servers work over a transactional key-value store. `LocalCluster` starts a whole cluster
on one host; `whalefall://host:port/path` works wherever fsspec does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from whalefall.fs.client.filesystem import FileSystemClient
    from whalefall.fs.cluster import LocalCluster
    from whalefall.fs.errors import ClusterError, FsError, StorageError
    from whalefall.fs.fsspec import WhalefallFileSystem
    from whalefall.fs.kvcache import KVCache

__all__ = [
    "ClusterError",
    "FileSystemClient",
    "FsError",
    "KVCache",
    "LocalCluster",
    "StorageError",
    "WhalefallFileSystem",
]

_WHERE = {
    "ClusterError": "errors",
    "FileSystemClient": "client.filesystem",
    "FsError": "errors",
    "KVCache": "kvcache",
    "LocalCluster": "cluster",
    "StorageError": "errors",
    "WhalefallFileSystem": "fsspec",
}


def __getattr__(name: str) -> Any:
    # Lazily: a storage process needs no fsspec, a client no engine.
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"whalefall.fs.{_WHERE[name]}"), name)
