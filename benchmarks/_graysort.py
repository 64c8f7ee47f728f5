"""GraySort's rows of `benchmarks/data.py`: raw file in, raw file out, validated."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars
import pyarrow as pa

from whalefall.data.graysort import gensort, sort_file, valsort
from whalefall.testing.benchmark import Row, Timing, interleave


def against(
    what: str,
    peer: str,
    ours: Timing,
    theirs: Timing,
    target: str,
    wanted: float,
    note: str = "",
) -> Row:
    """A row of seconds; `wanted` is the least ratio theirs / ours."""
    ratio = theirs.median_s / ours.median_s
    return Row(
        what, peer, target, ours.median_s, theirs.median_s, "s", ratio, ratio >= wanted, note
    )


def as_binary(records: np.ndarray) -> Any:
    """Rows of bytes as an Arrow array."""
    flat = pa.py_buffer(np.ascontiguousarray(records))
    kind = pa.binary(records.shape[1])
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(records), [None, flat]).cast(
        pa.large_binary()
    )


def graysort_rows(folder: Path, count: int, rounds: int) -> list[Row]:
    """Raw file in, raw file out, validated; against GNU sort and DuckDB on the same file."""
    source, target = str(folder / "in.dat"), str(folder / "out.dat")
    gensort(source, count)
    checksum = valsort([source]).checksum

    def ours() -> None:
        sort_file(source, target)

    def by_duckdb() -> None:
        # fixed-width records as BLOBs: read as a numpy array, sorted, written raw
        raw = np.fromfile(source, np.uint8)
        array = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(100), len(raw) // 100, [None, pa.py_buffer(raw)]
        )
        table = pa.table({"r": array})
        conn = duckdb.connect()
        conn.register("t", table)
        done = conn.sql("select r from t order by r[1:10]").to_arrow_table()
        with open(folder / "duck.dat", "wb") as file:
            for chunk in done.column("r").chunks:
                file.write(memoryview(chunk.buffers()[-1])[: len(chunk) * 100])
            os.fsync(file.fileno())

    def by_polars() -> None:
        raw = np.fromfile(source, np.uint8).reshape(-1, 100)
        frame = polars.DataFrame({"k": as_binary(raw[:, :10]), "r": as_binary(raw)})
        done = frame.sort("k").get_column("r").to_arrow()
        with open(folder / "polars.dat", "wb") as file:
            for chunk in done.chunks if hasattr(done, "chunks") else [done]:
                file.write(memoryview(chunk.cast(pa.large_binary()).buffers()[-1]))
            os.fsync(file.fileno())

    def limit() -> None:
        with open(source, "rb", buffering=0) as read, open(folder / "copy.dat", "wb") as write:
            while block := read.read(8 << 20):
                write.write(block)
            write.flush()
            os.fsync(write.fileno())

    contenders = {"ours": ours, "duckdb": by_duckdb, "polars": by_polars, "copy": limit}
    timed = interleave(contenders, max(1, rounds // 2), 1)
    found = valsort([target])
    if not found.ok or found.checksum != checksum:
        raise RuntimeError(f"the sorted file is wrong: {found}")
    size = count / 1e7
    begin = time.perf_counter()
    gnu_sort(folder, count)
    gnu = time.perf_counter() - begin
    rows = [
        against(f"GraySort {size:g} GB, in memory", f"DuckDB {duckdb.__version__} ORDER BY",
                timed["ours"], timed["duckdb"], "faster", 1.0),
        against(f"GraySort {size:g} GB, in memory", f"Polars {polars.__version__} sort",
                timed["ours"], timed["polars"], "faster", 1.0),
        against(f"GraySort {size:g} GB, in memory", "copying the file, synced (limit)",
                timed["ours"], timed["copy"], ">= 0.5x", 0.5),
        against(f"GraySort {size:g} GB, in memory", "GNU sort -S 8G --parallel, ASCII records",
                timed["ours"], Timing(gnu, gnu, gnu, 1), "faster", 1.0, "GNU sort once"),
    ]  # fmt: skip
    begin = time.perf_counter()
    code = (
        "import re, sys; from whalefall.data.graysort import sort_file; "
        "sort_file(sys.argv[1], sys.argv[2], 512 << 20); "  # ru_maxrss would count this process's
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )
    out = subprocess.run([sys.executable, "-c", code, source, target], check=True,
                         capture_output=True, text=True).stdout  # fmt: skip
    seconds, peak = time.perf_counter() - begin, int(out) / 1024
    ok = valsort([target]).checksum == checksum
    rows.append(
        Row(f"GraySort {size:g} GB with --memory 512MB: peak resident", "limit 700 MB", "<= 700 MB",
            peak, 700.0, "MB", 700 / peak, ok and peak <= 700, f"{seconds:.1f} s")
    )  # fmt: skip
    return rows


def gnu_sort(folder: Path, count: int) -> None:
    """GNU sort of as many ASCII records (it cannot sort the binary ones)."""
    source = str(folder / "ascii.dat")
    if not os.path.exists(source):
        gensort(source, count, ascii=True)
    command = ["sort", "-S", "8G", f"--parallel={os.cpu_count()}", "-k1.1,1.10", "-o",
               str(folder / "gnu.dat"), source]  # fmt: skip
    subprocess.run(command, check=True, env={**os.environ, "LC_ALL": "C"})
