"""File-system room: metadata operations by name, each one transaction, run once.

In: a name, arguments, who asks. Out: a result or an errno. A changing request leaves its result in
the store, so that its retry (a lost answer, another server) finds it instead of running again.
"""

from __future__ import annotations

import errno
import inspect
import threading
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from whalefall.fs.core.layout import stripe
from whalefall.fs.kv.interface import KeyValue, Transaction
from whalefall.fs.meta.core import attributes, directories, files
from whalefall.fs.meta.core.records import Context, Layout, MetaError, Session, load, save, span

__all__ = ["Answer", "MetaService", "Who"]

REMEMBER_S = 1800.0
ID_BLOCK = 4096
DEFAULT_CHUNK_BYTES = 1 << 20
DEFAULT_STRIPE = 8
MIN_CHUNK_BYTES, MAX_CHUNK_BYTES = 64 << 10, 64 << 20


class Who(msgspec.Struct, frozen=True, array_like=True):
    """The caller: client, number of its request (0: no need to run it once), user."""

    client: str
    request: int
    uid: int
    gid: int
    groups: tuple[int, ...] = ()


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """A result, or an errno with its path and detail."""

    value: Any = None
    errno: int = 0
    path: str = ""
    detail: str = ""
    time: float = 0.0


_ANSWER = msgspec.msgpack.Decoder(Answer)


@dataclass(frozen=True)
class Operation:
    """A function of a transaction, and how its arguments are typed."""

    function: Callable[..., Any]
    writes: bool
    hints: dict[str, Any]
    with_context: bool
    required: frozenset[str]


READS: dict[str, Callable[..., Any]] = {
    "stat": attributes.stat_path, "stat_inode": attributes.stat_inode,
    "list": attributes.list_directory, "readlink": attributes.readlink,
    "access": attributes.access, "garbage": files.garbage, "sessions": files.sessions,
}  # fmt: skip
WRITES: dict[str, Callable[..., Any]] = {
    "mkdir": directories.mkdir, "symlink": directories.symlink, "link": directories.link,
    "remove": directories.remove, "rename": directories.rename, "create": files.create,
    "open": files.open_file, "begin": files.begin_file, "publish": files.publish,
    "report": files.report_length, "set_length": files.set_length, "close": files.close_file,
    "set_attributes": attributes.set_attributes, "condemn": files.condemn, "forget": files.forget,
}  # fmt: skip


def _operation(function: Callable[..., Any], writes: bool) -> Operation:
    names = inspect.signature(function).parameters
    given = list(names)[1 + ("context" in names) :]  # the caller does not pass the transaction
    types = typing.get_type_hints(function)
    hints = {name: types[name] for name in given}
    needed = frozenset(name for name in given if names[name].default is inspect.Parameter.empty)
    return Operation(function, writes, hints, "context" in names, needed)


OPERATIONS = {n: _operation(f, False) for n, f in READS.items()} | {
    n: _operation(f, True) for n, f in WRITES.items()
}


