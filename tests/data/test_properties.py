"""Exchanges and whole-frame operations against DuckDB on one table, for tables hypothesis makes up.

Each example is a small table (NULLs, equal keys, texts with quotes and separators, NaN, negative
zero, no rows at all) in a few files, and a number of partitions; all run in one session.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from whalefall.data import DataFrame, Session

SCHEMA = pa.schema([("k", pa.int64()), ("s", pa.string()), ("f", pa.float64())])
KEYS = st.none() | st.integers(-2, 2) | st.sampled_from([2**63 - 1, -(2**63)])
TEXTS = st.none() | st.sampled_from(["", "#", "##", "a##", "'", "{0}", "é", "\x00"])
FLOATS = st.none() | st.sampled_from([0.0, -0.0, 0.5, -1.5, math.inf, math.nan])
ROWS = st.lists(st.tuples(KEYS, TEXTS, FLOATS), max_size=12)
FILES = st.lists(ROWS, min_size=1, max_size=3)
COUNTS = st.integers(1, 4)
EXAMPLES = settings(
    max_examples=6, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
numbers = itertools.count()


def table_of(rows: list[tuple[Any, ...]]) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [(), (), ()]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], SCHEMA)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("properties")


def stored(sp: Session, folder: Path, files: list[list[tuple[Any, ...]]]) -> DataFrame:
    """The rows as files of a folder of their own."""
    place = folder / str(next(numbers))
    place.mkdir()
    for index, rows in enumerate(files):
        pq.write_table(table_of(rows), place / f"{index}.parquet")
    return sp.read_parquet(str(place / "*.parquet"))


def bag(rows: Any) -> list[str]:
    """Rows without their order; -0.0 and 0.0 are equal keys, of which either may remain."""
    plain = [tuple(0.0 if v == 0 and isinstance(v, float) else v for v in row) for row in rows]
    return sorted(map(repr, plain))


def rows_of(frame: DataFrame, columns: str = "k, s, f") -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in frame.map(columns).take_all()]


def truth(files: list[list[tuple[Any, ...]]], query: str) -> list[tuple[Any, ...]]:
    conn = duckdb.connect()
    conn.register("t", table_of([row for rows in files for row in rows]))
    return conn.execute(query).fetchall()


@EXAMPLES
@given(files=FILES, count=COUNTS)
@pytest.mark.parametrize(
    "how",
    [
        {"hash_by": ["k", "s"]},
        {"by": "coalesce(abs(k % 2), 0)"},
        {"by_rows": True},
        {},
    ],
    ids=["hash", "by", "rows", "files"],
)
def test_repartition_moves_each_row_once(
    sp: Session, folder: Path, how: dict[str, Any], files: Any, count: int
) -> None:
    count = max(2, count) if "by" in how else count
    frame = stored(sp, folder, files).repartition(count, **how)
    assert bag(rows_of(frame)) == bag(truth(files, "select k, s, f from t"))
    sizes = [row["n"] for row in frame.map("count(*) as n").take_all()]
    assert len(sizes) == count
    if "by_rows" in how:
        assert max(sizes) - min(sizes) <= 1
    if "hash_by" in how:
        homes = frame.map("distinct k, s").take_all()
        assert len(homes) == len(truth(files, "select distinct k, s from t"))


@EXAMPLES
@given(files=FILES, count=COUNTS)
def test_random_shuffle_moves_each_row_once(
    sp: Session, folder: Path, files: Any, count: int
) -> None:
    frame = stored(sp, folder, files).repartition(count, by_rows=True).random_shuffle()
    assert bag(rows_of(frame)) == bag(truth(files, "select k, s, f from t"))


@EXAMPLES
@given(files=FILES, count=COUNTS)
def test_sort_is_duckdbs_order(sp: Session, folder: Path, files: Any, count: int) -> None:
    items = ["k desc nulls first", "s", "f desc"]
    frame = stored(sp, folder, files).sort(items, npartitions=count)
    want = truth(files, f"select k, s, f from t order by {', '.join(items)}")
    assert [repr(row) for row in normal(rows_of(frame))] == [repr(row) for row in normal(want)]


def normal(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Rows whose zeros have no sign: which of two equal keys comes first is nobody's promise."""
    return [tuple(0.0 if isinstance(v, float) and v == 0 else v for v in row) for row in rows]


@EXAMPLES
@given(files=FILES, count=COUNTS)
def test_group_by_is_duckdbs(sp: Session, folder: Path, files: Any, count: int) -> None:
    aggregates = {"n": "count(*)", "m": "count(f)", "low": "min(s)", "total": "sum(k % 10)",
                  "mean": "avg(k % 4)", "kinds": "count(distinct f)"}  # fmt: skip
    frame = stored(sp, folder, files).group_by(["s", "k % 2 as p"], count)
    listed = ", ".join(aggregates.values())
    want = truth(files, f"select s, k % 2, {listed} from t group by all")
    assert bag(rows_of(frame.agg(**aggregates), "*")) == bag(want)
    del aggregates["kinds"]  # all of these are aggregated before they travel
    listed = ", ".join(aggregates.values())
    want = truth(files, f"select s, k % 2, {listed} from t group by all")
    assert bag(rows_of(frame.agg(**aggregates), "*")) == bag(want)


@EXAMPLES
@given(files=FILES, count=COUNTS)
def test_distinct_is_duckdbs(sp: Session, folder: Path, files: Any, count: int) -> None:
    frame = stored(sp, folder, files).distinct(count)
    assert bag(rows_of(frame)) == bag(truth(files, "select distinct k, s, f from t"))


@EXAMPLES
@given(left=FILES, right=FILES, count=COUNTS, how=st.sampled_from(
    ["inner", "left", "right", "full", "semi", "anti"]))  # fmt: skip
def test_join_is_duckdbs(
    sp: Session, folder: Path, left: Any, right: Any, count: int, how: str
) -> None:
    other = stored(sp, folder, right).map("k, s, f as g")
    frame = stored(sp, folder, left).join(other, ["k", "s"], how, count)
    columns = "k, s, f" + ("" if how in ("semi", "anti") else ", g")
    conn = duckdb.connect()
    for name, files in (("l", left), ("r", right)):
        conn.register(name, table_of([row for rows in files for row in rows]))
    want = conn.execute(
        f"select {columns} from l {how} join (select k, s, f as g from r) using (k, s)"
    )
    assert bag(rows_of(frame, columns)) == bag(want.fetchall())
