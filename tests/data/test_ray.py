"""The Ray executor: the local one's rows, over two raylets; a killed worker is replaced."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from whalefall.data import Session, init
from whalefall.data.graysort import gensort, gray_sort, make_records, summarize, valsort

# starting two raylets takes minutes on a loaded machine
pytestmark = [pytest.mark.ranks, pytest.mark.timeout(900)]
pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Two raylets on this host; the address of their head."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray
        from ray.cluster_utils import Cluster

        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        made.add_node(num_cpus=1)
        ray.init(address=made.address, log_to_driver=False)
    yield made.address
    ray.shutdown()
    made.shutdown()


def digest(session: Session) -> list[dict[str, object]]:
    frame = session.from_items(list(range(500))).repartition(4, hash_by="item % 7")
    frame = frame.map(lambda row: {"k": row["item"] % 7, "x": row["item"] * 3})
    return (
        session.partial_sql("select k, sum(hash(x) % 1000003) as h from {0} group by k", frame)
        .sort("k")
        .take_all()
    )


def sorted_bytes(session: Session, source: Path, target: Path) -> bytes:
    gray_sort(session, str(source), str(target), npartitions=3)
    return b"".join(part.read_bytes() for part in sorted(target.glob("*.dat")))


@pytest.mark.filterwarnings("ignore")
def test_graysort_on_ray_is_the_local_one(cluster: str, sp: Session, tmp_path: Path) -> None:
    gensort(str(tmp_path / "in.dat"), 20_000)
    want = sorted_bytes(sp, tmp_path / "in.dat", tmp_path / "local")
    with init(data_root=str(tmp_path), ray_address=cluster) as session:
        assert sorted_bytes(session, tmp_path / "in.dat", tmp_path / "ray") == want
    found = valsort(sorted(map(str, (tmp_path / "ray").glob("*.dat"))))
    assert found.ok and found.checksum == summarize(make_records(20_000)).checksum


@pytest.mark.filterwarnings("ignore")
def test_ray_and_local_give_the_same_hash(cluster: str, sp: Session, tmp_path: Path) -> None:
    with init(data_root=str(tmp_path), ray_address=cluster) as session:
        assert session._job.executor.slots == 2
        assert digest(session) == digest(sp)
        mark = tmp_path / "mark"

        def once(row: dict[str, int]) -> dict[str, int]:
            if not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return row

        assert session.from_items([1, 2]).map(once).count() == 2
        with pytest.raises(ZeroDivisionError):
            session.from_items([1]).map(lambda row: {"x": 1 / 0}).compute()
