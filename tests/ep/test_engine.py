"""ep.Engine: every token arrives where it must and comes back with the bits of one process.

The checks themselves are in ep_children.py, since they run in the ranks' processes.
"""

import ast
import os
import threading
from pathlib import Path

import pytest

import whalefall.ep
from whalefall import launch
from whalefall.errors import ConfigError, LimitError, RankFailure

HERE = Path(__file__).parent
CHECKS = [
    node.name.removeprefix("check_")
    for node in ast.parse((HERE / "ep_children.py").read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
]
GROUPS = [  # ranks, ranks a host, chunk bytes, how rows go on one host
    (1, 1, 1 << 20, "direct"),
    (2, 2, 1 << 20, "direct"),
    (2, 2, 4096, "slots"),  # many ticks: slots are reused
    (4, 4, 8192, "direct"),
    (4, 4, 1 << 20, "slots"),
    (8, 8, 1 << 20, "direct"),
    (2, 1, 4096, "hosts"),
    (4, 2, 1 << 20, "hosts"),
    (8, 4, 8192, "hosts"),
    (4, 3, 8192, "hosts"),  # hosts of unequal size
]


@pytest.mark.ranks
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("group", GROUPS, ids=lambda g: "{}x{}-{}-{}".format(*g))
def test_check_holds_on_every_rank(outcome, group: tuple[int, int, int, str], check: str) -> None:
    said = [rank.get(check, "not reached") for rank in outcome(*group)]
    assert not any(said), "\n".join(f"rank {r}: {text}" for r, text in enumerate(said) if text)


@pytest.mark.ranks
@pytest.mark.parametrize("hosts", [None, ["a", "a", "b", "b"], ["a", "b", "b", "b"]], ids=str)
def test_a_killed_rank_is_named_long_before_the_timeout(start, tmp_path, hosts) -> None:
    for said in survivors(start, tmp_path, "kill", 40.0, hosts):
        assert "rank 1 is dead" in said["error"] and said["seconds"] < 20
        assert said["rank"] == 1


@pytest.mark.ranks
def test_a_stopped_rank_is_named_at_the_timeout(start, tmp_path) -> None:
    for said in survivors(start, tmp_path, "stop", 1.0, None):
        assert "rank 1 was silent for 1.0 s" in said["error"] and said["seconds"] < 15
        assert said["rank"] == 1


def survivors(start, folder, how: str, timeout_s: float, hosts) -> list[dict]:
    """Rank 1 of 4 goes; what the other three say."""
    tasks = start("lose_a_rank", 4, folder=str(folder), how=how, timeout_s=timeout_s, hosts=hosts)
    names = ("rank 0", "rank 2", "rank 3")
    with launch.Group(tasks) as group:
        for name in names:
            group.members[name].process.wait(timeout=60)
        said = [group.members[name] for name in names]
        for one in said:
            assert one.exit().code == 0, str(one.exit())
        return [one.value() for one in said]


@pytest.mark.ranks
def test_shared_memory_is_clean_after_a_crash(start, tmp_path) -> None:
    before = set(Path("/dev/shm").glob("whalefall-ep-*"))
    survivors(start, tmp_path, "kill", 40.0, None)
    assert set(Path("/dev/shm").glob("whalefall-ep-*")) <= before


@pytest.mark.ranks
def test_different_hidden_sizes_are_found_at_construction(start, tmp_path) -> None:
    said = launch.run(start("disagree_at_construction", 2, folder=str(tmp_path)), 60)
    assert said[0] == ("ep: rank 1 was made with hidden = 65, rank 0 with 64; all ranks must agree")
    assert "hidden = 64, rank 1 with 65" in said[1]


def test_a_rank_that_does_not_come_is_named(tmp_path) -> None:
    with pytest.raises(RankFailure, match=r"ranks \[1, 2\] did not come within 0.2 s") as late:
        whalefall.ep.FileGroup(tmp_path, 0, 3, timeout_s=0.2).all_gather(b"")
    assert late.value.rank == 1


@pytest.mark.ranks
def test_combine_returns_only_when_nobody_reads_its_rows_any_more(start, tmp_path) -> None:
    tasks = start("overwrite_what_was_combined", 2, folder=str(tmp_path))
    assert launch.run(tasks, 60) == [[True] * 10] * 2


def test_a_token_that_fits_no_chunk_is_refused(tmp_path) -> None:
    import numpy as np

    group = whalefall.ep.FileGroup(tmp_path, 0, 1)
    with whalefall.ep.Engine(group, chunk_bytes=4096, shared_bytes=0) as engine:
        with pytest.raises(LimitError, match="do not fit a chunk of 4096 bytes"):
            engine.dispatch(np.zeros((1, 4096), np.float32), np.zeros((1, 1), np.int64), 4)


def test_engines_that_are_gone_leave_nothing_open(tmp_path) -> None:
    import numpy as np

    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    kept, before = [], held()
    for i in range(20):
        with whalefall.ep.Engine(whalefall.ep.FileGroup(tmp_path / str(i), 0, 1)) as engine:
            got = engine.dispatch(np.ones((40, 64), np.float32), np.zeros((40, 1), np.int64), 4)
            rows = engine.dispatch_selections(got.x, np.zeros((40, 1), np.int64), 4)
            engine.begin_combine_selections(rows.x, rows.handle)[1].wait()
        kept.append(got.x)  # a result outlives its engine
        assert kept[0].sum() == 40 * 64
    kept.clear()
    del engine, got, rows
    assert held() == before


def test_groups_that_make_no_sense_are_refused(tmp_path) -> None:
    from whalefall.ep.topology import Topology

    with pytest.raises(ConfigError, match="no neighbours"):
        Topology.from_names(["a", "b", "a"])
    with pytest.raises(ConfigError, match="rank is 3 of 3"):
        whalefall.ep.FileGroup(tmp_path, 3, 3)


def test_every_remote_rank_has_one_proxy_on_each_host() -> None:
    from whalefall.ep.topology import Topology

    topology = Topology.from_names(["a", "a", "a", "b"])
    assert [topology.proxy(r, 1) for r in range(4)] == [3, 3, 3, 3]
    assert topology.served(3) == [0, 1, 2]
    assert [topology.served(r) for r in range(3)] == [[3], [], []]
