"""Whole-frame operations against DuckDB on one table: in one query, and through exchanges."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks._tpch_queries import QUERIES, TABLES
from whalefall.data import Session
from whalefall.data.aggregates import two_phase
from whalefall.data.errors import PlanError, SqlError
from whalefall.data.tasks.exchange import range_number
from whalefall.errors import MissingError


def rows(table: Any) -> list[tuple[Any, ...]]:
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """20 000 rows: a (some NULL), b (a third of it one hot key), s, f."""
    file = str(tmp_path_factory.mktemp("rel") / "t.parquet")
    duckdb.execute(
        "copy (select case when i % 50 = 0 then null else cast(hash(i) % 1000 as int) end as a, "
        "case when i % 3 = 0 then 7 else i % 997 end as b, 'x' || (i % 13) as s, "
        f"(i % 101) * 0.5 as f from range(20000) t(i)) to '{file}'"
    )
    return file


@pytest.mark.parametrize("n", [None, 4])
def test_operations_equal_duckdbs(sp: Session, path: str, n: int | None) -> None:
    frame, table = sp.read_parquet(path), f"read_parquet('{path}')"
    small = sp.partial_sql("select s, max(a) as top from {0} group by s", frame)
    cases = [
        (frame.group_by("s", n).agg(c="count(*)", t="sum(f)", m="avg(b)", d="max(a)"),
         "select s, count(*), sum(f), avg(b), max(a) from t group by s"),
        (frame.group_by(["b % 10 as k"], n).agg(u="count(distinct s)"),
         "select b % 10, count(distinct s) from t group by 1"),
        (frame.distinct(n), "select distinct * from t"),
        (frame.join(small, "s", npartitions=n),
         "select s, a, b, f, top from t join "
         "(select s, max(a) as top from t group by s) using (s)"),
        (frame.join(small.filter("s < 'x3'"), "s", how="anti", npartitions=n),
         "select s, a, b, f from t where s >= 'x3'"),
    ]  # fmt: skip
    for got, query in cases:
        want = duckdb.sql(f"with t as (from {table}) {query}").to_arrow_table()
        ours = got.to_arrow()
        if " t join " in query or ">=" in query:  # `using` puts the keys first
            ours = ours.select(want.column_names)
        assert sorted(rows(ours), key=repr) == sorted(rows(want), key=repr), query


def test_sums_of_integers_are_exact(sp: Session) -> None:
    big = 2**53 + 1  # which a DOUBLE cannot hold
    frame = sp.from_items([{"x": big}, {"x": 0}, {"x": 2**62}])
    exact = frame.map("sum(x) as s, sum(x) as s, typeof(sum(x)) as t")
    assert exact.take_all() == [{"s": big + 2**62, "s_1": big + 2**62, "t": "HUGEINT"}]
    assert frame.group_by("x > 5 as k", 2).agg(s="sum(x)").filter("k").take_all() == [
        {"k": True, "s": big + 2**62}
    ]
    with pytest.raises(SqlError, match=r"INT128(.*\n)+in the query: select sum\(x\) \* 4"):
        frame.map("sum(x) * 4 as s").compute()


@pytest.mark.parametrize("items", [["b", "a desc"], ["a nulls first", "s desc", "f"], ["s"]])
@pytest.mark.parametrize("n", [None, 5])
def test_sort_is_global(sp: Session, path: str, items: list[str], n: int | None) -> None:
    got = rows(sp.read_parquet(path).sort(items, n).map("a, b, s, f").to_arrow())
    keys = ", ".join(item.split()[0] for item in items)
    plain = sp.read_parquet(path).sort(items, n).map(keys).to_arrow()
    want = duckdb.sql(
        f"select {keys} from read_parquet('{path}') order by {', '.join(items)}"
    ).to_arrow_table()
    assert rows(plain) == rows(want)
    whole = duckdb.sql(f"select a, b, s, f from read_parquet('{path}')").to_arrow_table()
    assert sorted(got, key=repr) == sorted(rows(whole), key=repr)


SORTED_ROWS = [
    {"s": s, "x": x, "i": i}
    for i, s in enumerate("aBcDeFgHiJáÀzÄä" * 20)
    for x in [[0.0, -0.0, math.nan, None, -1.5, 2.0, math.inf][i % 7]]
]


@pytest.mark.parametrize(
    "by",
    [
        ["s collate nocase", "i"], "s collate nocase.noaccent desc, i", ["s collate de", "i desc"],
        "s collate posix, i", "i % 3, i desc", ["case when i > 9 then 'x, desc' end", "i"],
        "x desc nulls first, i", ["x", "i"], "upper(s) || ',' desc, -i",
    ],
)  # fmt: skip
def test_a_partitioned_sort_is_the_one_query(sp: Session, by: Any) -> None:
    frame = sp.from_items(SORTED_ROWS).repartition(2, by_rows=True).map("*")
    parts = frame.sort(by, npartitions=3)
    sizes = parts.map("count(*) as n").take_all()
    assert sum(row["n"] > 0 for row in sizes) > 1
    want = frame.sort(by).to_arrow().column("i").to_pylist()
    assert parts.to_arrow().column("i").to_pylist() == want


@pytest.mark.parametrize(
    ("by", "message"),
    [
        ("ALL", "'ALL' with partitions: name the columns"),
        ("2", "'2' is no column: with partitions, name the column"),
        (["i", "lower(s collate nocase)"], "collate the whole item"),
        ("i desc nulls", "sort: 'i desc nulls': .*syntax error"),
        ("i limit 1", "wanted only order items"),
        ("i; select 1", "wanted only order items"),
    ],
)
def test_a_partitioned_sort_says_what_it_cannot(sp: Session, by: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        sp.from_items(SORTED_ROWS).sort(by, npartitions=3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("n", [None, 7])
def test_zeros_and_nans_of_either_sign_are_one_key(sp: Session, n: int | None) -> None:
    rows_of = "select unnest(['0.0', '-0.0', 'nan', '-nan'])::double as k, [k] as l, 1 as x"
    frame = sp.partial_sql(rows_of).repartition(4, by_rows=True)
    for aggregate in ("sum(x)", "count(distinct i)"):  # in two phases, and in one
        made = frame.map("*, row_number() over () as i").group_by("k", n).agg(c=aggregate)
        assert made.count() == 2
    assert frame.group_by("l", n).agg(c="sum(x)").count() == 2
    assert frame.map("k").distinct(n).count() == 2
    assert frame.join(frame, "k", npartitions=n).count() == 8
    if n is not None:
        by_hand = sp.partial_sql("select k from {0} group by k", frame.repartition(n, hash_by="k"))
        assert by_hand.count() == 2


def test_a_hot_key_does_not_fill_one_partition(sp: Session, path: str) -> None:
    frame = sp.read_parquet(path).sort("b", npartitions=8)
    sizes = [row["n"] for row in frame.map("count(*) as n").take_all()]
    assert max(sizes) < 2.2 * 20000 / 8  # the hot key alone has a third of all rows


def test_sql_reads_frames_by_name(sp: Session) -> None:
    left, right = sp.from_items([{"k": 1, "x": 2}, {"k": 2, "x": 3}]), sp.from_items([{"k": 2}])
    got = sp.sql("select '{' || x as x from l join r using (k)", l=left, r=right)
    assert got.take_all() == [{"x": "{3"}]


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.integers(0, 6), max_size=5).map(sorted), st.lists(st.integers(-1, 8), max_size=20)
)
def test_range_number_is_a_place_between_the_splitters(points: list[int], keys: list[int]) -> None:
    if not keys:
        return
    values = ", ".join(f"({key})" for key in keys)
    got = duckdb.execute(f"select x, {range_number('x', points)} from (values {values}) t(x)")
    for key, place in got.fetchall():
        below = sum(p < key for p in points)
        assert below <= place <= sum(p <= key for p in points) and place <= len(points)
        assert place == below or key in points


@pytest.mark.parametrize(
    ("keys", "aggregate", "split"),
    [
        (["k"], "sum(x)", True),
        (["k % 2 as j"], "avg(x + 1)", True),
        (["k % 2"], "sum(x)", False),
        (["k"], "sum(x) + sum(y)", False),
        (["k"], "count(distinct x)", False),
        (["k"], "median(x)", False),
    ],
)
def test_which_aggregates_split(keys: list[str], aggregate: str, split: bool) -> None:
    assert (two_phase(keys, {"a": aggregate}) is not None) == split


def test_wrong_arguments_are_refused(sp: Session) -> None:
    frame = sp.from_items([1])
    for call in (
        lambda: frame.join(frame, "item", how="sideways"),
        lambda: frame.join(frame, []),
        lambda: frame.group_by("item").agg(),
        lambda: frame.sort(3),
        lambda: sp.sql("select 1", t=3),
    ):
        with pytest.raises(PlanError):
            call()


def test_memory_is_bounded_and_more_spills(tmp_path: Path) -> None:
    from whalefall.data import init

    file = str(tmp_path / "big.parquet")
    duckdb.execute(
        "copy (select hash(i) as k, repeat(md5(i::varchar), 4) as s from range(600000) t(i)) "
        f"to '{file}'"
    )
    with init(data_root=str(tmp_path), memory="48MB", cpus=1) as session:
        got = session.read_parquet(file).sort("k").map("k")  # 80 MB of rows
        assert got.count() == 600_000
        keys = got.to_arrow().column("k").to_numpy()
        assert (keys[1:] >= keys[:-1]).all()


def alike(ours: Any, theirs: Any) -> bool:
    """Equal; of floats, up to the order in which they were added."""
    if isinstance(ours, float | Decimal):
        return math.isclose(ours, theirs, rel_tol=1e-9)
    return bool(ours == theirs)


@pytest.fixture(scope="module")
def tpch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TPC-H at scale 0.01."""
    tool = shutil.which("tpchgen-cli", path=str(Path(sys.executable).parent)) or shutil.which(
        "tpchgen-cli"
    )
    if tool is None:
        pytest.skip("tpchgen-cli is not installed (pip install tpchgen-cli)")
    folder = tmp_path_factory.mktemp("tpch")
    command = [tool, "parquet", "-s", "0.01", f"--output-dir={folder}"]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def test_all_tpch_queries_equal_duckdbs(sp: Session, tpch: Path) -> None:
    conn = duckdb.connect()
    for name in TABLES:
        conn.execute(f"create view {name} as from read_parquet('{tpch}/{name}.parquet')").fetchall()
    frames = {name: sp.read_parquet(str(tpch / f"{name}.parquet")) for name in TABLES}
    for number, query in QUERIES.items():
        used = {name: frame for name, frame in frames.items() if name in query}
        want = conn.execute(query).fetchall()
        got = rows(sp.sql(query, **used).to_arrow())
        assert len(got) == len(want), f"Q{number}"
        for ours, theirs in zip(got, want, strict=True):
            assert all(map(alike, ours, theirs)), f"Q{number}: {ours} {theirs}"


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("bigint", "double"), ("bigint", "decimal(9,2)"), ("bigint", "varchar"),
        ("float", "double"), ("utinyint", "bigint"), ("date", "timestamp"),
    ],
)  # fmt: skip
def test_a_partitioned_join_finds_keys_of_other_types(sp: Session, left: str, right: str) -> None:
    base = "date '2020-01-01' + i::int" if left == "date" else "i"
    sides = [
        sp.from_arrow(
            duckdb.sql(
                f"select cast({base} as {kind}) as k, i from range(20) t(i)"
            ).to_arrow_table()
        )
        for kind in (left, right)
    ]
    assert sides[0].join(sides[1], "k", npartitions=4).count() == 20


def test_a_pattern_that_nothing_matches_is_refused(sp: Session, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no file matches"):
        sp.read_parquet(f"{tmp_path}/*.parquet").count()
