"""File-system room: the main program of each server process (`python -m whalefall.fs.process`).

The one argument is a JSON file: role (manager, meta, storage), addresses, folders, times. The
process prints a line `ready HOST:PORT` once it serves, and ends cleanly on SIGTERM.
"""

from __future__ import annotations

import gc
import logging
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec

from whalefall.comm import read_token
from whalefall.fs.core.replica import Limits
from whalefall.fs.lock import FolderLock

__all__ = ["Settings", "main"]

LEFT_S = 5.0  # a killed process of the same name is gone within this


class Settings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One process of a cluster.

    Attributes:
        role: manager, meta or storage.
        number: the node's number (storage and meta).
        folder: storage: its targets; manager and meta: where kv.sqlite lies.
        managers: "host:port" of all managers.
        lease_s: T.
        ready: a file to write the address to once it serves.
    """

    role: str
    number: int = 0
    folder: str
    managers: list[str]
    token_file: str
    host: str = "127.0.0.1"
    port: int = 0
    lease_s: float = 10.0
    scrub_s: float = 3600.0
    reserve_bytes: int = 16 << 20
    ready: str = ""


def addresses(texts: list[str]) -> list[tuple[str, int]]:
    """host:port texts as pairs."""
    return [(t.rpartition(":")[0], int(t.rpartition(":")[2])) for t in texts]


def own(settings: Settings) -> FolderLock:
    """The process's lock: a storage node's folder is its own, the others share one.

    Raises: ConfigError: a process of that name serves there.
    """
    name = "lock" if settings.role == "storage" else f"{settings.role}-{settings.number}.lock"
    return FolderLock(Path(settings.folder), name, LEFT_S)


def build(settings: Settings) -> Any:
    """The server that the settings describe, not started."""
    token = read_token(settings.token_file)
    folder = Path(settings.folder)
    where: dict[str, Any] = {"host": settings.host, "port": settings.port}
    if settings.role == "storage":
        from whalefall.fs.storage.server import StorageServer

        lease = settings.lease_s
        limits = Limits(lease, max(0.5, lease / 2), 30.0, 0.02)
        return StorageServer(
            settings.number, folder, addresses(settings.managers), token, limits,
            scrub_s=settings.scrub_s, reserve_bytes=settings.reserve_bytes, **where,
        )  # fmt: skip
    from whalefall.fs.kv import SqliteKV

    store = SqliteKV(folder / "kv.sqlite")
    if settings.role == "manager":
        from whalefall.fs.manager.server import ManagerServer

        return ManagerServer(store, settings.lease_s, token, **where)
    from whalefall.fs.meta.server import MetaServer

    return MetaServer(
        settings.number, store, addresses(settings.managers), token, settings.lease_s, **where
    )


def main(argv: list[str]) -> None:
    """Run one server until SIGTERM."""
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    settings = msgspec.json.decode(Path(argv[0]).read_bytes(), type=Settings)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    lock = own(settings)
    server = build(settings)
    server.start()
    address = f"{server.server.host}:{server.server.port}"
    if settings.ready:
        path = Path(settings.ready)
        temporary = path.with_suffix(".new")
        temporary.write_text(address)
        temporary.replace(path)
    logging.info("ready %s", address)
    # What is there now stays; requests leave no cycles behind, so few passes are enough.
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    stop.wait()
    server.stop()
    lock.release()


if __name__ == "__main__":
    main(sys.argv[1:])
