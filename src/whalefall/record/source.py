"""Record room: where a file's bytes come from: this machine's disk, or any fsspec URL.

In: a path or URL; pieces as (file, offset, bytes). Out: the bytes in the caller's memory, and the
CRC-32 of each piece. Local files are read with pread on descriptors, so a forked child may go on.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from whalefall import jit
from whalefall.errors import CorruptError, MissingError
from whalefall.record.checksum import crc32, native

__all__ = ["LocalFiles", "RemoteFiles", "Source", "is_url", "list_folder", "open_files"]


class Source(Protocol):
    """Random reads from a fixed list of files."""

    names: list[str]

    def size(self, file: int) -> int: ...

    def head(self, file: int, count: int) -> bytes:
        """The first `count` bytes of a file (fewer if it is shorter)."""

    def read(
        self,
        files: np.ndarray,
        offsets: np.ndarray,
        sizes: np.ndarray,
        out: Sequence[np.ndarray],
        where: np.ndarray,
        check: bool,
    ) -> np.ndarray | None:
        """Fill `out`, which lies at `where`, with the pieces; gives their CRC-32s if `check`.

        Raises: CorruptError for a file that ends too soon, OSError.
        """  # fmt: skip

    def still_reaches(self, file: int, end: int) -> None:
        """Raises: CorruptError if a file is shorter now than `end`."""

    def close(self) -> None: ...


def is_url(path: str) -> bool:
    """Whether a path names an fsspec file system."""
    return "://" in path


def list_folder(folder: str) -> list[str] | None:
    """The folder's `*.ffr`, sorted as text; None if it is no folder."""
    if is_url(folder):
        import fsspec

        fs, path = fsspec.core.url_to_fs(folder)
        if not fs.isdir(path):
            return None
        found = [p for p in fs.ls(path, detail=False) if str(p).endswith(".ffr")]
        return sorted(fs.unstrip_protocol(p) for p in found)
    if not os.path.isdir(folder):
        return None
    return sorted(str(p) for p in Path(folder).iterdir() if p.suffix == ".ffr")


def open_files(names: list[str]) -> Source:
    """Open local files, or URLs of one file system; MissingError for one that is not there."""
    if any(map(is_url, names)):
        return RemoteFiles(names)
    return LocalFiles(names)


@cache
def _read_batch() -> Any:
    comm = native()
    if comm is None:
        return None
    function = jit.build(Path(__file__).parent / "native" / "read_batch.cpp").wf_read_batch
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.restype = number
    function.argtypes = [pointer] * 6 + [number, pointer, ctypes.c_int, pointer]
    return function


class Maps:
    """Files as memory, each mapped when first wanted.

    Attributes:
        bases: [files] uint64, addresses; 0: not mapped.
    """

    def __init__(self, count: int) -> None:
        self.bases = np.zeros(count, np.uint64)
        self.missing = set(range(count))
        self._kept: list[mmap.mmap] = []

    def add(self, files: np.ndarray, fds: list[int], sizes: list[int]) -> None:
        """Map those of `files` that are not yet; what cannot be mapped is left to pread."""
        for file in self.missing.intersection(files.tolist()):
            with contextlib.suppress(OSError, ValueError):
                made = mmap.mmap(fds[file], sizes[file], prot=mmap.PROT_READ)
                made.madvise(mmap.MADV_RANDOM)
                self._kept.append(made)
                self.bases[file] = np.frombuffer(made, np.uint8).ctypes.data
            self.missing.discard(file)

    def __len__(self) -> int:
        return len(self._kept)


