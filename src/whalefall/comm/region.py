"""Comm room: shared-memory regions of a host, and the sweep of those that dead processes left.

A region is a file in /dev/shm on which every process that uses it holds a shared lock; the kernel
drops the lock when the process ends, however it ends. So a region on which an exclusive lock can
be had is nobody's, and `sweep` removes it. It is linked under its name only once it is locked
(O_TMPFILE), so no sweep can take it before. Also: regions without a name (memfd), handed to
another process over a Unix socket, which vanish with their last user by themselves.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import socket
from pathlib import Path
from types import TracebackType

from whalefall.errors import LimitError, MissingError

__all__ = ["FOLDER", "PREFIX", "Region", "sweep"]

FOLDER = Path("/dev/shm")
PREFIX = "whalefall-"
NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")


class Region:
    """A piece of memory that several processes see; make it with one of the class methods.

    Attributes:
        name: by which `attach` finds it, or None (memfd).
        nbytes: its size.
        view: its memory, writable; released by `close`.
    """

    def __init__(self, descriptor: int, nbytes: int, name: str | None, owner: bool) -> None:
        self.descriptor, self.nbytes, self.name, self.owner = descriptor, nbytes, name, owner
        self._map = mmap.mmap(descriptor, nbytes) if nbytes else None
        self.view = memoryview(self._map if self._map is not None else bytearray())

    @classmethod
    def create(cls, name: str, nbytes: int, reserve: bool = True) -> Region:
        """A new region under a name; zeros.

        Args:
            reserve: take its memory now, so that no write can fail later; else `reserve` must be
                called for a part before it is written.
        Raises: FileExistsError if the name is taken; LimitError if the host lacks the memory.
        """
        path = _path(name)
        descriptor = os.open(FOLDER, os.O_TMPFILE | os.O_RDWR, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if reserve:
                _reserve(descriptor, 0, nbytes, f"region {name}")
            else:
                os.ftruncate(descriptor, nbytes)
            # A directory descriptor makes Python use linkat, which can follow /proc's link.
            os.link(f"/proc/self/fd/{descriptor}", path, src_dir_fd=descriptor)
            return cls(descriptor, nbytes, name, owner=True)
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def attach(cls, name: str) -> Region:
        """Another process's region.

        Raises: MissingError if there is none of that name.
        """
        try:
            descriptor = os.open(_path(name), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise MissingError(f"comm: no region {name!r}; its owner ended, or not here") from None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        return cls(descriptor, os.fstat(descriptor).st_size, name, owner=False)

    @classmethod
    def anonymous(cls, nbytes: int) -> Region:
        """A new region without a name, for `send_to`; zeros, reserved.

        Raises: LimitError if the host lacks the memory.
        """
        descriptor = os.memfd_create("whalefall", os.MFD_CLOEXEC)
        try:
            _reserve(descriptor, 0, nbytes, "region")
            return cls(descriptor, nbytes, None, owner=True)
        except BaseException:
            os.close(descriptor)
            raise

    def reserve(self, offset: int, nbytes: int) -> None:
        """Take the memory of a part of a region that was created without.

        Raises: LimitError if the host lacks the memory.
        """
        _reserve(self.descriptor, offset, nbytes, f"part of region {self.name}")

    def release(self, offset: int, nbytes: int) -> None:
        """Give the memory of a part back to the host; its address space stays, as zeros.

        Args:
            offset: a multiple of the page size.
            nbytes: a multiple of the page size.
        """
        if self._map is not None and nbytes:
            self._map.madvise(mmap.MADV_REMOVE, offset, nbytes)

    def send_to(self, sock: socket.socket) -> None:
        """Hand the region over a connected Unix socket; the other side calls `receive`."""
        socket.send_fds(sock, [b"R"], [self.descriptor])

    @classmethod
    def receive(cls, sock: socket.socket, max_bytes: int = 1 << 40) -> Region:
        """The region that the other side sends with `send_to`.

        Raises: MissingError if no region came; LimitError if it is larger than `max_bytes`.
        """
        _, descriptors, _, _ = socket.recv_fds(sock, 1, 1)
        if not descriptors:
            raise MissingError("comm: no region came over the socket; the other side closed it")
        nbytes = os.fstat(descriptors[0]).st_size
        if nbytes > max_bytes:
            os.close(descriptors[0])
            raise LimitError(f"comm: region of {nbytes} bytes, wanted at most {max_bytes}")
        return cls(descriptors[0], nbytes, None, owner=False)

    def unlink(self) -> None:
        """Remove the name; who has the region keeps it. Safe to repeat."""
        if self.name is not None:
            _path(self.name).unlink(missing_ok=True)

    def close(self) -> None:
        """Give the memory back (the creator also removes the name); safe to repeat.

        Raises: BufferError while an array over `view` is alive; the memory goes with the last one.
        """
        if self.owner:
            self.unlink()
        if self.descriptor >= 0:  # the map has one of its own, and so the lock
            os.close(self.descriptor)
            self.descriptor = -1
        self.view.release()
        if self._map is not None:
            self._map.close()

    def __enter__(self) -> Region:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()


def sweep(prefix: str = "") -> list[str]:
    """Remove the regions that no living process uses.

    Args:
        prefix: only those whose name begins so.
    Returns: the names removed.
    """
    removed = []
    for path in sorted(FOLDER.glob(f"{PREFIX}{prefix}*")):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except (FileNotFoundError, PermissionError):
            continue  # gone meanwhile, or another user's
        try:
            if _is_nobodys(descriptor):
                path.unlink(missing_ok=True)
                removed.append(path.name.removeprefix(PREFIX))
        finally:
            os.close(descriptor)
    return removed


def _is_nobodys(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # a living process has it
        return False
    return True


def _path(name: str) -> Path:
    if not NAME.fullmatch(name):
        raise MissingError(f"comm: region name {name!r}, wanted 1–128 of letters, digits and _.-")
    return FOLDER / f"{PREFIX}{name}"


def _reserve(descriptor: int, offset: int, nbytes: int, what: str) -> None:
    try:
        if nbytes:
            os.posix_fallocate(descriptor, offset, nbytes)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
            raise
        free = os.statvfs(FOLDER)
        raise LimitError(
            f"comm: {what} of {nbytes} bytes, but shared memory has {free.f_bavail * free.f_frsize}"
            f" bytes free ({FOLDER}); in a container start it with a larger --shm-size"
        ) from None
