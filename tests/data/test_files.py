"""Files of other kinds and in other places: FFRecord, fsspec URLs, row ranges of Parquet files."""

from __future__ import annotations

import itertools
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whalefall.data import Session
from whalefall.data.arrowio import build_batch_reader_from_files, load_from_parquet_files
from whalefall.data.errors import PlanError, TaskFailed
from whalefall.data.parquet import ParquetDataSet
from whalefall.data.rowrange import RowRange, divide
from whalefall.errors import CorruptError, MissingError


def test_ffrecord_files_are_a_source_and_a_sink(sp: Session, tmp_path: Path) -> None:
    frame = sp.from_items([{"s": f"sample {i}", "n": i} for i in range(10)])
    frame.repartition(3, by_rows=True).write_ffrecord(str(tmp_path / "out"), "s")
    assert len(list((tmp_path / "out").glob("*.ffr"))) == 3
    back = sp.read_ffrecord(str(tmp_path / "out"))
    rows = back.map("decode(sample) as s, index").take_all()
    assert [row["s"] for row in rows] == [f"sample {i}" for i in range(10)]
    assert [row["index"] for row in rows] == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2]
    with pytest.raises(PlanError, match="no column 'x'"):
        frame.write_ffrecord(str(tmp_path / "none"), "x")
    with pytest.raises(TaskFailed, match="wanted BLOB"):
        frame.write_ffrecord(str(tmp_path / "none"), "n")
    with pytest.raises(MissingError):
        sp.read_ffrecord(str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_urls_are_read_and_written(sp: Session, tmp_path: Path) -> None:
    # fsspec's local file system by its URL: any process finds the same files there
    url = f"local://{tmp_path}/out"
    frame = sp.from_items([1, 2, 3]).map("item * 2 as item")
    frame.write_parquet(url)
    assert sp.read_parquet(f"{url}/*.parquet").take_all() == [{"item": i} for i in (2, 4, 6)]
    assert sp.read_parquet(url).repartition(2, by_rows=True).filter("item > 2").count() == 2
    sp.from_items([9]).write_parquet(url)
    assert sp.read_parquet(url).take_all() == [{"item": 9}]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Files of 0, 7, 100 and 1 rows with row groups of 30."""
    folder = tmp_path_factory.mktemp("ranges")
    begin, paths = 0, []
    for index, size in enumerate((0, 7, 100, 1)):
        paths.append(str(folder / f"{index}.parquet"))
        numbers = pa.array(range(begin, begin + size), pa.int64())
        table = pa.table({"i": numbers, "s": pa.array(["x"] * size, pa.string())})
        pq.write_table(table, paths[-1], row_group_size=30)
        begin += size
    return paths


@pytest.mark.parametrize("count", [1, 2, 3, 50, 108, 200])
def test_row_ranges_hold_every_row_once_in_order(files: list[str], count: int) -> None:
    parts = ParquetDataSet(files).partition_by_rows(count)
    sizes = [part.num_rows for part in parts]
    assert len(parts) == count and max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes)[::-1]
    chosen = parts if count < 100 else parts[:3] + parts[-3:]
    for part in chosen:  # DuckDB and Arrow read the same rows of a range
        by_arrow = part.to_arrow_table().column("i").to_pylist()
        assert part._query("select i from {}").to_arrow_table().column("i").to_pylist() == by_arrow
    if count < 100:
        got = itertools.chain(*(p.to_arrow_table().column("i").to_pylist() for p in parts))
        assert list(got) == list(range(108))


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 30))
@settings(max_examples=100, deadline=None)
def test_divide_is_contiguous_and_even(sizes: list[int], count: int) -> None:
    ranges = [RowRange(f"f{i}", 0, size, 0, size) for i, size in enumerate(sizes)]
    parts = divide(ranges, count)
    rows = [(r.path, i) for part in parts for r in part for i in range(r.begin, r.end)]
    assert rows == [(f"f{i}", row) for i, size in enumerate(sizes) for row in range(size)]
    lengths = [sum(r.num_rows for r in part) for part in parts]
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("size", [1, 7, 30, 107, 108, 500])
def test_batches_span_files_and_are_full(files: list[str], size: int) -> None:
    batches = list(build_batch_reader_from_files(files, batch_size=size))
    assert [b.num_rows for b in batches[:-1]] == [size] * (len(batches) - 1)
    assert [i for b in batches for i in b.column("i").to_pylist()] == list(range(108))


def test_columns_and_bad_files(files: list[str], tmp_path: Path) -> None:
    assert load_from_parquet_files(files, ["s", "i"]).column_names == ["s", "i"]
    with pytest.raises(AssertionError, match="no column nope"):
        load_from_parquet_files(files, ["nope"])
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not at all")
    with pytest.raises(CorruptError, match=r"bad\.parquet"):
        load_from_parquet_files([str(tmp_path / "bad.parquet")])
    with pytest.raises(PlanError, match="generated column"):
        ParquetDataSet(files, generated_columns=["color"])