class LocalFiles:
    """Files of this machine, by descriptor."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self._fds: list[int] = []
        try:
            for name in names:
                self._fds.append(os.open(name, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            self.close()
            raise MissingError(f"record: {error.filename}: {error.strerror}") from None
        self._table = np.array(self._fds, np.int32)
        self._sizes = [os.fstat(fd).st_size for fd in self._fds]
        self._maps = Maps(len(names))

    def size(self, file: int) -> int:
        return self._sizes[file]

    def identity(self, file: int) -> tuple[int, ...]:
        """What changes when the file is another one."""
        stat = os.fstat(self._fds[file])
        return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns

    def head(self, file: int, count: int) -> bytes:
        pieces, at = [], 0
        while at < count and (piece := os.pread(self._fds[file], count - at, at)):
            pieces.append(piece)
            at += len(piece)
        return b"".join(pieces)

    def read(
        self,
        files: np.ndarray,
        offsets: np.ndarray,
        sizes: np.ndarray,
        out: Sequence[np.ndarray],
        where: np.ndarray,
        check: bool,
    ) -> np.ndarray | None:
        call = _read_batch()
        if call is None:
            return self._read_plainly(files, offsets, sizes, out, check)
        count = len(where)
        fds = self._table[files]
        maps = self._maps  # alive until the call is over, even if somebody closes the reader
        if check and maps.missing:
            maps.add(files, self._fds, self._sizes)
        bases = maps.bases[files]
        found = np.empty(count, np.uint32)
        failed = ctypes.c_int(0)
        comm = native()
        done = call(
            fds.ctypes.data, bases.ctypes.data, offsets.ctypes.data, sizes.ctypes.data,
            where.ctypes.data, found.ctypes.data, count, _crc_address() if check else None,
            comm.level == "any", ctypes.byref(failed),
        )  # fmt: skip
        if failed.value == -1:
            raise _short(self.names[files[done]], int(offsets[done] + sizes[done]))
        if failed.value:
            raise OSError(failed.value, os.strerror(failed.value), self.names[files[done]])
        return found if check else None

    def still_reaches(self, file: int, end: int) -> None:
        if os.fstat(self._fds[file]).st_size < end:
            raise _short(self.names[file], end)

    def _read_plainly(
        self,
        files: np.ndarray,
        offsets: np.ndarray,
        sizes: np.ndarray,
        out: Sequence[np.ndarray],
        check: bool,
    ) -> np.ndarray | None:
        found = np.zeros(len(out), np.uint32)
        for i, piece in enumerate(out):
            view, at = piece.data, 0
            while at < len(view):
                got = os.preadv(self._fds[files[i]], [view[at:]], int(offsets[i]) + at)
                if got == 0:
                    raise _short(self.names[files[i]], int(offsets[i] + sizes[i]))
                at += got
            if check:
                found[i] = crc32(view)
        return found if check else None

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds, self._maps = [], Maps(len(self.names))


@cache
def _crc_address() -> int:
    return ctypes.cast(native().wf_crc32, ctypes.c_void_p).value or 0


def _short(name: str, wanted: int) -> CorruptError:
    return CorruptError(f"record: {name} ended before byte {wanted}: truncated while it was open")


class RemoteFiles:
    """Files of one fsspec file system, by ranges."""

    def __init__(self, names: list[str]) -> None:
        import fsspec

        self.names = names
        self._fs, _ = fsspec.core.url_to_fs(names[0])
        self._paths = [str(self._fs._strip_protocol(name)) for name in names]
        try:
            facts = [self._fs.info(path) for path in self._paths]
        except FileNotFoundError as error:
            raise MissingError(f"record: {error}: no such file") from None
        self._facts = [(fact["size"], str(fact.get("mtime", fact.get("ETag")))) for fact in facts]

    def size(self, file: int) -> int:
        return int(self._facts[file][0])

    def identity(self, file: int) -> tuple[Any, ...]:
        """What changes when the file is another one."""
        return self._facts[file]

    def head(self, file: int, count: int) -> bytes:
        return bytes(self._fs.cat_file(self._paths[file], 0, count))

    def read(
        self,
        files: np.ndarray,
        offsets: np.ndarray,
        sizes: np.ndarray,
        out: Sequence[np.ndarray],
        where: np.ndarray,
        check: bool,
    ) -> np.ndarray | None:
        paths = [self._paths[file] for file in files]
        pieces = self._fs.cat_ranges(
            paths, offsets.tolist(), (offsets + sizes).tolist(), on_error="raise"
        )
        found = np.zeros(len(out), np.uint32)
        for i, piece in enumerate(pieces):
            if len(piece) != sizes[i]:
                raise _short(self.names[files[i]], int(offsets[i] + sizes[i]))
            out[i][:] = np.frombuffer(piece, np.uint8)
            if check:
                found[i] = crc32(piece)
        return found if check else None

    def still_reaches(self, file: int, end: int) -> None:
        """A range that is too short was refused already."""

    def close(self) -> None:
        pass
