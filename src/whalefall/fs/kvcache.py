"""File-system room: a key-value cache of fixed-size blocks on disk — prefix caching that survives.

In: a cluster's URL or a local folder, block size, namespace. Out: blocks by hash, many at a time.
A block is written whole with its checksum and key, and believed only if both match: torn or stale
blocks are never returned, and a damaged file is removed. Blocks leave by age (TTL) and, the least
recently used first, by size.

Blocks lie in segment files, one for each `put_many`; the index is rebuilt from their headers, so
several processes may share a namespace: each sees what the others wrote after `refresh`.
Source: 3FS's use as a KV cache for inference.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import struct
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec

from whalefall.comm import crc32c
from whalefall.errors import ConfigError
from whalefall.fs.client.forks import renew_in_children
from whalefall.fs.errors import ClusterError, StorageError

__all__ = ["KVCache"]

# magic, blocks, block bytes, seconds since 1970, CRC-32C of the table
_HEADER = struct.Struct("<8sIQdI")
_KIND = b"WFkv"
_MAGIC = _KIND + b"0001"
_SUM = struct.Struct("<I")
_UNREACHABLE = (StorageError, ClusterError)
log = logging.getLogger("whalefall.fs")
KEY_BYTES = 32
_ROW_BYTES = KEY_BYTES + 4


@dataclass
class _Segment:
    """One file of blocks: its path, keys in order, checksums, when it was written."""

    path: str
    keys: list[bytes]
    sums: list[int]
    written: float
    live: int


class KVCache:
    """Fixed-size blocks by key, on a cluster or a local disk.

    Args:
        url_or_path: `whalefall://host:port/folder`, or a folder.
        block_bytes: bytes of every block.
        namespace: blocks of different namespaces (models) never meet.
        capacity_bytes: the least recently used blocks leave beyond it; 0: no limit.
        ttl_s: older blocks are gone; 0: never.
    """

    def __init__(
        self,
        url_or_path: str | os.PathLike[str],
        block_bytes: int,
        namespace: str = "default",
        capacity_bytes: int = 0,
        ttl_s: float = 0.0,
    ) -> None:
        if block_bytes <= 0:
            raise ConfigError(f"kvcache: block_bytes is {block_bytes}, wanted > 0")
        if not namespace or "/" in namespace:
            raise ConfigError(f"kvcache: namespace is {namespace!r}, wanted a name without '/'")
        text = os.fspath(url_or_path)
        if text.startswith("whalefall://"):
            # Registers the protocol for a checkout that is on the path, not installed.
            pass
        elif "://" not in text:
            text = "file://" + os.path.abspath(text)
        self.fs, root = fsspec.core.url_to_fs(text)
        self.folder = f"{root.rstrip('/')}/{namespace}-{block_bytes}"
        self.block_bytes, self.capacity_bytes, self.ttl_s = block_bytes, capacity_bytes, ttl_s
        self.hits = self.misses = self.damaged = 0
        self._told = False
        self._stuck: set[str] = set()  # damaged files that could not be removed
        self.after_fork()
        renew_in_children(self)
        self._segments: dict[str, _Segment] = {}
        # Key → (segment, place); the least recently used first.
        self._index: OrderedDict[bytes, tuple[str, int]] = OrderedDict()
        self.fs.makedirs(self.folder, exist_ok=True)
        self.refresh()

    def after_fork(self) -> None:
        """In a forked child: a lock that no other thread holds."""
        self._mutex = threading.Lock()

    # ---- reading

    def __len__(self) -> int:
        return len(self._index)

    @property
    def used_bytes(self) -> int:
        """Bytes of the blocks that are there."""
        return len(self._index) * self.block_bytes

    def exists(self, keys: Sequence[bytes | str]) -> list[bool]:
        """Which blocks are there, as far as this process knows (`refresh` looks again)."""
        with self._mutex:
            self._expire()
            return [_key(k) in self._index for k in keys]

    def get_many(self, keys: Sequence[bytes | str]) -> list[bytes | None]:
        """Blocks by key, in one batch; None for those that are not there, or do not check.

        So is a block that no replica of its chain gives within the file system's `retry_s`: it
        stays in the index, for when one is back.
        """
        wanted = [_key(k) for k in keys]
        places: list[tuple[_Segment, int] | None] = []
        with self._mutex:
            self._expire()
            for key in wanted:
                place = self._index.get(key)
                if place is not None:
                    self._index.move_to_end(key)
                places.append(place and (self._segments[place[0]], place[1]))
        there = [p for p in places if p is not None]
        starts = [self._offset(p) for p in there]
        ends = [start + self.block_bytes for start in starts]
        data = self.fs.cat_ranges([p[0].path for p in there], starts, ends, on_error="return")
        self._tell([d for d in data if isinstance(d, _UNREACHABLE)])
        found = iter(data)
        blocks: list[bytes | None] = []
        bad: list[tuple[bytes, _Segment, Any]] = []
        for key, where in zip(wanted, places, strict=True):
            blocks.append(None)
            if where is None:
                continue
            raw = next(found)
            if self._is_good(key, where, raw):
                blocks[-1] = bytes(raw)
            else:
                bad.append((key, where[0], raw))
        # After all were checked: a damaged block takes its file along.
        with self._mutex:
            for key, segment, raw in bad:
                self._heed_bad(key, segment, raw)
        hits = sum(block is not None for block in blocks)
        self.hits += hits
        self.misses += len(blocks) - hits
        return blocks

    def get(self, key: bytes | str) -> bytes | None:
        """One block, or None."""
        return self.get_many([key])[0]

    def _offset(self, place: tuple[_Segment, int]) -> int:
        return _HEADER.size + len(place[0].keys) * _ROW_BYTES + place[1] * self.block_bytes

    def _tell(self, errors: list[Any]) -> None:
        """Log that blocks cannot be read, once until all that are asked for can be again."""
        if errors and not self._told:
            log.warning(
                "kvcache: %s: %d blocks cannot be read and count as misses: %s",
                self.folder, len(errors), errors[0],
            )  # fmt: skip
        self._told = bool(errors)

    def _is_good(self, key: bytes, place: tuple[_Segment, int], data: Any) -> bool:
        segment, number = place
        return (
            isinstance(data, bytes)
            and len(data) == self.block_bytes
            and segment.keys[number] == key
            and crc32c(data) == segment.sums[number]
        )

    def _heed_bad(self, key: bytes, segment: _Segment, data: Any) -> None:
        """Forget a block that did not check; where its file was read, the file goes as a whole."""
        if isinstance(data, _UNREACHABLE):
            return
        if not isinstance(data, FileNotFoundError):
            self.damaged += 1  # else another process let it go
        if isinstance(data, bytes):
            self._forget(segment)
            self._remove_damaged(segment.path)
        elif self._index.get(key, ("", 0))[0] == segment.path:
            self._drop(key)

    # ---- writing

    def put_many(self, blocks: Mapping[bytes | str, Any]) -> int:
        """Write blocks that are not there yet, in one file that appears when it is complete.

        Args:
            blocks: key → block, `block_bytes` bytes each (anything with the buffer protocol).
        Returns: how many were new.
        Raises: ConfigError for a block of another size.
        """
        fresh: dict[bytes, memoryview] = {}
        with self._mutex:
            self._expire()
            for name, block in blocks.items():
                key, view = _key(name), memoryview(block).cast("B")
                if view.nbytes != self.block_bytes:
                    raise ConfigError(
                        f"kvcache: block {key.hex()[:16]} has {view.nbytes} bytes, "
                        f"wanted {self.block_bytes}"
                    )
                if key not in self._index:
                    fresh[key] = view
        if not fresh:
            return 0
        segment = self._write(fresh)
        with self._mutex:
            self._add(segment)
            self._evict()
        return len(fresh)

    def put(self, key: bytes | str, block: Any) -> int:
        """Write one block; returns 1 if it was new."""
        return self.put_many({key: block})

    def _write(self, blocks: dict[bytes, memoryview]) -> _Segment:
        now = time.time()
        sums = [crc32c(view) for view in blocks.values()]
        rows = [key + _SUM.pack(value) for key, value in zip(blocks, sums, strict=True)]
        table = b"".join(rows)
        head = _HEADER.pack(_MAGIC, len(blocks), self.block_bytes, now, crc32c(table))
        path = f"{self.folder}/{int(now * 1e6):020d}-{uuid.uuid4().hex[:8]}.kv"
        target = path if self.fs.protocol == "whalefall" else path + ".new"
        try:
            with self.fs.open(target, "wb") as file:
                file.write(head + table)
                for view in blocks.values():
                    file.write(view)
            if target != path:
                self.fs.mv(target, path)
        except BaseException:  # a full disk, say: do not leave half a file to fill it further
            with contextlib.suppress(Exception):
                self.fs.rm_file(target)
            raise
        return _Segment(path, list(blocks), sums, now, 0)

    # ---- leaving

    def delete(self, keys: Iterable[bytes | str]) -> int:
        """Forget blocks; a file goes when its last block does. Returns how many were there."""
        with self._mutex:
            return sum(self._drop(_key(k)) for k in keys)

    def _drop(self, key: bytes) -> bool:
        place = self._index.pop(key, None)
        if place is None:
            return False
        segment = self._segments[place[0]]
        segment.live -= 1
        if segment.live == 0:
            self._remove(segment)
        return True

    def _remove(self, segment: _Segment) -> None:
        self._segments.pop(segment.path, None)
        try:
            self.fs.rm_file(segment.path)
        except FileNotFoundError:
            return  # another process was faster

    def _remove_damaged(self, path: str) -> None:
        try:
            self.fs.rm_file(path)
        except FileNotFoundError:
            return
        except (OSError, *_UNREACHABLE):  # a folder that we may only read, say
            self._stuck.add(path)

    def _forget(self, segment: _Segment) -> None:
        """Take a file out of the index; the file itself is not touched."""
        for key in segment.keys:
            if self._index.get(key, ("", 0))[0] == segment.path:
                del self._index[key]
        self._segments.pop(segment.path, None)

    def _drop_file(self, segment: _Segment) -> None:
        """Forget all blocks of a file; with the last one it goes."""
        for key in segment.keys:
            if self._index.get(key, ("", 0))[0] == segment.path:
                self._drop(key)

    def _expire(self) -> None:
        if not self.ttl_s:
            return
        limit = time.time() - self.ttl_s
        for segment in [s for s in self._segments.values() if s.written < limit]:
            self._drop_file(segment)

    def _evict(self) -> None:
        while self.capacity_bytes and self.used_bytes > self.capacity_bytes:
            # A file goes as a whole with its least recently used block: the disk must shrink too.
            path, _ = next(iter(self._index.values()))
            self._drop_file(self._segments[path])

    # ---- the index

    def refresh(self) -> int:
        """Look for what other processes wrote or removed; returns how many blocks there are."""
        names = {n for n in self.fs.ls(self.folder, detail=False) if str(n).endswith(".kv")}
        with self._mutex:
            for path in [p for p in self._segments if p not in names]:
                self._forget(self._segments[path])
            self._stuck &= names
            unknown = sorted(names - set(self._segments) - self._stuck)
        for path in unknown:
            segment = self._read_header(path)
            if segment is not None:
                with self._mutex:
                    self._add(segment)
        with self._mutex:
            self._expire()
            self._evict()
            return len(self._index)

    def _add(self, segment: _Segment) -> None:
        self._segments[segment.path] = segment
        for number, key in enumerate(segment.keys):
            if key not in self._index:
                self._index[key] = (segment.path, number)
                segment.live += 1
        if segment.live == 0:
            self._remove(segment)

    def _read_header(self, path: str) -> _Segment | None:
        """A file's table; None for one that is gone, of another format, or damaged (it goes)."""
        try:
            head = self.fs.cat_file(path, 0, _HEADER.size)
            size = self.fs.info(path)["size"]
            if len(head) < _HEADER.size or head[: len(_KIND)] != _KIND:
                self._found_damaged(path)
                return None
            magic, count, block_bytes, written, total = _HEADER.unpack(head)
            if magic != _MAGIC:
                return None
            table_bytes = count * _ROW_BYTES
            if size != _HEADER.size + table_bytes + count * block_bytes:
                self._found_damaged(path)
                return None
            if block_bytes != self.block_bytes:
                return None
            table = self.fs.cat_file(path, _HEADER.size, _HEADER.size + table_bytes)
        except FileNotFoundError:
            return None
        if crc32c(table) != total:
            self._found_damaged(path)
            return None
        rows = [table[i : i + _ROW_BYTES] for i in range(0, table_bytes, _ROW_BYTES)]
        keys = [row[:KEY_BYTES] for row in rows]
        sums = [_SUM.unpack(row[KEY_BYTES:])[0] for row in rows]
        return _Segment(path, keys, sums, written, 0)

    def _found_damaged(self, path: str) -> None:
        with self._mutex:
            self.damaged += 1
            self._remove_damaged(path)


def _key(name: bytes | str) -> bytes:
    """A key of any length as 32 bytes; 32-byte hashes stay as they are."""
    data = name.encode() if isinstance(name, str) else bytes(name)
    if len(data) == KEY_BYTES:
        return data
    return hashlib.blake2b(data, digest_size=KEY_BYTES).digest()
