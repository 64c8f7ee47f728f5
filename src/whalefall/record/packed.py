"""Record room: a folder's files in one `.ffr` file, found by name.

In: a folder. Out: a file with its files as samples, depth first and sorted, and as the last sample
the tree of names (a pickle of nested ordered dicts after a magic word).
The pickle is read as names that are made when asked for (names.py), or, where several files are
joined or it is of another kind, by an unpickler that makes nothing but those dicts.
Source: FFRecord 1.4.0 `pack_folder`, `PackedFolder`.
"""

from __future__ import annotations

import array
import functools
import gc
import io
import operator
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from whalefall.errors import CorruptError, DtypeError, MissingError
from whalefall.record.names import MAX_DEPTH, FileNames, NamedTree, Names, read_names
from whalefall.record.reader import FileReader
from whalefall.record.writer import FileWriter

__all__ = ["MAGIC", "PackedFolder", "Tree", "pack_files", "pack_folder", "read_tree", "scan"]

MAGIC = b"piouhjgbr"
_PROTOCOL = 4  # what FFRecord's default is on Python 3.8 to 3.13
Tree = dict[str, Any]  # name -> index of a sample, or Tree


class NotPackedError(CorruptError):
    """A `.ffr` file that holds no packed folder."""


class PackedFolder:
    """Random access by name to the files in a packed folder.

    Args:
        ffr_file: a packed file, or several (a list, or a folder of `.ffr`), whose trees are joined.
        check_data: compare checksums.
    Attributes:
        reader: the `FileReader` below.
        structure: the tree of names, a mapping: name → sample, or the folder's mapping.
    Raises: CorruptError for a `.ffr` file that is no packed folder.
    Source: FFRecord `PackedFolder`.
    """

    def __init__(self, ffr_file: Any, check_data: bool = True) -> None:
        self.reader = FileReader(ffr_file, check_data)
        self.structure: Any = {}
        self._names: Names | None = None
        start = 0
        for number, name in enumerate(self.reader.fnames):
            count = len(self.reader.get_checksums(number))
            if count == 0:
                raise NotPackedError(f"record: {name} is not a packed folder: it has no samples")
            trailer = self.reader.read_one(start + count - 1)
            if len(self.reader.fnames) == 1:
                names = _names_of(name, trailer.data, count - 1)
                if names is not None:
                    self._names, self.structure = names, NamedTree(names, 0)
                    return
            tree = read_tree(name, trailer.data, count - 1)
            self.structure = tree if number == 0 else _join(self.structure, tree, start, name)
            start += count

    @functools.cached_property
    def names(self) -> Sequence[str]:
        """All files' paths, in the order of their samples; each is made when it is asked for."""
        if self._names is not None:
            return FileNames(self._names)
        return [path for path, _ in sorted(self.walk(), key=operator.itemgetter(1))]

    def num_files(self) -> int:
        """How many files are inside."""
        return self.reader.n - len(self.reader.fnames)

    def read_one(self, fname: str | os.PathLike[str]) -> np.ndarray:
        """One file's bytes, 1-D uint8.

        Raises: MissingError if there is no such file.
        """
        return self.reader.read_one(self.sample(fname))

    def read(self, fnames: Sequence[str | os.PathLike[str]]) -> list[np.ndarray]:
        """Several files' bytes, in that order."""
        if isinstance(fnames, (str, os.PathLike)):
            raise DtypeError(
                f"record: read({os.fspath(fnames)!r}), wanted a list; read_one takes one"
            )
        return self.reader.read([self.sample(name) for name in fnames])

    def exists(self, path: str | os.PathLike[str]) -> bool:
        """Whether there is such a file or folder ("" is the root)."""
        return self._find(path) is not None

    def is_file(self, path: str | os.PathLike[str]) -> bool:
        return isinstance(self._find(path), int)

    def is_dir(self, path: str | os.PathLike[str]) -> bool:
        return isinstance(self._find(path), Mapping)

    def list(
        self,
        path: str | os.PathLike[str] | None = None,
        list_file: bool = True,
        list_dir: bool = True,
        recursive: bool = False,
    ) -> list[Any]:
        """The names in a folder.

        Args:
            path: the folder; None is the root.
            list_file: name files.
            list_dir: name folders.
            recursive: go into folders, each before what is in it.
        Returns: children as str; what lies deeper as `Path` relative to the folder.
        Raises: MissingError.
        """
        tree = self._find(path or "")
        if not isinstance(tree, Mapping):
            problem = "does not exist" if tree is None else "is a file, wanted a folder"
            raise MissingError(f"record: {path} in {self.reader.fnames[0]} {problem}")
        return _names(tree, list_file, list_dir, recursive)

    def walk(self) -> Iterator[tuple[str, int]]:
        """Every file's path and sample, in the tree's order."""
        yield from _walk(self.structure, "")

    def close(self) -> None:
        """Close the file."""
        self.reader.close()

    def _find(self, path: str | os.PathLike[str]) -> Any:
        node: Any = self.structure
        for part in Path(path).parts:
            node = node.get(part) if isinstance(node, Mapping) else None
            if node is None:
                return None
        return node

    def sample(self, fname: str | os.PathLike[str]) -> int:
        """The number of the sample that holds a file; MissingError if there is none."""
        node = self._find(fname)
        if isinstance(node, int):
            return node
        problem = "does not exist" if node is None else "is a folder, wanted a file"
        raise MissingError(f"record: {os.fspath(fname)} in {self.reader.fnames[0]} {problem}")


