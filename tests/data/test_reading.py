"""Files that are broken, or that do not go together: one line with task, file and remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from whalefall.data import Session
from whalefall.data.arrowio import build_batch_reader_from_files
from whalefall.data.errors import PlanError, SqlError
from whalefall.data.parquet import ParquetDataSet
from whalefall.data.reading import condensed
from whalefall.errors import CorruptError, MissingError, WhalefallError

Action = Callable[[Any], Any]
ACTIONS: dict[str, Action] = {
    "driver": lambda frame: frame.take_all(),
    "pandas": lambda frame: frame.to_pandas(),
    "query": lambda frame: frame.map("*").take_all(),
    "function": lambda frame: frame.map(lambda row: row).take_all(),
    "batches": lambda frame: frame.map_batches(lambda table: table).take_all(),
    "exchange": lambda frame: frame.repartition(
        2, hash_by="1", drop_partition_column=True
    ).take_all(),
}
TEXTS = {
    "type.csv": "1,a\nx,b\n",
    "short.csv": "1,a\n2\n",
    "broken.json": '{"n": 1, "t": "a"}\n{broken\n',
    "type.json": '{"n": "x", "t": "a"}\n',
}
SCHEMA = {"n": "BIGINT", "t": "VARCHAR"}


@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS)
@pytest.mark.parametrize("name", TEXTS)
def test_a_broken_text_file_is_named(
    sp: Session, tmp_path: Path, action: Action, name: str
) -> None:
    path = tmp_path / name
    path.write_text(TEXTS[name])
    read = sp.read_csv if name.endswith("csv") else sp.read_json
    with pytest.raises((CorruptError, SqlError)) as caught:
        action(read(str(path), SCHEMA))
    line, _, query = str(caught.value).partition("\n")
    assert str(path) in line and "the schema given: {'n': 'BIGINT'" in line
    assert "Possible" not in line and ("Task.0" in line or " node 0" in line)
    assert not query or query.startswith("in the query: ")


@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS)
@pytest.mark.parametrize("damage", ["footer", "page", "missing"])
def test_a_broken_parquet_file_is_named(
    sp: Session, tmp_path: Path, action: Action, damage: str
) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"a": [1, 2], "b": ["x", "y"]}), path)
    content = bytearray(path.read_bytes())
    if damage == "page":
        content[4:40] = b"\xff" * 36
    path.write_bytes(content if damage == "page" else b"nonsense")
    if damage == "missing":
        path.unlink()
    with pytest.raises((CorruptError, SqlError, MissingError)) as caught:
        action(sp.read_parquet(str(path)))
    text = str(caught.value)
    assert str(path) in text and ("Task.0" in text or "node 0" in text)
    assert "Traceback" not in text


@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS)
def test_a_column_or_type_that_is_not_there_is_named(
    sp: Session, tmp_path: Path, action: Action
) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "x.parquet")
    (tmp_path / "x.csv").write_text("1\n")
    with pytest.raises(PlanError, match=r"Task.*x\.parquet.*zz.*(there are a|asked for are)"):
        action(sp.read_parquet(str(tmp_path / "x.parquet"), columns=["zz"]))
    with pytest.raises(PlanError, match=r"Task.*x\.csv.*NOPE does not exist.*schema given"):
        action(sp.read_csv(str(tmp_path / "x.csv"), {"a": "NOPE"}))


def test_counting_broken_text_is_an_error_of_ours(sp: Session, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("1,a\n2\n")
    with pytest.raises(CorruptError, match=r"^DataSourceTask.*x\.csv: .*Found: 1; mend the file"):
        sp.read_csv(str(tmp_path / "x.csv"), SCHEMA).count()


def test_errors_of_the_users_own_pass(sp: Session) -> None:
    def fail(row: dict[str, Any]) -> None:
        raise OSError(5, "my device")

    with pytest.raises(OSError, match="my device") as caught:
        sp.from_items([1]).map(fail).compute()
    assert not isinstance(caught.value, CorruptError)


def test_hints_for_others_are_cut() -> None:
    text = "E: CSV Error\nLine: x\nPossible fixes:\n* a=b\n\n  file = /a/b.csv\n  quote = x"
    assert condensed(text) == "E: CSV Error; Line: x; file /a/b.csv"
    assert condensed("Binder Error: no x\n\nLINE 1: select x\n               ^") == (
        "Binder Error: no x"
    )


# -- files of different schemas
def write(folder: Path, **tables: Any) -> str:
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    return str(folder)


@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS)
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"a": [1], "b": ["x"]}, {"a": [2], "c": [0.5]}),
        ({"a": [1]}, {"a": [2], "extra": [3]}),
        ({"a": [1], "extra": [3]}, {"a": [2]}),
    ],
)
def test_files_of_different_columns_are_refused(
    sp: Session, tmp_path: Path, action: Action, first: Any, second: Any
) -> None:
    folder = write(tmp_path, x=first, y=second)
    with pytest.raises(WhalefallError, match=r"has the columns .*, but .* has .*union_by_name=T"):
        action(sp.read_parquet(folder))
    rows = action(sp.read_parquet(folder, union_by_name=True))
    wanted = sp.read_parquet(folder, union_by_name=True).to_arrow().to_pylist()
    assert {row["a"] for row in wanted} == {1, 2} and len(wanted[0]) == len({**first, **second})
    if isinstance(rows, list):
        assert sorted(rows, key=lambda row: row["a"]) == wanted
    assert {row["a"] for row in sp.read_parquet(folder, columns=["a"]).take_all()} == {1, 2}


@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS)
def test_types_are_widened_never_cut(sp: Session, tmp_path: Path, action: Action) -> None:
    second = {"b": ["y"], "a": [2.5], "c": [7]}
    folder = write(tmp_path, x={"a": [1], "b": [None], "c": pa.array([1], pa.int8())}, y=second)
    found = action(sp.read_parquet(folder))
    rows = found if isinstance(found, list) else pa.Table.from_pandas(found).to_pylist()
    assert sorted(row["a"] for row in rows) == [1.0, 2.5]
    assert {row["b"] for row in rows} == {None, "y"} and {row["c"] for row in rows} == {1, 7}


@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS)
def test_types_that_do_not_go_together_are_refused(
    sp: Session, tmp_path: Path, action: Action
) -> None:
    folder = write(tmp_path, x={"a": [1], "b": [1]}, y={"a": [2], "b": ["y"]})
    with pytest.raises(PlanError, match=r"parquet: column b is large_string.*it is int64"):
        action(sp.read_parquet(folder))


def test_row_ranges_of_files_with_columns_in_another_order(sp: Session, tmp_path: Path) -> None:
    folder = write(tmp_path, x={"a": ["1", "2"], "b": ["x", "y"]}, y={"b": ["z"], "a": ["3"]})
    parts = ParquetDataSet([folder]).partition_by_rows(1)[0].partition_by_rows(2)
    assert parts[0].num_rows == 2
    frame = sp.read_parquet(folder).repartition(2, by_rows=True).filter("true")
    assert sorted(frame.map("a").sort("a").to_arrow()["a"].to_pylist()) == ["1", "2", "3"]
    cut = ParquetDataSet([folder]).partition_by_rows(3)
    merged = ParquetDataSet.merge(cut[1:])
    assert merged._query("select list(a order by a) from {}").fetchall() == [(["2", "3"],)]


def test_partitions_of_a_function_may_differ(sp: Session) -> None:
    def odd(row: dict[str, Any]) -> dict[str, Any]:
        n = row["item"]
        return {"n": n + 0.5, "odd": "yes"} if n % 2 else {"n": n}

    frame = sp.from_items([0, 2, 1, 3]).repartition(2, by_rows=True).map(odd)
    want = [(0.0, None), (1.5, "yes"), (2.0, None), (3.5, "yes")]
    for made in (frame, frame.map("*"), frame.repartition(2, hash_by="n")):
        assert sorted((r["n"], r["odd"]) for r in made.take_all()) == want
        assert [(r["n"], r["odd"]) for r in made.sort("n").take_all()] == want


def test_a_reader_of_batches_fills_and_widens(tmp_path: Path) -> None:
    write(tmp_path, x={"a": [1]}, y={"a": [2.5], "b": ["y"]})
    paths = [str(tmp_path / f"{n}.parquet") for n in "xy"]
    table = build_batch_reader_from_files(paths, union_by_name=True, batch_size=1).read_all()
    assert table.to_pylist() == [{"a": 1.0, "b": None}, {"a": 2.5, "b": "y"}]
    with pytest.raises(PlanError, match="union_by_name"):
        build_batch_reader_from_files(paths)


def test_arguments_of_the_wrong_kind_are_refused(sp: Session, tmp_path: Path) -> None:
    for make, wanted in (
        (lambda: sp.from_pandas(3), r"got int, wanted a pandas\.DataFrame"),
        (lambda: sp.from_arrow([1]), r"got list, wanted a pyarrow\.Table"),
        (lambda: sp.read_parquet(3), "paths are 3, wanted a path"),  # type: ignore[arg-type]
        (lambda: sp.read_parquet([3]), "paths are .3., wanted a path"),  # type: ignore[list-item]
    ):
        with pytest.raises(PlanError, match=wanted):
            make()


def test_an_exchange_tells_a_bad_key_from_bad_sql(sp: Session) -> None:
    frame = sp.from_items([{"a": "x"}])
    with pytest.raises(SqlError, match=r"Could not convert(.*\n)+.*: select a from __input_0"):
        frame.repartition(2, by="a").compute()
    with pytest.raises(SqlError, match=r'^exchange node 0.*"zz" not found.*\nin the query: select'):
        frame.repartition(2, hash_by="zz").compute()
