"""GraySort as a plan of tasks, for either executor and any file system: sample, deal, sort.

In: files of records. Out: a folder of `part-00000.dat` …, in order one after the other. Nodes: rows
naming runs of records → one task samples splitters → each run is dealt into ranges of keys → each
range is sorted by one task → a sink. What a task reads at once stays within its memory; a range
that exceeds it (a hot key) is sorted with a spill.
Source: smallpond's GraySort run, whose plan deals by fixed prefixes of the key instead.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from whalefall.data import paths as names
from whalefall.data.dataset import DataSet, FileSet
from whalefall.data.errors import PlanError
from whalefall.data.graysort.library import library
from whalefall.data.graysort.records import KEY_BYTES, RECORD_BYTES, read_all, write_all
from whalefall.data.graysort.sort import MIN_MEMORY, sort_file
from whalefall.data.memory import ArrowTableDataSet
from whalefall.data.nodes import (
    ArrowComputeNode,
    DataSinkNode,
    DataSourceNode,
    EvenlyDistributedPartitionNode,
    Node,
    PythonScriptNode,
    UserDefinedPartitionNode,
)
from whalefall.errors import ConfigError, MissingError

if TYPE_CHECKING:
    from whalefall.data.session import Session

__all__ = ["gray_sort"]

SAMPLES_A_PART = 512
MAX_BLOCK = 640_000  # records read at once: 64 MB


def gray_sort(
    session: Session, sources: str | Sequence[str], target: str, npartitions: int = 0
) -> None:
    """Sort files of 100-byte records into a folder, all of it or nothing.

    Args:
        sources: files, patterns, folders or fsspec URLs.
        target: folder or fsspec URL.
        npartitions: how many files; default two a core, more where a range would exceed its
            task's memory.
    Raises: MissingError where no file matches; ConfigError for one that holds no whole records.
    """
    ctx, job = session._ctx, session._runtime_ctx
    runs = [(path, record_count(path)) for path in _resolved(sources)]
    total = sum(count for _, count in runs)
    slots = session._job.executor.slots
    share = job.usable_memory_size // job.usable_cpu_count
    count = npartitions or max(2 * slots, -(-total * RECORD_BYTES * 2 // share))
    if not 1 <= count < 1 << 16:
        raise PlanError(f"gray_sort: npartitions is {count}, wanted 1 to 65535")
    chunk = max(1, -(-total // (4 * slots)))
    table = _chunks(runs, chunk)
    source = DataSourceNode(ctx, ArrowTableDataSet(table))
    splitters = ArrowComputeNode(ctx, (source,), process_func=SampleKeys(count))
    pieces = EvenlyDistributedPartitionNode(
        ctx, (source,), min(table.num_rows, 4 * slots), partition_by_rows=True
    )
    dealt = PythonScriptNode(ctx, (pieces, splitters), process_func=DealRecords(count))
    ranges = ByRange(ctx, (dealt,), count, dimension="range")
    placed: Node = PythonScriptNode(ctx, (ranges,), process_func=SortRange())
    session._run(DataSinkNode(ctx, (placed,), names.to_absolute(target)))


def _resolved(sources: str | Sequence[str]) -> list[str]:
    listed = [sources] if isinstance(sources, str) else list(sources)
    files = names.resolve(listed)
    if not files:
        raise MissingError(f"gray_sort: no file matches {', '.join(listed)}")
    return files


def record_count(path: str) -> int:
    """How many records a file or URL holds; MissingError, ConfigError as `count_records`."""
    from whalefall.data.graysort.records import count_records

    if not names.is_url(path):
        return count_records(path)
    import fsspec

    filesystem, inner = fsspec.core.url_to_fs(path)
    size = int(filesystem.size(inner))
    if size % RECORD_BYTES:
        raise ConfigError(f"{path}: {size} bytes, wanted a multiple of {RECORD_BYTES}")
    return size // RECORD_BYTES


def _chunks(runs: Sequence[tuple[str, int]], chunk: int) -> Any:
    """Rows (path, begin, count) of runs of at most `chunk` records."""
    import pyarrow as pa

    rows = [
        (path, begin, min(chunk, count - begin))
        for path, count in runs
        for begin in range(0, max(count, 1), chunk)
    ]
    columns = list(zip(*rows, strict=True))
    return pa.table({"path": columns[0], "begin": columns[1], "count": columns[2]})


def read_records(path: str, begin: int, out: np.ndarray) -> None:
    """Fill [N, 100] uint8 with the records from `begin` on of a file or URL."""
    if names.is_url(path):
        import fsspec

        filesystem, inner = fsspec.core.url_to_fs(path)
        end = (begin + len(out)) * RECORD_BYTES
        data = filesystem.cat_file(inner, begin * RECORD_BYTES, end)
        out[:] = np.frombuffer(data, np.uint8).reshape(-1, RECORD_BYTES)
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        read_all(handle, out, begin * RECORD_BYTES)
    finally:
        os.close(handle)


@dataclass(frozen=True)
class SampleKeys:
    """Compute function: rows of runs to a table of ascending splitters `k`."""

    num_ranges: int

    def __call__(self, runtime_ctx: Any, tables: Sequence[Any]) -> Any:
        import pyarrow as pa

        rows = tables[0].to_pylist()
        total = sum(row["count"] for row in rows)
        wanted = min(total, SAMPLES_A_PART * self.num_ranges)
        keys: list[bytes] = []
        for row in rows:
            # neighbours, read at once, from 16 places of each run
            share = -(-row["count"] * wanted // max(total, 1))
            size = -(-share // 16)
            block = np.empty((size, RECORD_BYTES), np.uint8)
            for place in range(16 if size else 0):
                at = min(place * row["count"] // 16, row["count"] - size)
                read_records(row["path"], row["begin"] + at, block)
                keys += [key.tobytes() for key in block[:, :KEY_BYTES]]
        keys.sort()
        points = [keys[i * len(keys) // self.num_ranges] for i in range(1, self.num_ranges) if keys]
        return pa.table({"k": pa.array(points, pa.binary(KEY_BYTES))})


@dataclass(frozen=True)
class DealRecords:
    """Script: the records of some runs to one file a range of keys, `range-00000.dat` …"""

    num_ranges: int

    def __call__(self, runtime_ctx: Any, datasets: Sequence[DataSet], folder: str) -> bool:
        rows = datasets[0].to_arrow_table().to_pylist()
        keys = datasets[1].to_arrow_table().column("k").to_pylist()
        splitters = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)
        num_ranges = len(splitters) + 1
        limit = (runtime_ctx.task.memory_limit or 1 << 30) // (3 * RECORD_BYTES)
        longest = min(MAX_BLOCK, limit, max(row["count"] for row in rows))
        block, out = np.empty((2, longest, RECORD_BYTES), np.uint8)
        here, sizes = np.zeros(num_ranges, np.int64), np.zeros(num_ranges, np.int64)
        with ExitStack() as opened:
            handles: dict[int, Any] = {}
            for path, begin, count in _blocks(rows, max(longest, 1)):
                piece = block[:count]
                read_records(path, begin, piece)
                library().wf_graysort_deal(
                    piece.ctypes.data, count, splitters.ctypes.data, num_ranges, out.ctypes.data,
                    here.ctypes.data,
                )  # fmt: skip
                ends = np.cumsum(here)
                for part in map(int, np.flatnonzero(here)):
                    if part not in handles:
                        name = os.path.join(folder, f"range-{part:05d}.dat")
                        handles[part] = opened.enter_context(open(name, "wb", buffering=0))
                    data = out[ends[part] - here[part] : ends[part]]
                    write_all(handles[part].fileno(), data, int(sizes[part]) * RECORD_BYTES)
                sizes += here
        return True


def _blocks(rows: Sequence[dict[str, Any]], longest: int) -> list[tuple[str, int, int]]:
    return [
        (row["path"], row["begin"] + at, min(longest, row["count"] - at))
        for row in rows
        for at in range(0, row["count"], longest)
    ]


class ByRange(UserDefinedPartitionNode):
    """Gives the files of a range to its partition."""

    def partition(self, runtime_ctx: Any, dataset: DataSet) -> list[DataSet]:
        parts: list[list[str]] = [[] for _ in range(self.npartitions)]
        for path in dataset.resolved_paths:
            parts[int(os.path.basename(path)[6:11])].append(path)
        return [FileSet([]).with_paths(part) for part in parts]


@dataclass(frozen=True)
class SortRange:
    """Script: the files of a range to one sorted file, `part-00000.dat` …"""

    def __call__(self, runtime_ctx: Any, datasets: Sequence[DataSet], folder: str) -> bool:
        index = runtime_ctx.task.partition_infos_as_dict["range"]
        target = os.path.join(folder, f"part-{index:05d}.dat")
        with open(target, "wb") as whole:
            for path in datasets[0].resolved_paths:
                with open(path, "rb") as part:
                    shutil.copyfileobj(part, whole, 16 << 20)
        memory = max(MIN_MEMORY, runtime_ctx.task.memory_limit or MIN_MEMORY)
        sort_file(target, target, memory)
        return True
