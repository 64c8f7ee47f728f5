"""Record room: the names of a packed folder, read from its pickle without making a string of any.

In: the pickled tree. Out: the same tree as mappings whose names are made when they are asked for,
and the paths of all files as a sequence, in the tree's order.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from whalefall import jit
from whalefall.record.checksum import native

__all__ = ["MAX_DEPTH", "FileNames", "NamedTree", "Names", "read_names"]

MAX_DEPTH = 512  # folders in folders: walks recurse, and Python ends them at 1000
_LEAST_BYTES = 5  # of a name and its number in a pickle


@functools.cache
def _parser() -> Any:
    """`wf_record_names`, or None where nothing can be compiled."""
    if native() is None:
        return None
    function = jit.build(Path(__file__).parent / "native" / "names.cpp").wf_record_names
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.restype = number
    function.argtypes = [pointer, number, number, number, *[pointer] * 6]
    return function


class Names:
    """A tree of names as arrays, one row a name; the rows of a folder lie together, in order.

    Attributes:
        data: the pickle.
        at, bytes: where each name lies in it.
        sample: its file's sample, or -1 - the number of its folder.
        first, last: [folders], each folder's rows.
    """

    def __init__(self, data: memoryview, rows: list[np.ndarray], folders: int) -> None:
        self.data = data
        self.at, self.bytes, self.sample, parent = rows
        if (np.diff(parent) != 0).sum() >= folders:  # parts of a folder lie apart
            order = np.argsort(parent, kind="stable")
            self.at, self.bytes, self.sample = (a[order] for a in rows[:3])
            parent = parent[order]
        starts = np.flatnonzero(np.diff(parent, prepend=-1))
        self.first, self.last = np.zeros((2, folders), np.int64)
        self.first[parent[starts]] = starts
        self.last[parent[starts]] = [*starts[1:], len(parent)]
        above = np.flatnonzero(self.sample < 0)
        self.row_of = np.full(folders, -1, np.int64)  # of each folder in its own folder
        self.row_of[-1 - self.sample[above]] = above
        self.parent = parent

    def too_deep(self) -> bool:
        """Whether some folder lies more than `MAX_DEPTH` below the root."""
        above = np.zeros(len(self.row_of), np.int64)  # of each folder; the root is its own
        above[1:] = self.parent[self.row_of[1:]]
        at = above
        for _ in range(MAX_DEPTH):
            if not at.any():
                return False
            at = above[at]
        return bool(at.any())

    def text(self, row: int) -> str:
        """One name."""
        at = int(self.at[row])
        return str(self.data[at : at + int(self.bytes[row])], "utf-8", "surrogatepass")

    def texts(self, folder: int) -> list[str]:
        """The names in a folder."""
        rows = slice(self.first[folder], self.last[folder])
        begins = self.at[rows].astype(np.int64)
        if not len(begins):
            return []
        # One piece of the pickle, cut up: it holds a little more than the names.
        base = int(begins[0])
        ends = begins + self.bytes[rows]
        piece = bytes(self.data[base : int(ends.max())]) if begins.min() == base else None
        if piece is None:
            return [self.text(row) for row in range(rows.start, rows.stop)]
        if piece.isascii():
            whole = piece.decode("ascii")
            pairs = zip((begins - base).tolist(), (ends - base).tolist(), strict=True)
            return [whole[begin:end] for begin, end in pairs]
        pairs = zip((begins - base).tolist(), (ends - base).tolist(), strict=True)
        return [piece[begin:end].decode("utf-8", "surrogatepass") for begin, end in pairs]

    def path(self, row: int) -> str:
        """A file's path from the root."""
        parts = [self.text(row)]
        folder = int(self.parent[row])
        while folder:
            above = int(self.row_of[folder])
            parts.append(self.text(above))
            folder = int(self.parent[above])
        return "/".join(reversed(parts))


class NamedTree(Mapping[str, Any]):
    """One folder of `Names`: name → sample, or the folder below. Its length needs no names."""

    def __init__(self, names: Names, folder: int) -> None:
        self._names, self._folder = names, folder

    @functools.cached_property
    def _children(self) -> dict[str, Any]:
        first, last = self._names.first[self._folder], self._names.last[self._folder]
        samples = self._names.sample[first:last].tolist()
        values = [n if n >= 0 else NamedTree(self._names, -1 - n) for n in samples]
        return dict(zip(self._names.texts(self._folder), values, strict=True))

    def texts(self) -> list[str]:
        """The names, as a list of their own."""
        return self._names.texts(self._folder)

    def __getitem__(self, name: str) -> Any:
        return self._children[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._children)

    def __len__(self) -> int:
        return int(self._names.last[self._folder] - self._names.first[self._folder])


class FileNames(Sequence[str]):
    """The paths of all files, by sample number; each is made when it is asked for."""

    def __init__(self, names: Names) -> None:
        self._names = names
        rows = np.flatnonzero(names.sample >= 0)
        self._rows = np.empty(len(rows), np.int64)
        self._rows[names.sample[rows]] = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._names.path(row) for row in self._rows[index].tolist()]
        return self._names.path(int(self._rows[index]))


def read_names(pickled: memoryview, num_files: int) -> Names | None:
    """The names in a pickled tree, or None if it must be read by Python's own machine.

    That is a pickle of another kind, a damaged one, or one whose samples are not 0 … num_files - 1,
    each once.
    """
    parse = _parser()
    if parse is None:
        return None
    room = pickled.nbytes // _LEAST_BYTES + 1
    rows = [np.empty(room, kind) for kind in (np.uint32, np.uint16, np.int32, np.int32)]
    seen = np.zeros(num_files, np.uint8)
    folders = ctypes.c_int64()
    data = np.frombuffer(pickled, np.uint8)
    count = parse(
        data.ctypes.data, data.nbytes, room, num_files, *(r.ctypes.data for r in rows),
        seen.ctypes.data, ctypes.addressof(folders),
    )  # fmt: skip
    if count < 0:
        return None
    names = Names(pickled, [r[:count] for r in rows], folders.value)
    return None if names.too_deep() else names
