"""File-system room: a metadata server as a process; any number over one store.

It answers calls, reports to the manager, and in the background collects nameless files, ends the
sessions of clients that are gone, and settles the length of what those were writing.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from whalefall.errors import WhalefallError
from whalefall.fs.core.effects import Refused, Unreachable
from whalefall.fs.core.layout import chunk_id, chunk_index, chunk_prefix
from whalefall.fs.core.messages import Code, Done, Heartbeat, HeartbeatDone, Kind, NodeInfo, Routing
from whalefall.fs.kv import KeyValue, Transaction
from whalefall.fs.meta.core import files
from whalefall.fs.meta.core.records import Inode, load_inode
from whalefall.fs.meta.service import MetaService, Who
from whalefall.fs.rpc import Call, Pool, Result, Server

__all__ = ["MetaServer"]
log = logging.getLogger("whalefall.fs")
SILENT_S = 300.0


class MetaServer:
    """A metadata server.

    Args:
        number: its node number (1001 and up).
        silent_s: a client not heard for so long has left its files.
    """

    def __init__(
        self, number: int, store: KeyValue, managers: list[tuple[str, int]], token: bytes,
        lease_s: float, host: str = "127.0.0.1", port: int = 0, silent_s: float = SILENT_S,
    ) -> None:  # fmt: skip
        self.managers, self.token, self.lease_s, self.silent_s = managers, token, lease_s, silent_s
        self.pool = Pool(token)
        self.server = Server(self._handle, token, host, port)
        self.info = NodeInfo(number, "meta", host, self.server.port, int(time.time() * 1000))
        self.routing = Routing()
        self.service = MetaService(store, time.time, self._chains)
        self._seq = 0
        self._stop = threading.Event()
        self._collecting = threading.Lock()
        self._threads = [
            threading.Thread(target=loop, name=loop.__name__, daemon=True)
            for loop in (self._beat, self._upkeep)
        ]

    def start(self) -> None:
        """Serve and report."""
        self.server.start()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop serving."""
        self._stop.set()
        self.server.close()
        for thread in self._threads:
            thread.join(2)

    def _chains(self) -> tuple[int, ...]:
        return self.routing.tables.get(1, ())

    # ---- calls

    def _handle(self, message: Any, payload: memoryview) -> tuple[Any, Sequence[Any]]:
        if isinstance(message, Routing):
            if message.version > self.routing.version:
                self.routing = message
            return Done(), ()
        if not isinstance(message, Call):
            raise Refused(Code.PROTOCOL, f"a metadata server takes no {type(message).__name__}")
        if message.name == "keep_alive":
            self.service.keep_alive(message.args["client"])
            return Result(None), ()
        if message.name == "gc":
            return Result(self.collect()), ()
        if message.name == "many":
            who = _who(message.args["who"])
            return Result(self.service.call_many(who, message.args["calls"])), ()
        who = _who(message.args["who"])
        return Result(self.service.call(message.name, who, message.args["args"])), ()

    # ---- the manager

    def _beat(self) -> None:
        while not self._stop.is_set():
            self._heartbeat()
            self._stop.wait(self.lease_s / (10 if self.routing.tables else 40))

    def _heartbeat(self) -> None:
        self._seq += 1
        message = Heartbeat(self.info, self._seq, self.routing.version)
        for address in self.managers:
            with contextlib.suppress(Unreachable):
                reply, _ = self.pool.call(address, message, b"", self.lease_s / 2)
                if isinstance(reply, HeartbeatDone):
                    if reply.routing is not None:
                        self.routing = reply.routing
                    return

    # ---- upkeep

    def _upkeep(self) -> None:
        while not self._stop.wait(5.0):
            try:
                self.prune()
                self.collect()
                self.service.forget_results()
            except WhalefallError as error:
                log.info("fs: upkeep will go on later: %s", error)
            except Exception:
                log.exception("fs: upkeep failed")

    def _connection(self) -> Any:
        from whalefall.fs.client.connection import Connection

        return Connection(self.managers, self.token, retry_s=30.0)

    def collect(self) -> int:
        """Remove the chunks of files that have no name and are not open; returns how many."""
        if not self._collecting.acquire(blocking=False):
            return 0
        collected = 0
        connection = None
        try:
            for number, _ in self.service.store.read(files.garbage):
                inode = self.service.store.transact(partial(_swap, files.condemn, number))
                if inode is None:
                    continue
                connection = connection or self._connection()
                remove_chunks(connection, inode)
                self.service.store.transact(partial(_swap, files.forget, number))
                collected += 1
        finally:
            if connection is not None:
                connection.close()
            self._collecting.release()
        return collected

    def prune(self) -> int:
        """End the sessions of clients that are gone; returns how many."""
        dead = self.service.dead_sessions(self.silent_s)
        if not dead:
            return 0
        connection = self._connection()
        try:
            for key, number, wrote in dead:
                if wrote:  # a reader knows nothing of a length
                    self._settle(connection, number)
                self.service.store.transact(partial(_swap, Transaction.delete, key))
        finally:
            connection.close()
        return len(dead)

    def _settle(self, connection: Any, number: int) -> None:
        """A writer is gone: the file reaches as far as its chunks do."""
        store = self.service.store
        with contextlib.suppress(Exception):
            inode = store.read(lambda t: load_inode(t, number))
            end = connection.stored_end(inode)
            who = Who("", 0, 0, 0)
            args = {"inode": number, "length": end, "truncate_version": inode.truncate_version}
            self.service.call("report", who, args)


def _who(value: Any) -> Who:
    client, request, uid, gid, groups = value
    return Who(str(client), int(request), int(uid), int(gid), tuple(groups))


def remove_chunks(connection: Any, inode: Inode) -> int:
    """Remove all chunks of a file; returns how many there were."""
    if inode.layout is None:
        return 0
    stripe = inode.layout.chains
    last = -1
    for chain in set(stripe):
        found = connection.query(chain, chunk_prefix(inode.id))
        if found.chunk is not None:
            last = max(last, chunk_index(found.chunk))

    def remove(index: int) -> None:
        chain = stripe[index % len(stripe)]
        connection.update(chain, chunk_id(inode.id, index), Kind.REMOVE, 0, 0, 0, b"")

    list(connection.threads.map(remove, range(last + 1)))
    return last + 1


def _swap(function: Callable[[Transaction, Any], Any], argument: Any, t: Transaction) -> Any:
    """A function of (transaction, argument) as one of a transaction."""
    return function(t, argument)
