"""File-system room: an open file as fsspec has it.

In: reads, or bytes written in blocks. Out: a file that appears when it is closed, and not at all if
a write failed, or the `with` block of the file itself raised. A bare `close()` says nothing of an
exception, so whoever calls it (the `with` of `fsspec.open` does) names what was written so far.
"""

from __future__ import annotations

import contextlib
import io
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, wait
from typing import Any

from fsspec.spec import AbstractBufferedFile

from whalefall.errors import WhalefallError
from whalefall.fs.errors import FsError, StorageError
from whalefall.fs.meta.core.records import Inode

__all__ = ["WhalefallFile"]
AHEAD_BYTES = 64 << 20


class WhalefallFile(AbstractBufferedFile):
    """An open file. "wb" and "xb" write a nameless file that gets its name at `close`.

    "ab" writes from the length it found: of two that append at once, one overwrites the other.

    Args:
        fs: the `WhalefallFileSystem` that opens it.
        autocommit: name it at `close`; otherwise `commit` does, or `discard` drops it.
    """

    forced: bool
    buffer: io.BytesIO

    def __init__(
        self, fs: Any, path: str, mode: str, block_size: int, autocommit: bool,
        **options: Any,
    ) -> None:  # fmt: skip
        client = fs.client
        self.inode: Inode | None = None
        self.session = ""
        self._owner = client.connection.client
        self._begun: deque[tuple[int, list[Future[Any]]]] = deque()
        self._failed: Exception | None = None
        self._sent = False
        start = 0
        if mode in ("wb", "xb"):
            fs._check_target(path, exclusive=mode == "xb")
            self.inode, self.session = client.open_session("begin", mode=0o644, layout=fs.layout)
        elif mode == "ab":
            fs._parents(path)
            self.inode, self.session = client.open_session(
                "create", path=path, mode=0o644, layout=fs.layout
            )
            start = self.inode.length
        elif mode == "rb":
            self.inode, self.session = client.open_session("open", path=path)
            options["size"] = self.inode.length
        super().__init__(fs, path, mode, block_size, autocommit, **options)
        if mode == "ab":
            self.offset = start
            self.loc = start

    def _initiate_upload(self) -> None:
        if self.mode != "ab":
            self.offset = 0

    def write(self, data: Any) -> int:
        """Add bytes at the end; whole blocks go from the caller's memory, without a copy.

        Chunks may still be on their way when this returns; `close` waits for all of them, and
        raises what kept one from being written. A file that failed once stays failed: each later
        `write`, `flush` and `close` raises the same.
        """
        self._check()
        view = memoryview(data).cast("B")
        straight = view.nbytes // self.blocksize * self.blocksize
        if self.mode == "rb" or self.closed or self.forced or not straight or self.buffer.tell():
            return int(super().write(data))
        if self.offset is None:
            self._initiate_upload()
        self._send(view[:straight])
        if not isinstance(data, bytes):
            self._settle()  # the caller may change it
        self.offset += straight
        self.loc += straight
        if straight < view.nbytes:
            super().write(view[straight:])
        return view.nbytes

    def _send(self, view: memoryview) -> None:
        """Begin to write at the offset; the memory stays as it is until `_settle`."""
        self._sent = True
        with self._failing():
            parts = self.fs.client.begin_write(self.inode, self.offset, view)
            self._begun.append((view.nbytes, parts))
            while sum(count for count, _ in self._begun) > AHEAD_BYTES:
                self._settle(len(self._begun) - 1)

    def _settle(self, but: int = 0) -> None:
        """Wait until what was begun is on every replica, all but the last few blocks."""
        with self._failing():
            while len(self._begun) > but:
                for part in self._begun[0][1]:
                    part.result()
                self._begun.popleft()

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """What is raised within is remembered: nobody knows what the file holds after it."""
        try:
            yield
        except Exception as error:
            self._failed = self._failed or error
            raise
        except BaseException:
            self._failed = self._failed or StorageError(
                5, f"fs: {self.path}: a write was interrupted; open the file and write it again"
            )
            raise

    @property
    def _inherited(self) -> bool:
        """This is a forked child's copy of a file that its parent has open."""
        return bool(self.fs.client.connection.client != self._owner)

    def _check(self) -> None:
        if self._inherited and self.mode != "rb":
            raise StorageError(
                5, f"fs: {self.path} was opened for writing before a fork; only the process that "
                "opened it writes it: open it here"
            )  # fmt: skip
        if self._failed is not None:
            raise self._failed

    def flush(self, force: bool = False) -> None:
        """Write what is buffered, once it fills a block."""
        if self.closed:
            raise ValueError("I/O operation on a closed file")
        self._check()
        if force and self.forced:
            raise ValueError("Force flush cannot be called more than once")
        if force:
            self.forced = True
        if self.readable() or (not force and self.buffer.tell() < self.blocksize):
            return
        if self.offset is None:
            self._initiate_upload()
        with self._failing():
            self._upload_chunk(final=force)
        self.offset += self.buffer.seek(0, 2)
        self.buffer = io.BytesIO()

    def _upload_chunk(self, final: bool = False) -> bool:
        data = self.buffer.getbuffer()
        if data.nbytes:
            self._send(data)
        end = self.offset + data.nbytes
        del data
        if final:
            self._settle()
            self.end = end
            if self.mode == "ab":
                self.fs.client.close_session(self.inode, self.session, end)
            elif self.autocommit:
                self.commit()
        return True

    def commit(self) -> None:
        """Give the file its name, once it was closed (`autocommit` off)."""
        self._check()
        assert self.inode is not None
        self.fs.client.meta(
            "publish", inode=self.inode.id, path=self.path, session=self.session,
            length=self.end, replace=self.mode != "xb",
        )  # fmt: skip
        self.fs.client.forget_session(self.inode, self.session)

    def discard(self) -> None:
        """Throw away what was written."""
        if self._inherited:
            self._check()
        assert self.inode is not None
        for _, parts in self._begun:
            wait(parts)
        try:
            if self.mode == "ab" and self._sent:
                self.fs.client.cut(self.inode)  # or it would come back when the file grows
        finally:
            self.fs.client.close_session(self.inode, self.session)

    def _fetch_range(self, start: int, end: int) -> bytes:
        assert self.inode is not None
        return bytes(self.fs.client.read(self.inode, start, end - start))

    def close(self) -> None:
        """Write what is left, end the session.

        Raises: what a write has failed with, now or before; the file gets no name then.
        Or ClusterError if no metadata server answered in time: the file may have its name or not.
        """
        if self.closed:
            return
        try:
            self._check()
            super().close()
        except BaseException:
            self._give_up()
            raise
        if self.mode == "rb" and self.inode is not None and not self._inherited:
            with contextlib.suppress(FsError):
                self.fs.client.close_session(self.inode, self.session)

    def _give_up(self) -> None:
        """End the session of a file that could not be written whole."""
        self.closed = True
        if self._inherited:
            return  # the session and what is on its way are the parent's
        with contextlib.suppress(WhalefallError):
            self.discard()

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        # A block that failed has not written what it meant to: its file gets no name.
        if kind is not None and self.mode != "rb" and not self.closed:
            self._give_up()
        else:
            self.close()

    def __del__(self) -> None:
        # A file that nobody closed is not published: half a file must not look whole.
        if not getattr(self, "closed", True) and self.mode != "rb":
            self.closed = True
