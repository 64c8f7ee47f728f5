"""Measures `whalefall.data`: session start, TPC-H, exchanges, GraySort, against peers on one host.

Run: whalefall bench data [--quick] [--scale 1]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import duckdb
import polars

from benchmarks._tpch_queries import QUERIES, TABLES
from whalefall.data import Session, init
from whalefall.data.graysort import gensort, sort_file, valsort
from whalefall.testing.benchmark import Row, Timing, interleave, save

README = """
import time; begin = time.perf_counter()
import sys
from whalefall.data import init
sp = init(data_root=sys.argv[1])
start = time.perf_counter() - begin
df = sp.read_parquet(sys.argv[1] + "/prices.parquet").repartition(3, hash_by="ticker")
df = sp.partial_sql("SELECT ticker, min(price), max(price) FROM {0} GROUP BY ticker", df)
df.write_parquet(sys.argv[1] + "/output"); df.to_pandas()
print(start, time.perf_counter() - begin)
"""


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


def start_rows(folder: Path, rounds: int) -> list[Row]:
    """Session start and the README example, each in a process of its own."""
    duckdb.execute(
        "copy (select 'T' || (i % 50) as ticker, i * 0.5 as price from range(10000) t(i)) "
        f"to '{folder}/prices.parquet'"
    ).fetchall()
    starts, wholes = [], []
    for _ in range(rounds):
        command = [sys.executable, "-c", README, str(folder)]
        begin = time.perf_counter()
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        wholes.append(time.perf_counter() - begin)
        starts.append(float(out.split()[0]))
    start, whole = sorted(starts)[rounds // 2], sorted(wholes)[rounds // 2]
    name = "smallpond's README example, process start to end"
    return [
        Row(
            "session start", "limit", "< 1 s", start, 1.0, "s", 1 / start, start < 1, "with import"
        ),
        Row(name, "limit", "< 2 s", whole, 2.0, "s", 2 / whole, whole < 2),
    ]


def tpch_files(folder: Path, scale: float) -> Path:
    """TPC-H tables as Parquet, made once."""
    target = folder / "tpch"
    if not target.exists():
        tool = shutil.which("tpchgen-cli", path=os.path.dirname(sys.executable)) or "tpchgen-cli"
        command = [tool, "parquet", "-s", str(scale), f"--output-dir={target}"]
        subprocess.run(command, check=True, capture_output=True)
    return target


def tpch_rows(session: Session, data: Path, scale: float, rounds: int) -> list[Row]:
    """Q1, an aggregate of many groups, and all 22 queries, against DuckDB on the same files."""
    conn = duckdb.connect()
    for name in TABLES:
        conn.execute(f"create view {name} as from read_parquet('{data}/{name}.parquet')").fetchall()
    frames = {name: session.read_parquet(f"{data}/{name}.parquet") for name in TABLES}

    def ours(query: str) -> None:
        frame = session.sql(query, **{n: f for n, f in frames.items() if n in query})
        frame.recompute().to_arrow()

    def theirs(query: str) -> None:
        conn.sql(query).to_arrow_table()

    groups = (
        "select l_partkey % 1000000 as k, l_suppkey % 5 as j, sum(l_quantity) as q, count(*) as n "
        "from lineitem group by 1, 2"
    )
    rows = []
    for what, query in (("TPC-H Q1", QUERIES[1]), ("aggregate of ~1 M groups", groups)):
        timed = interleave({"ours": partial(ours, query), "duckdb": partial(theirs, query)}, rounds)
        rows.append(
            against(f"{what}, SF{scale:g}", f"DuckDB {duckdb.__version__}", timed["ours"],
                    timed["duckdb"], "<= 1.2x its time", 1 / 1.2)
        )  # fmt: skip

    def all_of(run: Callable[[str], None]) -> Callable[[], None]:
        return lambda: [run(query) for query in QUERIES.values()] and None

    timed = interleave({"ours": all_of(ours), "duckdb": all_of(theirs)}, max(1, rounds // 2))
    note = "22 queries, sum"
    rows.append(
        against(f"all TPC-H queries, SF{scale:g}", f"DuckDB {duckdb.__version__}", timed["ours"],
                timed["duckdb"], "<= 1.3x its time", 1 / 1.3, note)
    )  # fmt: skip
    return rows


def exchange_rows(session: Session, data: Path, rounds: int) -> list[Row]:
    """Hash repartition and global sort of lineitem, against Polars."""
    frame = session.read_parquet(f"{data}/lineitem.parquet")
    path = f"{data}/lineitem.parquet"
    out = str(data / "polars.parquet")

    def repartition() -> None:
        frame.repartition(8, hash_by="l_orderkey").recompute().compute()

    def sort() -> None:
        frame.sort(["l_extendedprice", "l_orderkey"]).recompute().compute()

    def polars_sort() -> None:
        polars.scan_parquet(path).sort("l_extendedprice", "l_orderkey").sink_parquet(out)

    def duckdb_split() -> None:
        folder = data / "split"
        shutil.rmtree(folder, ignore_errors=True)
        duckdb.execute(
            f"copy (select *, hash(l_orderkey) % 8 as p from '{path}') to '{folder}' "
            "(format parquet, compression zstd, partition_by (p))"
        ).fetchall()

    timed = interleave(
        {"r": repartition, "d": duckdb_split, "s": sort, "p": polars_sort}, max(1, rounds // 2)
    )
    size = os.path.getsize(path) / 1e6
    return [
        against(f"hash repartition 1 → 8, {size:.0f} MB of Parquet", "DuckDB partitioned COPY",
                timed["r"], timed["d"], "no target", 0),
        against(f"global sort to Parquet, {size:.0f} MB", f"Polars {polars.__version__} streaming",
                timed["s"], timed["p"], ">= 1x", 1.0),
    ]  # fmt: skip


def graysort_rows(folder: Path, count: int, rounds: int) -> list[Row]:
    """Raw file in, raw file out, validated; against GNU sort and DuckDB on the same file."""
    source, target = str(folder / "in.dat"), str(folder / "out.dat")
    gensort(source, count)
    checksum = valsort([source]).checksum

    def ours() -> None:
        sort_file(source, target)

    def by_duckdb() -> None:
        # fixed-width records as BLOBs: read as a numpy array, sorted, written raw
        import numpy as np
        import pyarrow as pa

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

    def limit() -> None:
        with open(source, "rb", buffering=0) as read, open(folder / "copy.dat", "wb") as write:
            while block := read.read(8 << 20):
                write.write(block)
            write.flush()
            os.fsync(write.fileno())

    timed = interleave({"ours": ours, "duckdb": by_duckdb, "copy": limit}, max(1, rounds // 2), 1)
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


def main() -> None:
    parser = argparse.ArgumentParser(prog="whalefall bench data")
    parser.add_argument("--quick", action="store_true", help="small data, few rounds")
    parser.add_argument("--scale", type=float, default=1.0, help="TPC-H scale factor")
    parser.add_argument("--records", type=int, default=10_000_000, help="of GraySort")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", help="where the data lie; default a temporary folder")
    parser.add_argument("--only", nargs="*", default=["start", "tpch", "exchange", "graysort"])
    args = parser.parse_args()
    if args.quick:
        args.scale, args.records, args.rounds = 0.1, 1_000_000, 3
    with tempfile.TemporaryDirectory(prefix="whalefall-bench-") as made:
        folder = Path(args.folder or made)
        rows: list[Row] = []
        if "start" in args.only:
            rows += start_rows(folder, args.rounds)
        with init(data_root=str(folder / "jobs")) as session:
            if "tpch" in args.only:
                rows += tpch_rows(session, tpch_files(folder, args.scale), args.scale, args.rounds)
            if "exchange" in args.only:
                rows += exchange_rows(session, tpch_files(folder, args.scale), args.rounds)
        if "graysort" in args.only:
            rows += graysort_rows(folder, args.records, args.rounds)
        versions = {"duckdb": duckdb.__version__, "polars": polars.__version__}
        save("data", rows, versions)


if __name__ == "__main__":
    main()
