"""Measures `whalefall.data`: session start, TPC-H, exchanges, GraySort, against peers on one host.

Run: whalefall bench data [--quick] [--scale 1]
"""

from __future__ import annotations

import argparse
import datetime
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import duckdb
import polars

from benchmarks._graysort import against, graysort_rows
from benchmarks._tpch_queries import QUERIES, TABLES
from whalefall.data import Session, init
from whalefall.data.executor.local import LocalExecutor
from whalefall.testing.benchmark import Row, interleave, save

README = """
import time; begin = time.perf_counter()
import whalefall.compat; whalefall.compat.install()
import smallpond
sp = smallpond.init()
start = time.perf_counter() - begin
df = sp.read_parquet("prices.parquet")
df = df.repartition(3, hash_by="ticker")
df = sp.partial_sql("SELECT ticker, min(price), max(price) FROM {0} GROUP BY ticker", df)
df.write_parquet("output/")
df.to_pandas()
print(start)
"""


def start_rows(folder: Path, rounds: int) -> list[Row]:
    """Session start and the README example, each in a process of its own."""
    duckdb.execute(
        "copy (select 'T' || (i % 50) as ticker, i * 0.5 as price from range(10000) t(i)) "
        f"to '{folder}/prices.parquet'"
    ).fetchall()
    starts, wholes = [], []
    env = {**os.environ, "SP_DATA_ROOT": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
    for _ in range(rounds):
        shutil.rmtree(folder / "output", ignore_errors=True)  # as a newcomer finds it
        command = [sys.executable, "-c", README]
        begin = time.perf_counter()
        out = subprocess.run(
            command, check=True, capture_output=True, text=True, cwd=folder, env=env
        ).stdout
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
    target = folder / f"tpch{scale:g}"
    if not target.exists():
        tool = shutil.which("tpchgen-cli", path=os.path.dirname(sys.executable)) or "tpchgen-cli"
        command = [tool, "parquet", "-s", str(scale), f"--output-dir={target}"]
        subprocess.run(command, check=True, capture_output=True)
    return target


GROUPS = "select l_partkey, sum(l_quantity) as q, count(*) as n from lineitem group by l_partkey"


def views(data: Path) -> duckdb.DuckDBPyConnection:
    """DuckDB with the tables as views."""
    conn = duckdb.connect()
    for name in TABLES:
        conn.execute(f"create view {name} as from read_parquet('{data}/{name}.parquet')").fetchall()
    return conn


def by_us(session: Session, data: Path) -> Callable[[str], None]:
    """Runs a query through `Session.sql`, all of it anew."""
    frames = {name: session.read_parquet(f"{data}/{name}.parquet") for name in TABLES}

    def run(query: str) -> None:
        frame = session.sql(query, **{n: f for n, f in frames.items() if n in query})
        frame.recompute().to_arrow()

    return run


def big_rows(session: Session, data: Path, scale: float, rounds: int) -> list[Row]:
    """Q1 and an aggregate of many groups, against DuckDB and Polars on the same files."""
    conn, ours = views(data), by_us(session, data)
    lazy = polars.scan_parquet(f"{data}/lineitem.parquet")
    price = polars.col("l_extendedprice") * (1 - polars.col("l_discount"))
    q1 = (
        lazy.filter(polars.col("l_shipdate") <= datetime.date(1998, 9, 2))
        .group_by("l_returnflag", "l_linestatus")
        .agg(
            polars.col("l_quantity").sum(), polars.col("l_extendedprice").sum(),
            price.sum().alias("disc"), (price * (1 + polars.col("l_tax"))).sum().alias("charge"),
            polars.col("l_quantity").mean().alias("avg_qty"),
            polars.col("l_extendedprice").mean().alias("avg_price"),
            polars.col("l_discount").mean(), polars.len(),
        )
        .sort("l_returnflag", "l_linestatus")
    )  # fmt: skip
    groups = lazy.group_by("l_partkey").agg(polars.col("l_quantity").sum(), polars.len())
    rows = []
    count = duckdb.execute(f"select count(distinct l_partkey) from '{data}/lineitem.parquet'")
    name = f"aggregate of {count.fetchall()[0][0]:,} groups"
    for what, query, plan in (("TPC-H Q1", QUERIES[1], q1), (name, GROUPS, groups)):
        timed = interleave(
            {
                "ours": partial(ours, query),
                "duckdb": partial(lambda text: conn.sql(text).to_arrow_table(), query),
                "polars": partial(lambda lazy: lazy.collect(engine="streaming"), plan),
            },
            rounds,
        )
        what = f"{what}, SF{scale:g}"
        rows += [
            against(what, f"DuckDB {duckdb.__version__}", timed["ours"], timed["duckdb"],
                    "<= 1.2x its time", 1 / 1.2),
            against(what, f"Polars {polars.__version__} streaming", timed["ours"],
                    timed["polars"], "faster", 1.0),
        ]  # fmt: skip
    return rows


PEAK = """
import re, sys, duckdb
duckdb.connect().sql(sys.argv[1]).to_arrow_table()
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


def memory_row(folder: Path, data: Path, scale: float) -> Row:
    """Peak resident memory of the aggregate: of the busiest worker, of a process with DuckDB."""
    query = GROUPS.replace("lineitem", f"'{data}/lineitem.parquet'")
    out = subprocess.run([sys.executable, "-c", PEAK, query], check=True, capture_output=True)
    theirs = int(out.stdout) / 1024
    with init(data_root=str(folder / "jobs")) as session:
        by_us(session, data)(GROUPS)
        executor = session._job.executor
        assert isinstance(executor, LocalExecutor)
        status = [Path(f"/proc/{pid}/status").read_text() for pid in executor.pids]
    ours = max(int(text.split("VmHWM:")[1].split()[0]) for text in status) / 1024
    what = f"aggregate, SF{scale:g}: peak resident of a worker"
    peer = f"DuckDB {duckdb.__version__}, a process"
    return Row(what, peer, "<= 1.5x", ours, theirs, "MB", theirs / ours, ours <= 1.5 * theirs)


def tpch_rows(session: Session, data: Path, scale: float, rounds: int) -> list[Row]:
    """All 22 queries, against DuckDB on the same files."""
    conn, ours = views(data), by_us(session, data)

    def all_of(run: Callable[[str], object]) -> Callable[[], None]:
        return lambda: [run(query) for query in QUERIES.values()] and None

    timed = interleave(
        {"ours": all_of(ours), "duckdb": all_of(lambda text: conn.sql(text).to_arrow_table())},
        max(1, rounds // 2),
    )
    return [
        against(f"all TPC-H queries, SF{scale:g}", f"DuckDB {duckdb.__version__}", timed["ours"],
                timed["duckdb"], "<= 1.3x its time", 1 / 1.3, "22 queries, sum")
    ]  # fmt: skip


def fault_row(folder: Path, data: Path) -> Row:
    """Exchanges and sorts while a busy worker is killed every 5 s, against no faults."""
    want = duckdb.execute(
        f"select sum(hash(l_orderkey, l_linenumber, l_comment)) from '{data}/lineitem.parquet'"
    ).fetchall()[0][0] % 2**40  # fmt: skip

    def run(kill_s: float) -> tuple[float, int]:
        with init(data_root=str(folder / "jobs")) as session:
            stop, killed = threading.Event(), 0

            def killer() -> None:
                nonlocal killed
                while not stop.wait(kill_s):
                    busy = [w for w in session._job.executor._workers if w.key is not None]
                    if busy:
                        os.kill(random.choice(busy).pid, signal.SIGKILL)
                        killed += 1

            frame = session.read_parquet(f"{data}/lineitem.parquet")
            for key in ("l_orderkey", "l_partkey"):
                frame = frame.repartition(16, hash_by=key).partial_sort("l_extendedprice")
            frame = frame.map("sum(hash(l_orderkey, l_linenumber, l_comment)) % 1099511627776 as h")
            thread = threading.Thread(target=killer)
            thread.start()
            begin = time.perf_counter()
            try:
                total = sum(row["h"] for row in frame.take_all()) % 2**40
            finally:
                stop.set()
                thread.join()
            if total != want:
                raise RuntimeError(f"faults changed the answer: {total}, wanted {want}")
            return time.perf_counter() - begin, killed

    calm, _ = run(3600.0)
    hit, killed = run(5.0)
    what = "two hash exchanges and sorts of lineitem, a busy worker killed every 5 s"
    return Row(what, "no faults", "<= 2x its time", hit, calm, "s", calm / hit, hit <= 2 * calm,
               f"same answer, {killed} kills, once")  # fmt: skip


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


def main() -> None:
    parser = argparse.ArgumentParser(prog="whalefall bench data")
    parser.add_argument("--quick", action="store_true", help="small data, few rounds")
    parser.add_argument("--scale", type=float, default=1.0, help="TPC-H scale of most rows")
    parser.add_argument("--big-scale", type=float, default=5.0, help="of Q1 and the aggregate")
    parser.add_argument("--records", type=int, default=10_000_000, help="of GraySort")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", help="where the data lie; default a temporary folder")
    parser.add_argument("--only", nargs="*", help="start big memory graysort tpch faults exchange")
    args = parser.parse_args()
    if args.quick:
        args.scale, args.big_scale, args.records, args.rounds = 0.1, 0.5, 1_000_000, 3
    with tempfile.TemporaryDirectory(prefix="whalefall-bench-") as made:
        folder, rounds = Path(args.folder or made), args.rounds
        big, small = (tpch_files(folder, s) for s in (args.big_scale, args.scale))
        with init(data_root=str(folder / "jobs")) as session:
            measured: dict[str, Callable[[], list[Row]]] = {
                "start": lambda: start_rows(folder, rounds),
                "big": lambda: big_rows(session, big, args.big_scale, rounds),
                "memory": lambda: [memory_row(folder, big, args.big_scale)],
                "graysort": lambda: graysort_rows(folder, args.records, rounds),
                "tpch": lambda: tpch_rows(session, small, args.scale, rounds),
                "faults": lambda: [fault_row(folder, small)],
                "exchange": lambda: exchange_rows(session, small, rounds),
            }
            rows: list[Row] = []
            for part in args.only or measured:
                rows += measured[part]()
                # what is measured stays, should a later part be cut off
                save("data", rows, {"duckdb": duckdb.__version__, "polars": polars.__version__})


if __name__ == "__main__":
    main()
