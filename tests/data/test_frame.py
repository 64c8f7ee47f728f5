"""Frames give what DuckDB gives on the same rows, and what their methods' names promise."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import whalefall.data
from whalefall.data import Session, planner
from whalefall.data.errors import PartitionError, PlanError, SqlError, TaskFailed
from whalefall.errors import ConfigError, MissingError


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Ten files of 100 rows: i, i % 7 as k, text s."""
    folder = tmp_path_factory.mktemp("numbers")
    for part in range(10):
        rows = list(range(part * 100, part * 100 + 100))
        table = pa.table({"i": rows, "k": [r % 7 for r in rows], "s": [f"x{r % 3}" for r in rows]})
        pq.write_table(table, folder / f"n{part}.parquet", row_group_size=30)
    return str(folder)


def items(frame: Any, name: str = "item") -> list[Any]:
    return [row[name] for row in frame.take_all()]


def test_public_names_are_pinned() -> None:
    assert whalefall.data.__all__ == ["DataFrame", "Session", "init"]


def test_sources_give_back_what_went_in(sp: Session) -> None:
    frame = pd.DataFrame({"a": [1, 2, 3], "b": ["x", None, "z"]})
    assert sp.from_pandas(frame).to_pandas().equals(frame)
    table = pa.table({"a": [1, 2], "b": [4.5, 5.5]})
    assert sp.from_arrow(table).to_arrow() == table
    assert sp.from_items([1, 2]).take_all() == [{"item": 1}, {"item": 2}]
    assert sp.from_items([{"a": 1}, {"a": 2, "b": 3}]).take_all() == [
        {"a": 1, "b": None},
        {"a": 2, "b": 3},
    ]


