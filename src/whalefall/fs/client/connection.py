"""File-system room: a client's connection to a cluster — routing, storage calls, metadata calls.

In: a manager's address and the token. Out: chunk updates and batched chunk reads that try again
until they are done, or an error that says which target, what was tried, for how long.
"""

from __future__ import annotations

import concurrent.futures
import random
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar

from whalefall.comm import crc32c
from whalefall.fs.client.forks import renew_in_children
from whalefall.fs.core import effects
from whalefall.fs.core.client import ClientCore, Piece, RefreshRouting
from whalefall.fs.core.effects import Procedure, Refused, Unreachable
from whalefall.fs.core.layout import chunk_index, chunk_prefix
from whalefall.fs.core.messages import Code, Failed, Kind, QueryDone, Read, Routing, UpdateDone
from whalefall.fs.core.replica import Limits
from whalefall.fs.driver import attempt, call_all, drive, drive_all
from whalefall.fs.errors import ClusterError, StorageError
from whalefall.fs.meta.core.records import Inode
from whalefall.fs.rpc import Call, Pool, Result

__all__ = ["Connection", "answers", "nobody"]
T = TypeVar("T")
PARALLEL = 16
SHARED_BYTES = 1 << 20
LINES = 2


class Connection:
    """Shared by all threads of a process; a forked child gets a connection of its own from it.

    Args:
        managers: their addresses.
        token: the cluster's secret.
        retry_s: how long one operation is tried.
    """

    def __init__(
        self, managers: list[tuple[str, int]], token: bytes, retry_s: float = 60.0
    ) -> None:
        self.managers, self.retry_s = list(managers), retry_s
        self.pool = Pool(token)
        self._begin(Limits(retry_s=retry_s), Routing())
        renew_in_children(self)
        routing = self.refresh()
        if routing is None or not routing.version:
            raise nobody(self.managers)
        self.core.apply_routing(routing)
        call_s = max(0.5, min(10.0, routing.lease_s))
        self.core.limits = Limits(routing.lease_s, call_s, 30.0, 0.02, retry_s)

    def _begin(self, limits: Limits, routing: Routing) -> None:
        """A client that nobody has heard of yet."""
        self.client = uuid.uuid4().hex[:16]
        self.core = ClientCore(
            self.client, limits, time.monotonic, random.randrange, crc32c, routing
        )
        self.mutex = threading.RLock()
        self.threads = concurrent.futures.ThreadPoolExecutor(PARALLEL, "whalefall-fs")

    def after_fork(self) -> None:
        """Begin anew in a forked child, with what the parent knew of the cluster."""
        self.pool.after_fork()
        self._begin(self.core.limits, self.core.routing)

    def refresh(self) -> Routing | None:
        """Newer routing from whichever manager is primary, or None."""
        request = Call("routing", {"version": self.core.routing.version})
        for index, address in enumerate(list(self.managers)):
            try:
                reply, _ = self.pool.call(address, request, b"", 2.0)
            except Unreachable as error:
                if "token" in str(error):
                    raise ClusterError(f"fs: {error}") from None
                continue
            if not isinstance(reply, Failed):
                self.managers.insert(0, self.managers.pop(index))
            if isinstance(reply, Routing):
                return reply
        return None

    def manager(self, name: str, **args: Any) -> Any:
        """An operator's call to the primary manager.

        Raises: ClusterError if none answers or it refuses.
        """
        end_s = time.monotonic() + min(self.retry_s, 30.0)
        while True:
            last = "none is known"
            for address in self.managers:
                try:
                    reply, _ = self.pool.call(address, Call(name, args), b"", 10.0)
                except Unreachable as error:
                    last = str(error)
                    continue
                if isinstance(reply, Failed):
                    last = reply.reason
                    if reply.code.name == "NOT_PRIMARY":
                        continue
                    raise ClusterError(f"fs: {name}: {reply.reason}")
                return reply.value if isinstance(reply, Result) else reply
            if time.monotonic() > end_s:
                raise ClusterError(f"fs: {name}: no primary manager answered; last: {last}")
            time.sleep(0.05)

    def node(self, number: int, name: str, **args: Any) -> Any:
        """An operator's call to one node."""
        info = self.core.routing.nodes[number]
        reply, _ = self.pool.call((info.host, info.port), Call(name, args), b"", 30.0)
        if isinstance(reply, Failed):
            raise ClusterError(f"fs: node {number}: {name}: {reply.reason}")
        return reply.value

    # ---- effects

    def _perform(self, effect: Any) -> Any:
        if isinstance(effect, effects.Call):
            return self._call(effect)
        if isinstance(effect, effects.Calls):
            return self._all(effect.calls)
        if isinstance(effect, effects.Sleep):
            return time.sleep(effect.seconds)
        if isinstance(effect, RefreshRouting):
            return self.refresh()
        raise TypeError(f"no such effect: {effect!r}")

    def _address(self, node: int) -> tuple[str, int]:
        info = self.core.routing.nodes.get(node)
        if info is None:
            raise Unreachable(f"node {node} has no address")
        return info.host, info.port

    def _call(self, call: effects.Call) -> tuple[Any, Any]:
        address = self._address(call.node)
        return self.pool.call(address, call.message, call.data, call.timeout_s, call.into)

    def _all(self, calls: tuple[effects.Call, ...]) -> list[Any]:
        """Send all, then take the answers: the servers work at the same time, without threads.

        Small reads of one node share a connection, so each node is woken once; large ones take
        turns on a few: a server reads for one while it sends on another.
        """
        begun: list[Any] = []
        lines: dict[tuple[int, int], Any] = {}
        turn: Counter[int] = Counter()
        for call in calls:
            small = isinstance(call.message, Read) and _reply_bytes(call.message) <= SHARED_BYTES
            turn[call.node] += not small
            line = (call.node, 0 if small else 1 + turn[call.node] % LINES)
            try:
                address = self._address(call.node)
                channel = self.pool.begin(
                    address, call.message, call.data, call.timeout_s, lines.get(line)
                )
                lines[line] = channel
                begun.append((address, channel))
            except Unreachable as error:
                begun.append(error)
                lines.pop(line, None)
        left = Counter(id(state[1]) for state in begun if not isinstance(state, Unreachable))
        results: list[Any] = []
        for call, state in zip(calls, begun, strict=True):
            try:
                if isinstance(state, Unreachable):
                    raise state
                address, channel = state
                left[id(channel)] -= 1
                last = not left[id(channel)]
                results.append(self.pool.finish(address, channel, call.into, last))
            except Unreachable as error:
                results.append(error)
        return results

    def _drive(self, procedure: Procedure[T], what: str) -> T:
        try:
            return drive(procedure, self._perform, self.mutex)
        except Refused as refusal:
            raise self._named(refusal, what) from None

    def _named(self, error: Exception, what: str) -> StorageError:
        number = 28 if isinstance(error, Refused) and error.code is Code.NO_SPACE else 5
        return StorageError(number, f"fs: {what}: {error}")

    def _perform_all(self, asked: list[Any]) -> list[Any]:
        calls = [effect for effect in asked if isinstance(effect, effects.Call)]
        answers = iter(call_all(calls, self._call))
        return [
            next(answers) if isinstance(effect, effects.Call) else attempt(self._perform, effect)
            for effect in asked
        ]

    # ---- chunks

    def update_all(self, updates: Sequence[tuple[Any, ...]]) -> list[UpdateDone]:
        """Updates of different chunks, each exactly once; those of one chain travel together.

        Args:
            updates: the arguments of `update` for each.
        Raises: StorageError for the first that failed, once all have ended.
        """
        procedures = [self.core.update(*one) for one in updates]
        results = drive_all(procedures, self._perform_all, self.mutex)
        for one, result in zip(updates, results, strict=True):
            if isinstance(result, Exception):
                raise self._named(result, _what(*one[:3]))
        return results  # type: ignore[return-value]

    def update(
        self, chain: int, chunk: bytes, kind: Kind, offset: int, length: int, size: int, data: Any
    ) -> UpdateDone:
        """One update, exactly once.

        Raises: StorageError.
        """
        procedure = self.core.update(chain, chunk, kind, offset, length, size, data)
        return self._drive(procedure, _what(chain, chunk, kind))

    def read(self, pieces: list[Piece], relaxed: bool = False) -> None:
        """A batch of reads, each into its buffer.

        Raises: StorageError.
        """
        self._drive(self.core.read(pieces, relaxed), f"read {len(pieces)} pieces")

    def query(self, chain: int, prefix: bytes) -> QueryDone:
        """The last chunk under a prefix."""
        return self._drive(self.core.query(chain, prefix), f"query chain {chain}")

    def stored_end(self, inode: Inode) -> int:
        """Where the last chunk of a file ends, over all chains of its stripe."""
        end = 0
        if inode.layout is None:
            return 0
        for chain in set(inode.layout.chains):
            found = self.query(chain, chunk_prefix(inode.id))
            if found.chunk is not None:
                end = max(end, chunk_index(found.chunk) * inode.layout.chunk_bytes + found.length)
        return end

    def close(self) -> None:
        """Drop all connections."""
        self.threads.shutdown(wait=False)
        self.pool.close()


def answers(address: tuple[str, int]) -> bool:
    """Whether anybody takes connections there."""
    try:
        socket.create_connection(address, timeout=2.0).close()
    except OSError:
        return False
    return True


def nobody(managers: Sequence[tuple[str, int]]) -> ClusterError:
    """No manager is there."""
    places = ", ".join(f"{host}:{port}" for host, port in managers)
    return ClusterError(f"fs: no cluster manager answered at {places}; is it running?")


def _what(chain: int, chunk: bytes, kind: Kind) -> str:
    return f"{kind.name.lower()} chunk {chunk.hex()} of chain {chain}"


def _reply_bytes(message: Read) -> int:
    return sum(length for _, _, length in message.ios)