class MetaService:
    """Stateless but for a block of inode numbers; any number of them share one store.

    Args:
        store: the key-value store.
        clock: seconds since 1970.
        chains: the current chain table.
    """

    def __init__(
        self, store: KeyValue, clock: Callable[[], float], chains: Callable[[], tuple[int, ...]]
    ) -> None:
        self.store, self.clock, self.chains = store, clock, chains
        self._mutex = threading.Lock()
        self._next = self._end = 0
        now = clock()
        store.transact(lambda t: directories.format_root(t, now))

    # ---- numbers and layouts

    def new_inode(self) -> int:
        """An inode number nobody else gets."""
        with self._mutex:
            if self._next == self._end:
                self._next = self.store.transact(self._take_block)
                self._end = self._next + ID_BLOCK
            self._next += 1
            return self._next - 1

    @staticmethod
    def _take_block(t: Transaction) -> int:
        key = b"SING/inodes"
        start = load(t.get(key), int) or ID_BLOCK
        save(t, key, start + ID_BLOCK)
        return start

    def layout(self, number: int, chunk_bytes: int = 0, width: int = 0) -> Layout:
        """A new file's layout.

        Raises: MetaError(EINVAL) for a chunk size that is no power of two from 64 KiB to 64 MiB.
        """
        size = chunk_bytes or DEFAULT_CHUNK_BYTES
        if size & (size - 1) or not MIN_CHUNK_BYTES <= size <= MAX_CHUNK_BYTES:
            raise MetaError(
                errno.EINVAL, f"chunk size {size}", "a power of two from 65536 to 67108864"
            )
        table = self.chains()
        if not table:
            raise MetaError(errno.EAGAIN, "", "the cluster has no chains yet")
        return Layout(stripe(table, width or DEFAULT_STRIPE, number), size)

    # ---- calls

    def call(self, name: str, who: Who, args: dict[str, Any]) -> Answer:
        """Run one operation."""
        operation = OPERATIONS.get(name)
        if operation is None:
            return Answer(errno=errno.ENOSYS, path=name)
        try:
            keywords = self._keywords(operation, args)
        except (msgspec.ValidationError, TypeError) as error:
            return Answer(errno=errno.EINVAL, path=name, detail=str(error))
        except MetaError as error:
            return Answer(errno=error.errno, path=error.path, detail=error.detail)
        context = Context(
            who.client, who.request, who.uid, who.gid, who.groups, self.clock(), self.new_inode
        )
        if not operation.writes:
            return self.store.read(lambda t: self._run(t, operation, context, keywords))
        return self.store.transact(lambda t: self._once(t, operation, context, keywords))

    def call_many(self, who: Who, calls: list[tuple[str, dict[str, Any]]]) -> list[Answer]:
        """Several reading operations, all of one snapshot."""
        context = Context(who.client, 0, who.uid, who.gid, who.groups, self.clock(), self.new_inode)

        def run(t: Transaction) -> list[Answer]:
            return [self._read_one(t, context, name, args) for name, args in calls]

        return self.store.read(run)

    def _read_one(
        self, t: Transaction, context: Context, name: str, args: dict[str, Any]
    ) -> Answer:
        operation = OPERATIONS.get(name)
        if operation is None or operation.writes:
            return Answer(errno=errno.ENOSYS, path=name, detail="only what reads")
        try:
            return self._run(t, operation, context, self._keywords(operation, args))
        except (msgspec.ValidationError, TypeError) as error:
            return Answer(errno=errno.EINVAL, path=name, detail=str(error))

    def _keywords(self, operation: Operation, args: dict[str, Any]) -> dict[str, Any]:
        args = dict(args)
        if operation.hints.get("layout") is Layout:
            chosen = args.pop("layout", None) or {}
            args["layout"] = self.layout(self.new_inode(), **chosen)
        unknown = set(args) - set(operation.hints)
        if unknown:
            raise TypeError(f"no argument {sorted(unknown)}")
        if missing := operation.required - set(args):
            raise TypeError(f"missing {sorted(missing)}")
        return {k: msgspec.convert(v, operation.hints[k]) for k, v in args.items()}

    def _run(
        self, t: Transaction, operation: Operation, context: Context, keywords: dict[str, Any]
    ) -> Answer:
        try:
            if operation.with_context:
                return Answer(operation.function(t, context, **keywords))
            return Answer(operation.function(t, **keywords))
        except MetaError as error:
            return Answer(errno=error.errno, path=error.path, detail=error.detail)

    def _once(
        self, t: Transaction, operation: Operation, context: Context, keywords: dict[str, Any]
    ) -> Answer:
        key = b"IDEM" + f"{context.client}/{context.request}".encode()
        if context.request:
            before = t.get(key)
            if before is not None:
                return _ANSWER.decode(before)
        answer = self._run(t, operation, context, keywords)
        if answer.errno:
            t.writes.clear()
        if context.request and answer.errno != errno.EAGAIN:
            save(t, key, msgspec.structs.replace(answer, time=context.now))
        return answer

    # ---- upkeep

    def keep_alive(self, client: str) -> None:
        """A client with open files is there."""
        now = self.clock()
        self.store.transact(lambda t: save(t, b"CLNT" + client.encode(), now))

    def dead_sessions(self, silent_s: float) -> list[tuple[bytes, int, bool]]:
        """Sessions of clients not heard for `silent_s`: (key, inode, wrote)."""
        now = self.clock()

        def find(t: Transaction) -> list[tuple[bytes, int, bool]]:
            found = []
            for key, value in t.range(*span(b"INOS"), snapshot=True):
                session = load(value, Session)
                if session is None:
                    continue
                stamp = load(t.get(b"CLNT" + session.client.encode(), snapshot=True), float)
                if now - max(stamp or 0.0, session.opened) > silent_s:
                    found.append((key, int.from_bytes(key[4:12], "little"), session.write))
            return found

        return self.store.read(find)

    def forget_results(self) -> int:
        """Drop results that no retry will ask for any more; returns how many."""
        limit = self.clock() - REMEMBER_S

        def drop(t: Transaction) -> int:
            rows = t.range(*span(b"IDEM"), snapshot=True)
            old = [key for key, value in rows if _time(value) < limit][:1000]
            for key in old:
                t.delete(key)
            return len(old)

        return self.store.transact(drop)


def _time(value: bytes) -> float:
    return _ANSWER.decode(value).time