def pack_folder(
    folder: str | os.PathLike[str],
    out_file: str | os.PathLike[str],
    verbose: bool = False,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Pack a folder's files into one `.ffr` file, byte for byte as FFRecord does.

    Args:
        folder: packed with everything below; links are followed, empty folders kept.
        out_file: the file to make.
        verbose: print each thousandth file's number.
        progress: called with the number of files done.
    Raises: MissingError, ConfigError, OSError of a file that cannot be read.
    Source: FFRecord `pack_folder`.
    """
    tree, paths = scan(Path(folder))

    def done(count: int) -> None:
        if verbose and (count % 1000 == 0 or count == len(paths)):
            print(f"{count} of {len(paths)} files", flush=True)
        if progress is not None:
            progress(count)

    pack_files(tree, paths, out_file, done)


def pack_files(
    tree: Tree,
    paths: list[Path],
    out_file: str | os.PathLike[str],
    progress: Callable[[int], object] = lambda count: None,
) -> None:
    """Write the files and then their tree, whose leaves number `paths`."""
    with FileWriter(out_file, len(paths) + 1) as writer:
        for count, path in enumerate(paths, 1):
            writer.write_one(path.read_bytes())
            progress(count)
        writer.write_one(MAGIC + pickle.dumps(tree, protocol=_PROTOCOL))


def scan(folder: Path) -> tuple[Tree, list[Path]]:
    """A folder's tree, children sorted at each level, and its files numbered depth first.

    Raises: MissingError if it is no folder.
    """
    if not folder.is_dir():
        raise MissingError(f"record: {folder} is no folder, wanted one to pack")
    paths: list[Path] = []
    return _scan(folder, paths, ()), paths


def _scan(folder: Path, paths: list[Path], above: tuple[str, ...]) -> Tree:
    here = os.path.realpath(folder)
    if here in above:
        raise CorruptError(f"record: {folder} leads back to {here}: a link in a circle; remove it")
    tree: Tree = OrderedDict()
    for child in sorted(folder.iterdir()):
        if child.is_dir():
            tree[child.name] = _scan(child, paths, (*above, here))
        else:
            tree[child.name] = len(paths)
            paths.append(child)
    return tree


class _TreeUnpickler(pickle.Unpickler):
    """Knows one class, the ordered dict, and makes plain dicts (in order, too, and faster)."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        raise pickle.UnpicklingError(f"{module}.{name} in a tree of names")


def read_tree(name: str, trailer: memoryview | bytes, num_files: int) -> Tree:
    """The tree in a packed file's last sample.

    Raises: CorruptError if it is no tree of names and of samples 0 … num_files - 1.
    """
    pickled = _pickled(name, trailer)
    collecting = gc.isenabled()
    gc.disable()  # a million new strings would otherwise be looked through again and again
    try:
        tree = _TreeUnpickler(io.BytesIO(pickled)).load()
    except Exception as error:  # a damaged pickle raises almost anything
        raise CorruptError(f"record: {name}: the tree of names is damaged: {error}") from None
    finally:
        if collecting:
            gc.enable()
    _check_tree(name, tree, num_files)
    return tree


def _pickled(name: str, trailer: memoryview | bytes) -> memoryview:
    if len(trailer) <= len(MAGIC) or bytes(trailer[: len(MAGIC)]) != MAGIC:
        raise NotPackedError(f"record: {name} is not a packed folder: its last sample is no tree")
    return memoryview(trailer)[len(MAGIC) :]


def _names_of(name: str, trailer: memoryview | bytes, num_files: int) -> Names | None:
    return read_names(_pickled(name, trailer), num_files)


def _check_tree(name: str, tree: Any, num_files: int) -> None:
    waiting, seen = [(tree, 0)], set[int]()
    while waiting:
        node, depth = waiting.pop()
        # At the speed of C: there may be a million names.
        if not isinstance(node, dict) or not set(map(type, node)) <= {str}:
            raise CorruptError(f"record: {name}: the tree of names holds {type(node).__name__}")
        if id(node) in seen:  # a cycle, or a few bytes that stand for a million folders
            raise CorruptError(f"record: {name}: the tree of names holds a folder twice")
        if depth > MAX_DEPTH:
            raise CorruptError(f"record: {name}: folders more than {MAX_DEPTH} deep")
        seen.add(id(node))
        children = [*node.values()]
        try:
            samples = array.array("q", children)
        except (TypeError, OverflowError):  # folders among them, or what does not belong there
            waiting += [(child, depth + 1) for child in children if type(child) is not int]
            samples = array.array("q", [_clipped(c) for c in children if type(c) is int])
        numbers = np.frombuffer(samples, np.int64)
        bad = numbers[(numbers < 0) | (numbers >= num_files)]
        if len(bad):
            raise CorruptError(
                f"record: {name}: the tree names sample {bad[0]}, wanted 0 … {num_files - 1}"
            )


def _clipped(number: int) -> int:
    return max(-1, min(number, 2**63 - 1))


def _join(into: Tree, tree: Tree, start: int, name: str) -> Tree:
    """Add a further shard's names; its samples begin at `start`."""
    for key, child in tree.items():
        if isinstance(child, dict):
            known = into.setdefault(key, {})
            if not isinstance(known, dict):
                raise CorruptError(
                    f"record: {name}: {key} is a folder here, a file in another shard"
                )
            _join(known, child, start, name)
        elif key in into:
            raise CorruptError(f"record: {name}: {key} is in another shard too")
        else:
            into[key] = child + start
    return into


def _names(tree: Any, files: bool, folders: bool, recursive: bool) -> list[Any]:
    if files and folders and not recursive:
        return tree.texts() if isinstance(tree, NamedTree) else [*tree]
    names: list[Any] = []
    for key, child in tree.items():
        is_folder = isinstance(child, Mapping)
        if folders if is_folder else files:
            names.append(key)
        if recursive and is_folder:
            names += [Path(key) / deeper for deeper in _names(child, files, folders, True)]
    return names


def _walk(tree: Any, above: str) -> Iterator[tuple[str, int]]:
    for key, child in tree.items():
        if isinstance(child, Mapping):
            yield from _walk(child, f"{above}{key}/")
        else:
            yield above + key, child
