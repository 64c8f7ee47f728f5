"""File-system room: files over a connection — names from metadata servers, bytes from chunks.

In: paths, offsets, buffers. Out: bytes read and written, striped over chains, many chunks at once.
Holes read as zeros. A length is reported when a file is synced or closed.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import msgspec

from whalefall.comm import crc32c
from whalefall.errors import ConfigError, WhalefallError
from whalefall.fs.client.connection import Connection, answers, nobody
from whalefall.fs.client.forks import renew_in_children
from whalefall.fs.client.ranges import WINDOW_BYTES, Range, check_bounds, read_each
from whalefall.fs.core.effects import Unreachable
from whalefall.fs.core.layout import chunk_id
from whalefall.fs.core.messages import Failed, Kind, NodeInfo
from whalefall.fs.errors import ClusterError, FsError, StorageError, fs_error
from whalefall.fs.meta.core.paths import WRITE
from whalefall.fs.meta.core.records import Inode, InodeKind
from whalefall.fs.meta.service import Answer, Who
from whalefall.fs.rpc import Call
from whalefall.fs.tokens import find_token

__all__ = ["FileSystemClient", "Range", "parse_url"]

BATCH_BYTES = 4 << 20
KEEP_ALIVE_S = 60.0


def parse_url(url: str) -> tuple[list[tuple[str, int]], str]:
    """Manager addresses and path of `whalefall://host:port[,host:port]/path`."""
    rest = url.removeprefix("whalefall://")
    places, slash, path = rest.partition("/")
    managers = []
    for place in places.split(","):
        host, colon, port = place.rpartition(":")
        if not colon or not host or not port.isdigit():
            raise ConfigError(f"fs: got {url!r}, wanted whalefall://host:port/path")
        managers.append((host, int(port)))
    return managers, slash + path


def _token(managers: list[tuple[str, int]], token: str | None) -> bytes:
    """The cluster's token; where none is known, what is missing may be the cluster."""
    try:
        return find_token(*managers[0], token)
    except ClusterError:
        if not any(answers(place) for place in managers):
            raise nobody(managers) from None
        raise


