"""Record room: `FileReader`, random access to the samples of one or many `.ffr` files.

In: files, a folder or URLs; indices counted over all files. Out: the samples' bytes, checked.
Reading holds no lock and no position, so threads and forked children may share a reader.
Source: FFRecord 1.4.0 `FileReader`.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from whalefall.errors import ConfigError, DtypeError, MissingError, ShapeError
from whalefall.record.blocks import allocate
from whalefall.record.layout import (
    PREFIX_BYTES,
    ChecksumError,
    Index,
    IndexRangeError,
    header_bytes,
    parse,
)
from whalefall.record.source import Source, list_folder, open_files

__all__ = ["ClosedError", "FileReader"]

# one parsed header a file and process, as long as a reader uses it
_indices: weakref.WeakValueDictionary[tuple[Any, ...], Index] = weakref.WeakValueDictionary()


class ClosedError(ConfigError, RuntimeError):
    """The reader was closed (FFRecord raises RuntimeError)."""


class FileReader:
    """Reads samples by index from one file or several.

    Args:
        fname: a file, a list of files, or a folder (its `*.ffr`, sorted as text); str, PathLike
            or an fsspec URL.
        check_data: compare checksums, of the headers now and of each sample when read.
    Raises: MissingError, ConfigError (wrong suffix), CorruptError (headers).
    Source: FFRecord `FileReader`.
    """

    def __init__(self, fname: Any, check_data: bool = True) -> None:
        self._source: Source | None = None
        self.fnames = _files(fname)
        self.check_data = check_data
        self._source = open_files(self.fnames)
        self._indices = [_index(self._source, i, check_data) for i in range(len(self.fnames))]
        self._starts = np.cumsum([0, *map(len, self._indices)])
        self.n = int(self._starts[-1])
        self._single = self._indices[0] if len(self._indices) == 1 else None

    def __len__(self) -> int:
        return self.n

    def read_one(self, index: int) -> np.ndarray:
        """One sample, 1-D uint8, writable."""
        return self.read([index])[0]

    def read(self, indices: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """The samples at `indices`, in that order; duplicates are read as often as asked.

        Args:
            indices: integers, 0 … n - 1, counted over all files.
        Returns: 1-D uint8 arrays, writable. Those of a batch share blocks of up
            to 1 MiB, so copy what is kept for long.
        Raises: IndexRangeError, ChecksumError, CorruptError, ClosedError.
        Source: FFRecord `FileReader.read`.
        """
        source, files, samples = self._locate(indices)
        offsets, sizes = self._bounds(files, samples)
        if not len(sizes):
            return []
        out, where = allocate(sizes)
        found = source.read(files, offsets, sizes, out, where, self.check_data)
        self._check(files, samples, found)
        return out

    def read_into(self, indices: Sequence[int] | np.ndarray, arena: Any) -> np.ndarray:
        """Read samples one after the other into memory of the caller.

        Args:
            indices: as for `read`.
            arena: a writable contiguous buffer, at least as long as the samples together.
        Returns: [len(indices) + 1] int64; sample i lies at arena[bounds[i] : bounds[i + 1]].
        Raises: ShapeError if the arena is too small, and as `read`.
        """
        source, files, samples = self._locate(indices)
        offsets, sizes = self._bounds(files, samples)
        flat = _flat(arena)
        bounds = np.zeros(len(sizes) + 1, np.int64)
        np.cumsum(sizes, out=bounds[1:])
        if bounds[-1] > flat.nbytes:
            raise ShapeError(
                f"record: the arena has {flat.nbytes} bytes, wanted at least {bounds[-1]}"
            )
        if len(sizes):
            out = _Pieces(flat, bounds)
            where = flat.__array_interface__["data"][0] + bounds[:-1].astype(np.uint64)
            found = source.read(files, offsets, sizes, out, where, self.check_data)
            self._check(files, samples, found)
        return bounds

    def sizes(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The lengths of samples in bytes, [len(indices)] int64, from the index alone."""
        _, files, samples = self._locate(indices)
        return self._bounds(files, samples)[1]

    def validate(self) -> None:
        """Check every header again, from the file, not from the cached index."""
        source = self._open()
        for i in range(len(self.fnames)):
            _load_index(source, i, check=True)

    def validate_sample(self, index: int) -> None:
        """Read one sample and check it, also where check_data is off.

        Raises: ChecksumError naming file, sample, expected and found.
        """
        source, files, samples = self._locate([index])
        offsets, sizes = self._bounds(files, samples)
        found = source.read(files, offsets, sizes, *allocate(sizes), True)
        self._check(files, samples, found)

    def get_offsets(self, file_index: int) -> np.ndarray:
        """[N + 1] int64 of one file: where each sample begins, and the file's length."""
        return self._file(file_index).bounds

    def get_checksums(self, file_index: int) -> np.ndarray:
        """[N] uint32 of one file: the samples' CRC-32s."""
        return self._file(file_index).checksums

    def locate(self, index: int) -> tuple[str, int]:
        """The file a sample is in, and its number there."""
        _, files, samples = self._locate([index])
        return self.fnames[files[0]], int(samples[0])

    def close(self) -> None:
        """Close the files; a second time does nothing."""
        if self._source is not None:
            self._source.close()
            self._source = None

    def __enter__(self) -> FileReader:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.fnames, self.check_data)

    def _open(self) -> Source:
        if self._source is None:
            raise ClosedError(f"FileReader of {self.fnames[0]} has been closed.")
        return self._source

    def _file(self, file_index: int) -> Index:
        if not 0 <= file_index < len(self._indices):
            raise IndexRangeError(f"record: file {file_index}, wanted 0 … {len(self._indices) - 1}")
        return self._indices[file_index]

    def _locate(self, indices: Any) -> tuple[Source, np.ndarray, np.ndarray]:
        """For each index its file and its number in the file."""
        source = self._open()
        wanted = np.asarray(indices)
        if wanted.size == 0:
            wanted = wanted.astype(np.int64)
        if wanted.dtype.kind not in "iu" or wanted.ndim != 1:
            raise DtypeError(
                f"record: indices are {wanted.dtype} {list(wanted.shape)}, wanted [n] integers"
            )
        bad = np.flatnonzero((wanted < 0) | (wanted >= self.n))
        if len(bad):
            raise IndexRangeError(
                f"record: index {wanted[bad[0]]} >= number of samples or negative, "
                f"wanted 0 … {self.n - 1}"
                if self.n
                else f"record: index {wanted[bad[0]]}, but there are no samples"
            )
        if self._single is not None:
            return source, np.zeros(len(wanted), np.int64), wanted.astype(np.int64)
        files = np.searchsorted(self._starts, wanted, side="right") - 1
        return source, files, wanted - self._starts[files]

    def _bounds(self, files: np.ndarray, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Offset and size of each sample in its file."""
        if self._single is not None:
            offsets = self._single.bounds[samples]
            return offsets, self._single.bounds[samples + 1] - offsets
        offsets, ends = np.empty(len(files), np.int64), np.empty(len(files), np.int64)
        for file in np.unique(files):
            rows = files == file
            bounds = self._indices[file].bounds
            offsets[rows], ends[rows] = bounds[samples[rows]], bounds[samples[rows] + 1]
        return offsets, ends - offsets

    def _check(self, files: np.ndarray, samples: np.ndarray, found: np.ndarray | None) -> None:
        if found is None:
            return
        for file in {0} if self._single is not None else set(files.tolist()):
            rows = slice(None) if self._single is not None else np.flatnonzero(files == file)
            wanted = self._indices[file].checksums[samples[rows]]
            bad = np.flatnonzero(found[rows] != wanted)
            if len(bad):
                sample = int(samples[rows][bad[0]])
                self._open().still_reaches(file, int(self._indices[file].bounds[sample + 1]))
                raise ChecksumError(
                    f"record: {self.fnames[file]}, sample {sample}: checksum is "
                    f"{found[rows][bad[0]]:08x}, wanted {wanted[bad[0]]:08x}: damaged"
                )


def _files(fname: Any) -> list[str]:
    """The list of files that an argument of `FileReader` names."""
    if isinstance(fname, (list, tuple)):
        names = [_path(name) for name in fname]
    else:
        name = _path(fname)
        names = [name] if name.endswith(".ffr") else list_folder(name) or [name]
        if names == [name] and list_folder(name) == []:
            raise MissingError(f"record: folder {name} has no *.ffr file")
        if name.endswith(".ffr") and (inside := list_folder(name)) is not None:
            names = inside
    if not names:
        raise MissingError("record: an empty list of files, wanted at least one .ffr file")
    for name in names:
        if not name.endswith(".ffr"):
            known = os.path.exists(name) or "://" in name
            problem = "does not end in .ffr" if known else "is no file or folder"
            raise (ConfigError if known else MissingError)(
                f"record: {name} {problem}; wanted .ffr files or a folder of them"
            )
    return names


def _path(name: Any) -> str:
    if not isinstance(name, (str, os.PathLike)):
        raise DtypeError(f"record: {name!r} is {type(name).__name__}, wanted a path or a URL")
    return os.fsdecode(name)


def _index(source: Source, file: int, check: bool) -> Index:
    """The file's index, parsed once a process."""
    identity = getattr(source, "identity", lambda _: None)(file)
    key = (source.names[file], identity)
    known = _indices.get(key)
    if known is not None and (known.checked or not check):
        return known
    index = _load_index(source, file, check)
    _indices[key] = index
    return index


def _load_index(source: Source, file: int, check: bool) -> Index:
    name, size = source.names[file], source.size(file)
    # the first read takes small headers whole
    raw = source.head(file, min(size, 64 << 10))
    wanted = header_bytes(name, raw[:PREFIX_BYTES], size)
    if len(raw) < wanted:
        raw = source.head(file, wanted)
    return parse(name, raw[:wanted], size, check)


class _Pieces(Sequence[np.ndarray]):
    """The samples' places in an arena, each made only when it is looked at."""

    def __init__(self, flat: np.ndarray, bounds: np.ndarray) -> None:
        self._flat, self._bounds = flat, bounds

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self._flat[self._bounds[i] : self._bounds[i + 1]]


def _flat(arena: Any) -> np.ndarray:
    """The caller's memory as writable bytes."""
    view = arena.numpy() if hasattr(arena, "data_ptr") else arena
    flat = np.frombuffer(memoryview(view).cast("B"), np.uint8)
    if not flat.flags.writeable:
        raise DtypeError("record: the arena is read-only, wanted writable memory")
    return flat
