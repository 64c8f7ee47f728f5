"""Sorting a file of records within a stated memory.

What fits is read, ordered, gathered and written. What does not is first dealt into ranges of keys
by sampled splitters, each of which fits; the ranges spill to one file each beside the output, and
are then sorted in turn straight to their places. Reading, sorting and writing overlap.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np

from whalefall.data.errors import writing
from whalefall.data.graysort.library import library
from whalefall.data.graysort.records import (
    KEY_BYTES,
    RECORD_BYTES,
    count_records,
    read_all,
    write_all,
)
from whalefall.data.runtime import available_memory
from whalefall.data.scratch import scratch_folder
from whalefall.data.storage import fsync_path
from whalefall.errors import ConfigError

__all__ = ["sort_file"]

MIN_MEMORY = 16 << 20
OUT_RECORDS = 80_000  # 8 MB: gathered in cache, written while the next are gathered
ENTRY_BYTES = 16
# bytes in memory for each byte that is sorted there: records, two lists of entries, bucket numbers
PER_BYTE = 1 + (2 * ENTRY_BYTES + 2) / RECORD_BYTES
SAMPLES_A_PART = 512
MAX_PARTS = 512  # an open file each


def sort_file(
    source: str, target: str, memory: int | None = None, temp_dir: str | None = None,
    watch: Callable[[int, int], None] | None = None,
) -> int:  # fmt: skip
    """Sort a file of 100-byte records by their first 10 bytes; equal keys keep their order.

    Args:
        source: the file; it may be the target.
        target: the result, there completely or not at all.
        memory: bytes to use; default half of the machine's.
        temp_dir: where to spill; default beside the target.
        watch: called with (bytes moved, bytes to move).
    Returns: records sorted.
    Raises: MissingError, ConfigError, WriteError.
    """
    count = count_records(source)
    budget = available_memory() // 2 if memory is None else memory
    if budget < MIN_MEMORY:
        raise ConfigError(f"sort: memory is {budget} bytes, wanted at least {MIN_MEMORY}")
    folder = os.path.dirname(os.path.abspath(target))
    if not os.path.isdir(folder):
        raise ConfigError(f"sort: {folder} is no folder")
    if temp_dir and not os.path.isdir(temp_dir):
        raise ConfigError(f"sort: temp_dir is {temp_dir!r}, wanted a folder to spill to")
    with writing(target), ExitStack() as stack:
        own = spill = stack.enter_context(scratch_folder(target))
        if temp_dir:
            spill = stack.enter_context(
                scratch_folder(os.path.join(temp_dir, os.path.basename(target)))
            )
        temporary = os.path.join(own, "sorted")
        with (
            _opened(source, os.O_RDONLY) as read,
            _opened(temporary, os.O_RDWR | os.O_CREAT) as out,
        ):
            Sorter(read, out, count, budget, spill, watch).run()
            os.fsync(out)
        os.replace(temporary, target)
        fsync_path(folder)
    return count


@contextmanager
def _opened(path: str, flags: int) -> Iterator[int]:
    handle = os.open(path, flags, 0o644)
    try:
        yield handle
    finally:
        os.close(handle)


@dataclass
class Sorter:
    """One run: file handles, the memory left, and two helper threads for IO."""

    source: int
    target: int
    count: int
    budget: int
    temp_dir: str
    watch: Callable[[int, int], None] | None = None

    def run(self) -> None:
        """Sort all of the source into the target."""
        self.moved = 0
        fits = self.count * RECORD_BYTES * PER_BYTE + 2 * OUT_RECORDS * RECORD_BYTES <= self.budget
        self.total = self.count * RECORD_BYTES * (2 if fits else 4)
        with ThreadPoolExecutor(2) as self.io:
            if fits:
                records = self.read_whole(self.source, 0, self.count)
                self.emit(records, 0)
            else:
                self.external(self.temp_dir, self.source, self.count, 0)

    def _tell(self, num_bytes: int) -> None:
        self.moved += num_bytes
        if self.watch is not None:
            self.watch(min(self.moved, self.total), self.total)

    def read_whole(self, handle: int, begin: int, count: int) -> np.ndarray:
        """Records of a file, read by both threads."""
        records = np.empty((count, RECORD_BYTES), np.uint8)
        middle = count // 2
        parts = [(0, middle), (middle, count)]
        for job in [
            self.io.submit(read_all, handle, records[a:b], (begin + a) * RECORD_BYTES)
            for a, b in parts
            if b > a
        ]:
            job.result()
        self._tell(records.nbytes)
        return records

    def emit(self, records: np.ndarray, at: int) -> None:
        """Sort records in memory and write them as records `at` … of the target."""
        count, lib = len(records), library()
        entries, scratch = np.empty((2, count, 2), np.uint64)
        lib.wf_graysort_order(
            records.ctypes.data, count, entries.ctypes.data, scratch.ctypes.data
        )  # fmt: skip
        del scratch
        buffers = np.empty((2, min(OUT_RECORDS, count), RECORD_BYTES), np.uint8)
        pending: list[Future[None] | None] = [None, None]
        for turn, begin in enumerate(range(0, count, OUT_RECORDS)):
            slot = turn % 2
            if (job := pending[slot]) is not None:
                job.result()
            block = buffers[slot][: min(OUT_RECORDS, count - begin)]
            lib.wf_graysort_gather(
                records.ctypes.data, entries.ctypes.data, begin, len(block), block.ctypes.data
            )
            where = (at + begin) * RECORD_BYTES
            pending[slot] = self.io.submit(write_all, self.target, block, where)
            self._tell(block.nbytes)
        for job in pending:
            if job is not None:
                job.result()

    def external(self, spill: str, handle: int, count: int, at: int) -> None:
        """Deal records into ranges that fit, then sort each into its place."""
        part_bytes = int(self.budget * 0.8 / PER_BYTE)
        num_parts = min(MAX_PARTS, max(2, -(-int(count * RECORD_BYTES * 1.1) // part_bytes)))
        splitters, alike = self.sample(handle, count, num_parts)
        folder = tempfile.mkdtemp(dir=spill)
        counts = self.deal(folder, handle, count, splitters)
        for index, size in enumerate(counts):
            path = os.path.join(folder, str(index))
            if size:
                with _opened(path, os.O_RDONLY) as part:
                    if size * RECORD_BYTES * PER_BYTE <= self.budget:
                        self.emit(self.read_whole(part, 0, size), at)
                    elif index in alike:
                        self.copy(part, size, at)
                    else:
                        self.external(spill, part, size, at)
                at += size
            os.remove(path)
        shutil.rmtree(folder)

    def copy(self, part: int, size: int, at: int) -> None:
        """Write a range of equal keys as it is."""
        for begin in range(0, size, OUT_RECORDS):
            block = self.read_whole(part, begin, min(OUT_RECORDS, size - begin))
            write_all(self.target, block, (at + begin) * RECORD_BYTES)
            self._tell(block.nbytes)

    def sample(self, handle: int, count: int, num_parts: int) -> tuple[np.ndarray, set[int]]:
        """Splitters from records spread evenly, and which of the ranges hold one key alone.

        A key that fills half a range or more gets a range of its own, from it to its successor; so
        every other range is shorter than the whole, however the keys repeat.

        Returns: ascending keys [ranges - 1, 10] uint8; indices of ranges.
        """
        run = -(-min(count, SAMPLES_A_PART * num_parts) // 1024)  # neighbours: one read
        keys: Counter[int] = Counter()
        block = np.empty((run, RECORD_BYTES), np.uint8)
        for group in range(1024):
            read_all(handle, block, min(group * count // 1024, count - run) * RECORD_BYTES)
            keys.update(int.from_bytes(row[:KEY_BYTES].tobytes(), "big") for row in block)
        total, seen, points, hot = keys.total(), 0, [], []
        for key in sorted(keys):
            before, seen = seen, seen + keys[key]
            if keys[key] * 2 * num_parts >= total:
                hot.append(key)
                points += [key, key + 1]
            elif before * num_parts // total != seen * num_parts // total:
                points.append(key)
        points = sorted({p for p in points if 0 < p < 1 << 80})
        alike = {bisect_right(points, key) for key in hot}
        flat = b"".join(p.to_bytes(KEY_BYTES, "big") for p in points)
        return np.frombuffer(flat, np.uint8).reshape(-1, KEY_BYTES), alike

    def deal(self, folder: str, handle: int, count: int, splitters: np.ndarray) -> list[int]:
        """Write each range of keys into a file; returns how many records each holds."""
        num_parts = len(splitters) + 1
        block = max(1, int(self.budget * 0.9 / 3 / (RECORD_BYTES + 2)))
        reads = np.empty((2, block, RECORD_BYTES), np.uint8)
        out = np.empty((block, RECORD_BYTES), np.uint8)
        counts, here = np.zeros(num_parts, np.int64), np.zeros(num_parts, np.int64)
        handles = [
            os.open(os.path.join(folder, str(p)), os.O_WRONLY | os.O_CREAT, 0o600)
            for p in range(num_parts)
        ]
        begins = list(range(0, count, block))

        def fetch(turn: int) -> np.ndarray:
            piece = reads[turn % 2][: min(block, count - begins[turn])]
            read_all(handle, piece, begins[turn] * RECORD_BYTES)
            return piece

        try:
            ahead = self.io.submit(fetch, 0)
            for turn in range(len(begins)):
                piece = ahead.result()
                if turn + 1 < len(begins):
                    ahead = self.io.submit(fetch, turn + 1)
                library().wf_graysort_deal(
                    piece.ctypes.data, len(piece), splitters.ctypes.data, num_parts,
                    out.ctypes.data, here.ctypes.data,
                )  # fmt: skip
                end = np.cumsum(here)
                for p in np.flatnonzero(here):
                    begin = end[p] - here[p]
                    write_all(handles[p], out[begin : end[p]], int(counts[p]) * RECORD_BYTES)
                counts += here
                self._tell(2 * piece.nbytes)
        finally:
            for item in handles:
                os.close(item)
        return [int(c) for c in counts]
