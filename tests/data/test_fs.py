"""Frames over a real cluster of the file-system room: `whalefall://` as source and sink."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import pytest

from whalefall.data import Session
from whalefall.fs import LocalCluster

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The URL of a cluster's root."""
    with tempfile.TemporaryDirectory() as folder:
        with LocalCluster(folder, nodes=1, replicas=1, lease_s=3.0) as cluster:
            cluster.filesystem().mkdir("/data")
            yield f"whalefall://127.0.0.1:{cluster.port}/data"


def test_parquet_on_a_cluster_is_a_source_and_a_sink(sp: Session, url: str) -> None:
    frame = sp.from_items([{"i": i, "s": f"x{i % 3}"} for i in range(100)])
    frame.repartition(3, by_rows=True).map("*").write_parquet(f"{url}/out")
    back = sp.read_parquet(f"{url}/out")
    assert back.count() == 100
    grouped = sp.partial_sql(
        "select s, sum(i) as t from {0} group by s", back.repartition(2, hash_by="s")
    )
    want = {f"x{k}": sum(range(k, 100, 3)) for k in range(3)}
    assert {row["s"]: row["t"] for row in grouped.take_all()} == want
    assert back.map(lambda row: {"j": row["i"] + 1}).filter("j > 99").take_all() == [{"j": 100}]
    halves = sp.read_parquet(f"{url}/out/*.parquet").repartition(2, by_rows=True)
    assert [row["n"] for row in halves.map("count(*) as n").take_all()] == [50, 50]
    joined = sp.sql("select count(*) as n from a join b using (i)", a=back, b=halves)
    assert joined.take_all() == [{"n": 100}]


def test_a_second_write_replaces_the_first(sp: Session, url: str) -> None:
    for value in (1, 2):
        sp.from_items([value]).write_parquet(f"{url}/again")
        assert sp.read_parquet(f"{url}/again").take_all() == [{"item": value}]


def test_ffrecord_on_a_cluster_is_a_source_and_a_sink(sp: Session, url: str) -> None:
    frame = sp.from_items([{"s": f"sample {i}"} for i in range(10)])
    frame.repartition(2, by_rows=True).write_ffrecord(f"{url}/records", "s")
    rows = sp.read_ffrecord(f"{url}/records").map("decode(sample) as s, file").take_all()
    assert [row["s"] for row in rows] == [f"sample {i}" for i in range(10)]
    assert all(row["file"].startswith(f"{url}/records/") for row in rows)
