"""File-system room: the cluster as an fsspec file system, protocol `whalefall://`.

In: fsspec calls and URLs `whalefall://host:port/path`. Out: the same calls on the cluster: `mv` is
one atomic rename, `cat_ranges` one batch of reads, a file opened with "wb" appears when it
is closed.
"""

from __future__ import annotations

import contextlib
import datetime
import stat
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from fsspec.registry import register_implementation
from fsspec.spec import AbstractFileSystem

from whalefall.fs.client.filesystem import FileSystemClient, Range, parse_url
from whalefall.fs.errors import ClusterError, FsError, Stale, StorageError, fs_error
from whalefall.fs.file import WhalefallFile
from whalefall.fs.meta.core.paths import READ
from whalefall.fs.meta.core.records import Inode, InodeKind
from whalefall.fs.wrapped import CompressedFile, TextFile

__all__ = ["WhalefallFileSystem"]

_TYPES = {InodeKind.FILE: "file", InodeKind.DIRECTORY: "directory", InodeKind.SYMLINK: "link"}
COPY_BYTES = 32 << 20
TRIES = 3
T = TypeVar("T")


class WhalefallFileSystem(AbstractFileSystem):
    """fsspec's view of a cluster.

    Args:
        host, port: the cluster manager's (from the URL).
        token: the cluster's secret; default: WHALEFALL_FS_TOKEN, or what this host's user was left.
        auto_mkdir: make missing parents when a file is written, moved or copied.
        chunk_bytes, stripe: layout of new files (default 1 MiB over at most 8 chains).
        uid, gid: who asks; default: this process's user.
    """

    protocol = "whalefall"
    root_marker = "/"
    async_impl = False

    def __init__(
        self, host: str = "127.0.0.1", port: int = 0, token: str | None = None,
        auto_mkdir: bool = True, chunk_bytes: int = 0, stripe: int = 0, uid: int | None = None,
        gid: int | None = None, retry_s: float = 60.0, managers: Any = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(**options)
        addresses = [(h, int(p)) for h, p in managers] if managers else [(host, int(port))]
        self.host, self.port, self.auto_mkdir = host, port, auto_mkdir
        self.layout = {"chunk_bytes": chunk_bytes, "width": stripe}
        self.client = FileSystemClient(addresses, token, uid, gid, retry_s=retry_s)

    # ---- paths and URLs

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(p) for p in path]
        text = str(path)
        if text.startswith("whalefall://"):
            text = "/" + text.removeprefix("whalefall://").partition("/")[2]
        return "/" + text.strip("/")

    @staticmethod
    def _get_kwargs_from_urls(path: str) -> dict[str, Any]:
        if not str(path).startswith("whalefall://"):
            return {}
        managers, _ = parse_url(str(path))
        (host, port), *more = managers
        options: dict[str, Any] = {"host": host, "port": port}
        return options | ({"managers": tuple(managers)} if more else {})

    def unstrip_protocol(self, name: str) -> str:
        """The full URL of a path."""
        return f"whalefall://{self.host}:{self.port}{self._strip_protocol(name)}"

    @property
    def fsid(self) -> str:
        """Names this cluster."""
        return f"whalefall_{self.host}_{self.port}"

    # ---- looking

    def _describe(self, path: str, inode: Inode) -> dict[str, Any]:
        kinds = {
            InodeKind.FILE: stat.S_IFREG, InodeKind.DIRECTORY: stat.S_IFDIR,
            InodeKind.SYMLINK: stat.S_IFLNK,
        }  # fmt: skip
        size = 0 if inode.kind is InodeKind.DIRECTORY else inode.length
        row = {
            "name": path, "size": size, "type": _TYPES[inode.kind], "ino": inode.id,
            "mode": inode.mode | kinds[inode.kind], "uid": inode.uid, "gid": inode.gid,
            "mtime": inode.mtime, "created": inode.ctime, "nlink": inode.nlink,
        }  # fmt: skip
        return row | ({"destination": inode.target} if inode.kind is InodeKind.SYMLINK else {})

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Attributes of a path, symbolic links followed."""
        path = self._strip_protocol(path)
        return self._describe(path, self.client.stat(path))

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """What is in a directory, or the file itself."""
        path = self._strip_protocol(path)
        inode = self.client.stat(path)
        if inode.kind is not InodeKind.DIRECTORY:
            rows = [self._describe(path, inode)]
        else:
            base = path.rstrip("/")
            rows = [self._describe(f"{base}/{n}", i) for n, i in self.client.listdir(path)]
        return rows if detail else [row["name"] for row in rows]

    def _type(self, path: str) -> str:
        """Of what is at a path; "" if nothing is. Any other error is one."""
        try:
            return str(self.info(path)["type"])
        except (FileNotFoundError, NotADirectoryError):
            return ""

    def exists(self, path: str, **_: Any) -> bool:
        """Whether something is at a path; a cluster that does not answer is an error."""
        return bool(self._type(path))

    def isfile(self, path: str) -> bool:
        """Whether a file is at a path."""
        return self._type(path) == "file"

    def isdir(self, path: str) -> bool:
        """Whether a directory is at a path."""
        return self._type(path) == "directory"

    def walk(
        self, path: str, maxdepth: int | None = None, topdown: bool = True,
        on_error: Any = "omit", **options: Any,
    ) -> Iterator[Any]:  # fmt: skip
        """As fsspec's; `on_error="omit"` leaves out what is refused, not what nobody answers."""
        on_error = _only_refused if on_error == "omit" else on_error
        yield from super().walk(path, maxdepth, topdown, on_error, **options)

    def created(self, path: str) -> datetime.datetime:
        """When a file's inode last changed."""
        return datetime.datetime.fromtimestamp(self.info(path)["created"], datetime.UTC)

    def modified(self, path: str) -> datetime.datetime:
        """When a file's content last changed."""
        return datetime.datetime.fromtimestamp(self.info(path)["mtime"], datetime.UTC)

    # ---- changing names

    def mkdir(self, path: str, create_parents: bool = True, **_: Any) -> None:
        """Make a directory."""
        self.client.meta("mkdir", path=self._strip_protocol(path), parents=create_parents)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a directory and its parents."""
        path = self._strip_protocol(path)
        self.client.meta("mkdir", path=path, parents=True, exist_ok=exist_ok)

    def rmdir(self, path: str) -> None:
        """Remove an empty directory."""
        self.client.meta("remove", path=self._strip_protocol(path), directory=True)

    def rm_file(self, path: str) -> None:
        """Remove a file."""
        self.client.meta("remove", path=self._strip_protocol(path), directory=False)

    def _rm(self, path: str) -> None:
        self.client.meta("remove", path=self._strip_protocol(path))

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> None:
        """Remove files, with `recursive` directories and what is in them."""
        paths = [path] if isinstance(path, str) else path
        for name in self.expand_path(paths, recursive=recursive, maxdepth=maxdepth)[::-1]:
            self._rm(name)

    def mv(
        self, path1: str, path2: str, recursive: bool = False, maxdepth: int | None = None,
        **_: Any,
    ) -> None:  # fmt: skip
        """Move a file or directory: one atomic rename."""
        old, new = self._strip_protocol(path1), self._strip_protocol(path2)
        if old == new:
            return
        if path2.endswith("/") or (self.isdir(new) and not self.isdir(old)):
            new = f"{new.rstrip('/')}/{old.rsplit('/', 1)[1]}"
        self._parents(new)
        self.client.meta("rename", old=old, new=new)

    def _check_target(self, path: str, exclusive: bool) -> None:
        """Refuse early what `publish` would refuse; make missing parents."""
        try:
            there = self.client.stat(path)
        except FileNotFoundError:
            self._parents(path)
            return
        if exclusive:
            raise fs_error(17, path)
        if there.kind is InodeKind.DIRECTORY:
            raise fs_error(21, path)

    def _parents(self, path: str) -> None:
        above = self._parent(path)
        if self.auto_mkdir and above not in ("", "/") and not self.exists(above):
            self.client.meta("mkdir", path=above, parents=True, exist_ok=True)

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        """Copy a file (or make the directory), through this process."""
        old, new = self._strip_protocol(path1), self._strip_protocol(path2)
        if self.isdir(old):
            self.makedirs(new, exist_ok=True)
            return
        with self.open(old, "rb") as source, self.open(new, "wb") as target:
            while data := source.read(COPY_BYTES):
                target.write(data)

    def chmod(self, path: str, mode: int) -> None:
        """Set permission bits."""
        self.client.meta("set_attributes", path=self._strip_protocol(path), changes={"mode": mode})

    def touch(self, path: str, truncate: bool = True, **_: Any) -> None:
        """Make an empty file; with `truncate` off, only renew its time."""
        path = self._strip_protocol(path)
        if truncate or not self.exists(path):
            self.pipe_file(path, b"")
            return
        self.client.meta("set_attributes", path=path, changes={"mtime": time.time()})

    def symlink(self, target: str, path: str) -> None:
        """Make a symbolic link at `path` to `target`."""
        self.client.meta("symlink", target=target, path=self._strip_protocol(path))

    def link(self, old: str, new: str) -> None:
        """Give a file one more name."""
        old, new = self._strip_protocol(old), self._strip_protocol(new)
        self.client.meta("link", old=old, new=new)

    # ---- bytes

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **_: Any
    ) -> bytes:
        """A file's bytes, or a range of them; negative positions count from its end."""

        def read(inode: Inode) -> bytes:
            begin, stop = _positions(inode.length, start, end)
            return bytes(self.client.read(inode, begin, stop - begin))

        return self._whole(path, read)

    def _file(self, path: str) -> Inode:
        """A file that may be read; not held open."""
        path = self._strip_protocol(path)
        inode = self.client.stat(path, wanted=READ)
        if inode.kind is InodeKind.DIRECTORY:
            raise fs_error(21, path)
        return inode

    def _whole(self, path: str, read: Callable[[Inode], T]) -> T:
        """Read a file; if it was replaced and collected meanwhile, what has its name now."""
        for _ in range(TRIES):
            with contextlib.suppress(Stale):
                return read(self._file(path))
        inode, session = self.client.open_session("open", path=self._strip_protocol(path))
        try:
            return read(inode)
        finally:
            self.client.close_session(inode, session)

    def cat_ranges(
        self, paths: list[str], starts: Any, ends: Any, max_gap: int | None = None,
        on_error: str = "return", **_: Any,
    ) -> list[Any]:  # fmt: skip
        """Ranges of many files in one batch.

        Args:
            on_error: "raise"; or else each range that could not be read has its error in its place.
        """
        starts = starts if isinstance(starts, list) else [starts] * len(paths)
        ends = ends if isinstance(ends, list) else [ends] * len(paths)
        if not len(paths) == len(starts) == len(ends):
            raise ValueError("cat_ranges: paths, starts and ends differ in length")
        results = self._files(paths, on_error)
        there = [i for i, inode in enumerate(results) if isinstance(inode, Inode)]
        ranges = [_range(results[i], starts[i], ends[i]) for i in there]
        try:
            answers: list[Any] = list(self.client.read_each(ranges))
        except ClusterError as error:
            answers = [error] * len(ranges)
        for i, wanted, got in zip(there, ranges, answers, strict=True):
            results[i] = got if isinstance(got, Exception) else bytes(wanted.into)
        for path in {paths[i] for i in there if isinstance(results[i], Stale)}:
            mine = [i for i in there if paths[i] == path]
            parts = self._anew(path, [(starts[i], ends[i]) for i in mine])
            for i, part in zip(mine, parts, strict=True):
                results[i] = part
        for result in results if on_error == "raise" else ():
            if isinstance(result, Exception):
                raise result
        return results

    def _files(self, paths: list[str], on_error: str) -> list[Any]:
        """Each path's inode, or its error."""
        found: dict[str, Any] = {}
        down: ClusterError | None = None  # not asked again: each time takes `retry_s`
        for path in dict.fromkeys(paths):
            try:
                found[path] = down or self._file(path)
            except (FsError, ClusterError) as error:
                if on_error == "raise":
                    raise
                found[path] = error
                down = error if isinstance(error, ClusterError) else None
        return [found[path] for path in paths]

    def _anew(self, path: str, places: list[tuple[Any, Any]]) -> list[Any]:
        """Ranges of one file, all of the same content; or the error for each."""

        def read(inode: Inode) -> list[Any]:
            ranges = [_range(inode, *place) for place in places]
            self.client.read_ranges(ranges)
            return [bytes(wanted.into) for wanted in ranges]

        try:
            return self._whole(path, read)
        except (FsError, StorageError, ClusterError) as error:
            return [error] * len(places)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        """Write a whole file."""
        with self.open(path, "xb" if mode == "create" else "wb") as file:
            file.write(value)

    def checksum(self, path: str) -> int:
        """CRC-32C of a file's content."""
        return self._whole(path, self.client.checksum)

    def open(
        self, path: str, mode: str = "rb", block_size: int | None = None, cache_options: Any = None,
        compression: str | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        """As fsspec's; a `with` block that raises leaves no file, in text and compressed too."""
        if "r" in mode:
            return super().open(path, mode, block_size, cache_options, compression, **options)
        if "b" not in mode:
            text = {k: options.pop(k) for k in ("encoding", "errors", "newline") if k in options}
            mode = mode.replace("t", "") + "b"
            below = self.open(path, mode, block_size, cache_options, compression, **options)
            return TextFile(below, **text)
        file = super().open(path, mode, block_size, cache_options, **options)
        return file if compression is None else CompressedFile(file, compression)

    def _open(
        self, path: str, mode: str = "rb", block_size: int | None = None, autocommit: bool = True,
        cache_options: Any = None, **options: Any,
    ) -> WhalefallFile:  # fmt: skip
        return WhalefallFile(
            self, path, mode, block_size or 8 << 20, autocommit,
            cache_type=options.pop("cache_type", "readahead"), cache_options=cache_options,
            **options,
        )  # fmt: skip


def _range(inode: Inode, start: int | None, end: int | None) -> Range:
    begin, stop = _positions(inode.length, start, end)
    return Range(inode, begin, stop - begin, bytearray(stop - begin))


def _only_refused(error: OSError) -> None:
    """What `walk` may leave out: a folder that may not be read, not a cluster that is not there."""
    if not isinstance(error, FsError):
        raise error


def _positions(length: int, start: int | None, end: int | None) -> tuple[int, int]:
    begin, stop, _ = slice(start, end).indices(length)
    return begin, max(begin, stop)


# The entry point does this for an installed package; a checkout on the path gets it on import.
register_implementation("whalefall", WhalefallFileSystem, clobber=True)