def test_text_files_are_read_by_their_schema(sp: Session, tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("1\tx\n2\ty\n")
    (tmp_path / "a.jsonl").write_text('{"n": 1, "t": "x"}\n{"n": 2, "t": "y"}\n')
    want = [{"n": 1, "t": "x"}, {"n": 2, "t": "y"}]
    schema = {"n": "bigint", "t": "varchar"}
    assert sp.read_csv(str(tmp_path / "*.tsv"), schema, delim=r"\t").take_all() == want
    assert sp.read_json(str(tmp_path / "a.jsonl"), schema).take_all() == want


def test_a_text_source_works_in_every_method(sp: Session, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("1\n2\n3\n4\n")
    frame = sp.read_csv(str(tmp_path / "a.csv"), {"n": "bigint"})
    assert items(frame.map(lambda r: {"n": r["n"] * 2}), "n") == [2, 4, 6, 8]
    assert frame.repartition(3).count() == 4  # more partitions than files
    assert sorted(items(frame.repartition(2, by_rows=True), "n")) == [1, 2, 3, 4]
    assert sorted(items(frame.repartition(2, hash_by="n"), "n")) == [1, 2, 3, 4]
    frame.write_parquet(str(tmp_path / "out"))
    assert {p.suffix for p in (tmp_path / "out").iterdir()} == {".parquet", ".txt"}
    assert sorted(items(sp.read_parquet(str(tmp_path / "out")), "n")) == [1, 2, 3, 4]


@pytest.mark.parametrize("how", [{}, {"by_rows": True}, {"hash_by": "k"}, {"by": "i % 4"}])
@pytest.mark.parametrize("count", [1, 4, 13])
def test_repartition_keeps_every_row_once(
    sp: Session, numbers: str, how: dict[str, Any], count: int
) -> None:
    frame = sp.read_parquet(f"{numbers}/*.parquet").repartition(max(4, count), **how)
    assert sorted(items(frame, "i")) == list(range(1000))


def test_rows_go_where_their_hash_says(sp: Session, numbers: str) -> None:
    frame = sp.read_parquet(numbers).repartition(5, hash_by=["k", "s"])
    got = frame.map("distinct k, s, __data_partition__ as p").take_all()
    want = duckdb.execute(
        "select distinct k, s, hash(concat_ws('##', k, s)) % 5 as p "
        f"from read_parquet('{numbers}/*.parquet')"
    ).fetchall()
    assert sorted(tuple(row.values()) for row in got) == sorted(want)


def test_by_rows_gives_larger_parts_first(sp: Session) -> None:
    frame = sp.from_items(list(range(100))).repartition(3, by_rows=True)
    assert items(frame.map("count(*) as n"), "n") == [34, 33, 33]
    assert items(frame) == list(range(100))


def test_by_names_the_partition_and_adds_no_column(sp: Session) -> None:
    frame = sp.from_items(list(range(50))).repartition(10, by="item % 10")
    assert frame.map("min(item % 10) as a, max(item % 10) as b").take_all() == [
        {"a": i, "b": i} for i in range(10)
    ]
    assert frame.to_arrow().column_names == ["item"]


@pytest.mark.parametrize(
    ("by", "text"),
    [("item % 11", "partition key 10 is out of range 0-9"), ("null::int", "partition key is NULL")],
)
def test_a_key_without_a_partition_is_refused(sp: Session, by: str, text: str) -> None:
    with pytest.raises(PartitionError, match=text):
        sp.from_items(list(range(50))).repartition(10, by=by).compute()


def test_random_shuffle_is_random_and_complete(sp: Session) -> None:
    frame = sp.from_items(list(range(1000))).repartition(10, by_rows=True).random_shuffle()
    got = items(frame)
    assert sorted(got) == list(range(1000))
    inversions = sum(got[i] > got[j] for i in range(1000) for j in range(i + 1, 1000))
    assert 220_000 <= inversions <= 280_000  # n (n - 1) / 4 = 249 750


def test_row_functions(sp: Session) -> None:
    frame = sp.from_arrow(pa.table({"a": [1, 2, 3], "b": [4, 5, 6]}))
    assert frame.map(lambda r: {"c": r["a"] + r["b"]}).to_arrow() == pa.table({"c": [5, 7, 9]})
    assert frame.filter(lambda r: r["a"] > 1).to_arrow().to_pydict() == {"a": [2, 3], "b": [5, 6]}
    flat = frame.flat_map(lambda r: [{"c": r["a"]}, {"c": r["b"]}])
    assert items(flat, "c") == [1, 4, 2, 5, 3, 6]
    # a None in the first row does not make the column null
    some = frame.map(lambda r: {"c": None if r["a"] == 1 else r["a"]})
    assert items(some, "c") == [None, 2, 3]
    typed = frame.map(lambda r: {"c": None}, schema=pa.schema([("c", pa.int64())]))
    assert typed.to_arrow().schema.field("c").type == pa.int64()


def test_map_batches_spans_files(sp: Session, numbers: str) -> None:
    frame = sp.read_parquet(numbers).map_batches(
        lambda batch: pa.table({"n": [batch.num_rows]}), batch_size=350
    )
    assert items(frame, "n") == [350, 350, 300]


def test_a_python_map_over_an_empty_partition(sp: Session) -> None:
    frame = sp.from_items([1, 2]).repartition(4, by_rows=True)
    assert items(frame.map(lambda r: {"x": r["item"]}), "x") == [1, 2]
    assert items(frame.filter(lambda r: r["item"] > 1)) == [2]


def test_sql_texts_and_limits_fuse_without_changing_rows(sp: Session, numbers: str) -> None:
    frame = sp.read_parquet(numbers).repartition(5)
    first = frame.map("i + 1 as j").filter("j % 2 = 0").limit(3)
    assert items(first.map("j * 10 as j"), "j") == [20, 40, 60]  # the original: 3 a partition
    braces = frame.map("i, '{{' as brace").filter("brace = '{{'")
    assert braces.count() == 1000


def test_partial_sql_joins_and_broadcasts(sp: Session) -> None:
    left = sp.from_arrow(pa.table({"id": [1, 2, 3], "a": ["x", "y", "z"]}))
    right = sp.from_arrow(pa.table({"id": [1, 2, 3], "b": ["p", "q", "r"]}))
    query = "select id, a, b from {0} join {1} using (id) order by id"
    want = [{"id": 1, "a": "x", "b": "p"}, {"id": 2, "a": "y", "b": "q"}]
    assert sp.partial_sql(query, left, right).take(2) == want
    assert sp.partial_sql(query, left.repartition(2, by_rows=True), right).take(2) == want
    named = "select {0}.id, b from {0} join {1} on {0}.id = {1}.id order by {0}.id"
    assert sp.partial_sql(named, left, right).count() == 3
    hashed = [f.repartition(2, hash_by="id") for f in (left, right)]
    assert sp.partial_sql(query, *hashed).count() == 3
    unlike = [left.repartition(2, hash_by="id"), right.repartition(3, hash_by="id")]
    with pytest.raises(PlanError, match="not compatible"):
        sp.partial_sql(query, *unlike).compute()


def test_several_queries_run_in_one_task(sp: Session) -> None:
    frame = sp.from_items([3, 1, 2])
    queries = ["create temp table t as select item * 2 as x from {0}", "select x from t order by x"]
    assert items(sp.partial_sql(queries, frame), "x") == [2, 4, 6]


def test_a_frame_used_twice_is_computed_once(fresh: Session) -> None:
    base = fresh.from_items([1, 2, 3]).map("item + random() as item")
    double = fresh.partial_sql(
        "select a.item = b.item as same from {0} a positional join {1} b", base, base
    )
    assert items(double, "same") == [True, True, True]
    before = fresh.num_tasks_executed
    assert base.to_pandas().equals(base.to_pandas())
    assert fresh.num_tasks_executed == before  # the join had computed it
    assert base.is_computed() and not base.map("item").is_computed()


def test_recompute_forgets_the_frame_and_what_it_came_from(fresh: Session) -> None:
    frame = fresh.from_items([1]).map("random() as x").map("x + 0 as x")
    first = frame.take_all()
    assert frame.take_all() == first
    assert frame.recompute().take_all() != first


def test_errors_name_query_and_function(sp: Session) -> None:
    frame = sp.from_items([1, 2, 3])
    with pytest.raises(SqlError, match="select a,, from"):
        sp.partial_sql("select a,, from {0}", frame).to_arrow()
    with pytest.raises(ZeroDivisionError, match="ArrowStreamTask") as caught:
        frame.map(lambda r: {"x": r["item"] / 0}).compute()
    assert isinstance(caught.value, TaskFailed)
    with pytest.raises(TaskFailed, match="wanted a dict"):
        frame.map(lambda r: 3).compute()
    lock = threading.Lock()
    with pytest.raises(PlanError, match="Can't pickle task"):
        frame.map(lambda r: {"x": lock}).compute()
    assert frame.count() == 3  # the session goes on


@pytest.mark.parametrize(
    "call",
    [
        lambda f: f.repartition(2.0),
        lambda f: f.repartition(0),
        lambda f: f.repartition(2, by="a", hash_by="b"),
        lambda f: f.map(3),
        lambda f: f.map_batches(None),
        lambda f: f.limit(-1),
        lambda f: f.map("{nothing}").compute(),
        lambda f: f.map("a {").compute(),
    ],
)
def test_wrong_arguments_are_refused(sp: Session, call: Any) -> None:
    with pytest.raises(PlanError):
        call(sp.from_items([1]))


def test_missing_files(sp: Session, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"none\.parquet"):
        sp.read_parquet(str(tmp_path / "none.parquet")).to_arrow()
    with pytest.raises(MissingError, match=r"\*\.parquet: no file matches"):
        sp.read_parquet(str(tmp_path / "*.parquet")).count()
    with pytest.raises(ConfigError):
        whalefall.data.init(data_root=str(tmp_path), memory="lots")


def test_rows_of_a_function_may_have_columns_that_the_first_has_not(sp: Session) -> None:
    frame = sp.from_arrow(pa.table({"a": [1, 2]}))
    found = frame.map(lambda row: {"odd": 1} if row["a"] % 2 else {"even": 2}).take_all()
    assert found == [{"odd": 1, "even": None}, {"odd": None, "even": 2}]


def test_the_exchange_of_a_big_file_is_many_short_tasks(
    sp: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "in.parquet"
    pq.write_table(pa.table({"i": list(range(1000))}), file, row_group_size=10)

    def producers() -> int:
        frame = sp.read_parquet(str(file)).repartition(3, hash_by="i")
        assert sorted(row["i"] for row in frame.take_all()) == list(range(1000))
        return sum(type(t).__name__ == "HashPartitionTask" for t in sp._plan(frame.plan).tasks)

    assert producers() == 2  # as many as there are cores
    monkeypatch.setattr(planner, "PRODUCER_BYTES", -(-file.stat().st_size // 7))
    assert producers() == 7
    monkeypatch.setattr(planner, "MAX_FILES", 12)
    assert producers() == 4