class FileSystemClient:
    """One process's way into a cluster; threads may share it, forked children go on with it.

    Args:
        managers: addresses of the cluster managers.
        token: the cluster's secret; default: as `find_token` finds it.
        uid, gid, groups: who asks; default: this process's user.
        retry_s: how long an operation is tried.
    """

    def __init__(
        self, managers: list[tuple[str, int]], token: str | None = None, uid: int | None = None,
        gid: int | None = None, groups: Sequence[int] | None = None, retry_s: float = 60.0,
    ) -> None:  # fmt: skip
        self.connection = Connection(managers, _token(managers, token), retry_s)
        self.uid = os.getuid() if uid is None else uid
        self.gid = os.getgid() if gid is None else gid
        self.groups = tuple(os.getgroups() if groups is None else groups)
        self.retry_s = retry_s
        self._begin()
        renew_in_children(self)

    def _begin(self) -> None:
        self._requests = itertools.count(1)
        self._open: set[tuple[int, str]] = set()
        self._stop = threading.Event()
        self._keeper: threading.Thread | None = None
        self._mutex = threading.Lock()

    def after_fork(self) -> None:
        """In a forked child: no request made, no file open; what is open stays the parent's."""
        self._begin()

    # ---- metadata

    def meta(self, name: str, /, **args: Any) -> Any:
        """One metadata operation, run once, tried on every server.

        Raises: FsError; ClusterError if no server answered in time.
        """
        client, number = self.connection.client, next(self._requests)
        who = Who(client, number, self.uid, self.gid, self.groups)
        call, end_s = Call(name, {"who": who, "args": args}), time.monotonic() + self.retry_s
        while True:
            answer = msgspec.convert(self._ask(call), Answer)
            if answer.errno != errno.EAGAIN or time.monotonic() > end_s:
                return self._value(answer)
            time.sleep(0.05)  # a server that has just started does not know the chains yet

    def meta_many(self, calls: Sequence[tuple[str, dict[str, Any]]]) -> list[Answer]:
        """Several reading operations in one round trip."""
        who = Who(self.connection.client, 0, self.uid, self.gid, self.groups)
        answers = self._ask(Call("many", {"who": who, "calls": calls}))
        return msgspec.convert(answers, list[Answer])

    def _value(self, answer: Answer) -> Any:
        if answer.errno:
            raise fs_error(answer.errno, answer.path, answer.detail)
        return answer.value

    def _servers(self) -> list[NodeInfo]:
        nodes = self.connection.core.routing.nodes.values()
        servers = [info for info in nodes if info.kind == "meta"]
        if len(servers) > 1:
            random.shuffle(servers)
        return servers

    def _ask(self, call: Call) -> Any:
        end_s, pause_s, last = time.monotonic() + self.retry_s, 0.02, "none is known"
        while True:
            for info in self._servers():
                try:
                    reply, _ = self.connection.pool.call((info.host, info.port), call, b"", 10.0)
                except Unreachable as error:
                    last = str(error)
                    continue
                if isinstance(reply, Failed):
                    last = reply.reason
                    continue
                return reply.value
            if time.monotonic() > end_s:
                raise ClusterError(
                    f"fs: no metadata server did {call.name} within {self.retry_s} s; last: {last}"
                )
            routing = self.connection.refresh()
            if routing is not None:
                self.connection.core.apply_routing(routing)
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, 0.5)

    def stat(self, path: str, follow: bool = True, wanted: int = 0) -> Inode:
        """Attributes of what is at a path, if the mode bits allow `wanted` (4 read, 2 write)."""
        return msgspec.convert(self.meta("stat", path=path, follow=follow, wanted=wanted), Inode)

    def listdir(self, path: str) -> Iterator[tuple[str, Inode]]:
        """Names and attributes of a directory, in order, a page at a time."""
        after = ""
        while True:
            page = msgspec.convert(
                self.meta("list", path=path, after=after), list[tuple[str, Inode]]
            )
            yield from page
            if len(page) < 1000:
                return
            after = page[-1][0]

    def walk(self, path: str) -> Iterator[tuple[str, Inode]]:
        """Everything below a directory, parents before children."""
        for name, inode in self.listdir(path):
            child = f"{path.rstrip('/')}/{name}"
            yield child, inode
            if inode.kind is InodeKind.DIRECTORY:
                yield from self.walk(child)

    # ---- open files

    def open_session(self, operation: str, **args: Any) -> tuple[Inode, str]:
        """Open a file by `open`, `create` or `begin`; returns its inode and session."""
        session = uuid.uuid4().hex[:16]
        inode = msgspec.convert(self.meta(operation, session=session, **args), Inode)
        self._open.add((inode.id, session))
        with self._mutex:
            if self._keeper is None:
                self._keeper = threading.Thread(target=self._keep_alive, daemon=True)
                self._keeper.start()
        return inode, session

    def close_session(self, inode: Inode, session: str, length: int = -1) -> None:
        """Close a file, with how far this writer's writes reach (-1: nothing was written)."""
        self._open.discard((inode.id, session))
        self.meta(
            "close", inode=inode.id, session=session, length=length,
            truncate_version=inode.truncate_version,
        )  # fmt: skip

    def forget_session(self, inode: Inode, session: str) -> None:
        """A session that `publish` has closed."""
        self._open.discard((inode.id, session))

    def _keep_alive(self) -> None:
        while not self._stop.wait(KEEP_ALIVE_S):
            if self._open:
                try:
                    self._ask(Call("keep_alive", {"client": self.connection.client}))
                except ClusterError:
                    continue

    # ---- bytes

    def read_ranges(self, ranges: Sequence[Range], relaxed: bool = False) -> list[int]:
        """A batch of reads.

        Returns: bytes read of each: fewer only at the end of its file.
        Raises: StorageError; FsError (ESTALE) for a file that was removed and collected meanwhile.
        """
        results = read_each(self.connection, self.gone, ranges, relaxed, stop=True)
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results  # type: ignore[return-value]

    def read_each(self, ranges: Sequence[Range]) -> list[int | FsError | StorageError]:
        """As `read_ranges`, with the error of each range that could not be read in its place."""
        return read_each(self.connection, self.gone, ranges)

    def gone(self, numbers: Iterable[int]) -> set[int]:
        """Which of these inodes are no more: their chunks are being collected, or have been."""
        asked = sorted(numbers)
        if not asked:
            return set()
        answers = self.meta_many([("stat_inode", {"inode": number}) for number in asked])
        return {n for n, a in zip(asked, answers, strict=True) if a.errno == errno.ENOENT}

    def read(self, inode: Inode, offset: int, length: int) -> bytearray:
        """Bytes of a file, fewer at its end."""
        length = max(0, min(length, inode.length - max(offset, 0)))
        data = bytearray(length)
        self.read_ranges([Range(inode, offset, length, data)])
        return data

    def write(self, inode: Inode, offset: int, data: Any) -> None:
        """Write bytes at an offset; returns when every replica has them.

        The file's length follows when it is reported (`close_session`, `report_length`). No
        permission is asked for: who opened the file had it.
        Raises: StorageError; FsError (EINVAL, EFBIG) for the offset.
        """
        for part in self.begin_write(inode, offset, data):
            part.result()

    def begin_write(self, inode: Inode, offset: int, data: Any) -> list[Future[Any]]:
        """As `write`, without waiting: every replica has a chunk once its future says so.

        Args:
            data: must not change before the last future is done.
        """
        layout = inode.layout
        assert layout is not None
        view = memoryview(data).cast("B")
        check_bounds(inode, offset, view.nbytes)
        size, at = layout.chunk_bytes, 0
        batches: dict[int, list[list[tuple[Any, ...]]]] = {}
        fits = max(1, BATCH_BYTES // size)
        while at < view.nbytes:
            index, inside = divmod(offset + at, size)
            take = min(size - inside, view.nbytes - at)
            chain, part = layout.chains[index % len(layout.chains)], view[at : at + take]
            update = (chain, chunk_id(inode.id, index), Kind.WRITE, inside, take, size, part)
            of_chain = batches.setdefault(chain, [[]])
            if len(of_chain[-1]) == fits:
                of_chain.append([])
            of_chain[-1].append(update)
            at += take
        jobs = [batch for of_chain in batches.values() for batch in of_chain]
        if len(jobs) == 1:
            done: Future[Any] = Future()
            try:
                done.set_result(self.connection.update_all(jobs[0]))
            except WhalefallError as error:
                done.set_exception(error)
            return [done]
        return [self.connection.threads.submit(self.connection.update_all, job) for job in jobs]

    def report_length(self, inode: Inode, length: int) -> Inode:
        """fsync: make the length of what was written known."""
        return msgspec.convert(
            self.meta("report", inode=inode.id, length=length,
                      truncate_version=inode.truncate_version), Inode,
        )  # fmt: skip

    def truncate(self, inode: Inode, length: int) -> Inode:
        """Set a file's length: cut its chunks, then make the length known.

        What was written and never reported is cut as well, so that a longer file ends in zeros.
        Not for a file that another is writing.
        Raises: FsError: EINVAL, EFBIG for the length, EACCES; nothing was cut then. StorageError.
        """
        check_bounds(inode, length)
        self.meta("stat_inode", inode=inode.id, wanted=WRITE)
        self.cut(inode, length)
        return msgspec.convert(self.meta("set_length", inode=inode.id, length=length), Inode)

    def cut(self, inode: Inode, length: int | None = None) -> None:
        """Remove what chunks hold beyond the length that was reported, or beyond a smaller one."""
        layout = inode.layout
        assert layout is not None
        known = self.report_length(inode, 0).length
        length = known if length is None else min(length, known)
        size, stripe = layout.chunk_bytes, layout.chains
        end = self.connection.stored_end(inode)
        if end <= length:
            return

        def drop(index: int) -> None:
            chain = stripe[index % len(stripe)]
            self.connection.update(chain, chunk_id(inode.id, index), Kind.REMOVE, 0, 0, size, b"")

        list(self.connection.threads.map(drop, range(-(-length // size), -(-end // size))))
        if length % size:
            index = length // size
            self.connection.update(
                stripe[index % len(stripe)], chunk_id(inode.id, index), Kind.TRUNCATE, 0,
                length % size, size, b"",
            )  # fmt: skip

    def checksum(self, inode: Inode) -> int:
        """CRC-32C of a whole file."""
        crc = 0
        for offset in range(0, inode.length, WINDOW_BYTES):
            crc = crc32c(self.read(inode, offset, WINDOW_BYTES), crc)
        return crc

    def close(self) -> None:
        """Close what is open and drop all connections."""
        self._stop.set()
        self.connection.close()
