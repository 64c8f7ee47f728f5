"""File-system room: where chunks lie — one file a size class, cut into slots of that size."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

__all__ = ["MAX_CHUNK_BYTES", "MIN_SLOT_BYTES", "Place", "Slots"]

MIN_SLOT_BYTES = 64 << 10
MAX_CHUNK_BYTES = 64 << 20
PUNCH_HOLE = 3  # with KEEP_SIZE (linux/falloc.h)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class Place(msgspec.Struct, frozen=True, array_like=True):
    """A slot: its size class (log2 of the bytes) and number."""

    size_class: int
    slot: int

    @property
    def offset(self) -> int:
        """Where it starts in its file."""
        return self.slot << self.size_class


class Slots:
    """Allocates slots; which are in use is known from the chunks' records alone.

    A freed slot is used again only when every read that began before has ended.

    Args:
        folder: holds the files slots.16 … slots.26.
        used: the places in use.
    """

    def __init__(self, folder: Path, used: Iterable[Place]) -> None:
        self.folder = folder
        self.used_bytes = 0
        self._files: dict[int, int] = {}
        self._direct: dict[int, int] = {}
        self._free: dict[int, list[int]] = {}
        self._end: dict[int, int] = {}
        self._reads: dict[int, int] = {}
        self._read_count = 0
        self._limbo: list[tuple[int, Place]] = []
        taken: dict[int, set[int]] = {}
        for place in used:
            taken.setdefault(place.size_class, set()).add(place.slot)
            self.used_bytes += 1 << place.size_class
        for path in folder.glob("slots.*"):  # a slot that was free holds disk all the same
            size_class = int(path.suffix[1:])
            self._end[size_class] = -(-path.stat().st_size >> size_class)
        for size_class in {*taken, *self._end}:
            slots = taken.get(size_class, set())
            end = max(self._end.get(size_class, 0), max(slots, default=-1) + 1)
            self._end[size_class] = end
            self._free[size_class] = sorted(set(range(end)) - slots, reverse=True)

    def file(self, size_class: int) -> int:
        """The descriptor of a size class's file."""
        if size_class not in self._files:
            path = self.folder / f"slots.{size_class}"
            self._files[size_class] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        return self._files[size_class]

    def written(self, size_class: int) -> tuple[int, bool]:
        """A descriptor to write a size class's slots with, and whether it is an O_DIRECT one."""
        if size_class not in self._direct:
            readable = self.file(size_class)
            try:
                path = self.folder / f"slots.{size_class}"
                self._direct[size_class] = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                self._direct[size_class] = readable  # this file system has no O_DIRECT
        descriptor = self._direct[size_class]
        return descriptor, descriptor != self._files[size_class]

    def take(self, size: int) -> Place:
        """A free slot for `size` bytes."""
        size_class = (max(size, MIN_SLOT_BYTES) - 1).bit_length()
        free = self._free.setdefault(size_class, [])
        if free:
            slot = free.pop()
        else:
            slot = self._end.get(size_class, 0)
            self._end[size_class] = slot + 1
        self.used_bytes += 1 << size_class
        return Place(size_class, slot)

    def give_back(self, place: Place) -> None:
        """Free a slot, once no reader can be looking at it."""
        self.used_bytes -= 1 << place.size_class
        self._limbo.append((self._read_count, place))
        self._sweep()

    def disk_bytes(self) -> int:
        """What the disk has left for us."""
        disk = os.statvfs(self.folder)
        return disk.f_bavail * disk.f_frsize

    def make_room(self, place: Place, size: int, reserve_bytes: int) -> bool:
        """Whether `size` bytes there leave the disk its reserve; if not, free slots are emptied."""
        short = reserve_bytes + size - self.disk_bytes()
        if short <= 0 or self.holds(place, size):
            return True
        self.hollow(short)
        return self.disk_bytes() >= reserve_bytes + size

    def holds(self, place: Place, size: int) -> bool:
        """Whether `size` bytes there can be written over without more of the disk."""
        with contextlib.suppress(OSError):  # past the end of the file
            hole = os.lseek(self.file(place.size_class), place.offset, os.SEEK_HOLE)
            return hole >= place.offset + size
        return False

    def spare_bytes(self) -> int:
        """Of the disk, what free slots hold, or somewhat less."""
        blocks = sum(os.fstat(self.file(size_class)).st_blocks for size_class in self._end)
        return max(0, blocks * 512 - self.used_bytes)

    def hollow(self, wanted: int) -> None:
        """Give the disk back about `wanted` bytes, or all that free slots hold."""
        for size_class in sorted(self._free, reverse=True):
            descriptor, size = self.file(size_class), 1 << size_class
            for slot in self._free[size_class]:
                if wanted <= 0:
                    return
                try:
                    data = os.lseek(descriptor, slot << size_class, os.SEEK_DATA)
                except OSError:  # nothing from there on
                    continue
                if data < (slot + 1) << size_class:
                    if _libc.fallocate(descriptor, PUNCH_HOLE, slot << size_class, size):
                        return  # this file system has no holes
                    wanted -= size - (data - (slot << size_class))

    def begin_read(self) -> int:
        """From now on no slot freed later is used again; returns what `end_read` takes."""
        self._read_count += 1
        self._reads[self._read_count] = self._read_count
        return self._read_count

    def end_read(self, read: int) -> None:
        """A read has ended."""
        del self._reads[read]
        self._sweep()

    def _sweep(self) -> None:
        oldest = min(self._reads, default=self._read_count + 1)
        while self._limbo and self._limbo[0][0] < oldest:
            _, place = self._limbo.pop(0)
            self._free.setdefault(place.size_class, []).append(place.slot)

    def close(self) -> None:
        """Close the files."""
        for descriptor in {*self._files.values(), *self._direct.values()}:
            os.close(descriptor)
        self._files.clear()
        self._direct.clear()
