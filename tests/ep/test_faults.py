"""ep: a rank is killed, stopped or slow in the middle of any collective (fault_children.py)."""

import random
import signal
import time
from pathlib import Path

import pytest

from whalefall import launch
from whalefall.ep import TorchGroup
from whalefall.errors import ConfigError

TWO, UNEVEN = ["a", "a", "b", "b"], ["a", "b", "b", "b"]
WAYS = ["dispatch", "selections", "threads", "barrier", "low latency", "hook", "handle"]
CASES = [  # way, hosts, all rows through slots, who goes, after how many seconds
    ("dispatch", None, False, 2, 0.01),
    ("selections", None, True, 0, 0.02),
    ("threads", TWO, False, 1, 0.03),
    ("selections", TWO, False, 3, 0.02),
    ("dispatch", UNEVEN, False, 0, 0.03),
    ("hook", TWO, False, 2, 0.01),
    ("handle", None, False, 1, 0.02),
]


def others(start, folder: Path, case: tuple, how: str, timeout_s: float) -> list[dict]:
    """What the other three of four ranks hear when one goes."""
    way, hosts, slots, victim, after_s = case
    tasks = start(
        "until_a_rank_is_lost", 4, module="fault_children", folder=str(folder), way=way,
        hosts=hosts, victim=victim, after_s=after_s, how=how, timeout_s=timeout_s, slots=slots,
    )  # fmt: skip
    said = []
    with launch.Group(tasks) as group:
        for name in (f"rank {r}" for r in range(4) if r != victim):
            group.members[name].process.wait(timeout=100)
            ended = group.members[name].exit()
            assert ended.code == 0, str(ended)
            said.append(group.members[name].value())
    return said


def regions() -> set[Path]:
    return set(Path("/dev/shm").glob("whalefall-ep-*"))


@pytest.mark.ranks
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}")
def test_every_other_rank_names_the_killed_one_and_nothing_stays(start, tmp_path, case) -> None:
    before = regions()
    for said in others(start, tmp_path, case, "kill", 60.0):
        assert said["rank"] == case[3], said  # not one that left because of it
        assert f"rank {case[3]} is dead" in said["error"] and said["seconds"] < 30
    assert regions() <= before


@pytest.mark.ranks
@pytest.mark.parametrize(("hosts", "step"), [(None, 1), (["a", "b", "b"], 3)], ids=str)
def test_a_rank_killed_while_buffers_are_made_is_one_line_to_the_others(
    start, tmp_path, hosts, step: int
) -> None:
    tasks = start(
        "make_while_a_rank_dies", 3, module="fault_children", folder=str(tmp_path), hosts=hosts,
        step=step,
    )  # fmt: skip
    with launch.Group(tasks) as group:
        for name in ("rank 0", "rank 2"):
            group.members[name].process.wait(timeout=100)
            group.members[name].exit()  # any code: gloo may abort where its group is broken
            said = group.members[name].value() or ""
            wanted = "RankFailure: ep: a rank died or left while the Buffer was made: "
            assert said.startswith(wanted) and "\n" not in said and ".cc:" not in said, said


def test_a_group_without_cpu_tensors_is_told_from_a_dead_rank(monkeypatch) -> None:
    import torch.distributed as dist

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("No backend type associated with device type cpu")  # as torch, on nccl

    group = object.__new__(TorchGroup)
    group.group, group.size = None, 2
    monkeypatch.setattr(dist, "all_gather", refuse)
    with pytest.raises(ConfigError, match="no backend for CPU tensors"):
        group.all_gather(b"")


@pytest.mark.ranks
@pytest.mark.parametrize(("way", "victim"), [("selections", 3), ("hook", 2)])
def test_who_waits_for_a_waiting_rank_names_the_stopped_one(
    start, tmp_path, way: str, victim: int
) -> None:
    for said in others(start, tmp_path, (way, TWO, False, victim, 0.01), "stop", 2.0):
        assert said["rank"] == victim and "was silent for 2.0 s" in said["error"], said


@pytest.mark.ranks
@pytest.mark.parametrize("hosts", [None, TWO], ids=["host", "hosts"])
@pytest.mark.parametrize("forms", [["handle", "hook"], ["hook", "handle"]], ids="-".join)
def test_what_ends_one_form_ends_the_other_on_all_ranks(start, tmp_path, forms, hosts) -> None:
    tasks = start(
        "one_form_then_the_other", 4, module="fault_children", folder=str(tmp_path), forms=forms,
        hosts=hosts,
    )  # fmt: skip
    said = launch.run(tasks, 60)
    for rank in (0, 2, 3):
        assert [named for named, _ in said[rank]] == [1, 1], said
        assert said[rank][1][1] < 0.5, said
    assert [named for named, _ in said[1]] == [1] and said[1][0][1] < 0.5, said


@pytest.mark.ranks
def test_ranks_that_call_one_form_each_hear_so(start, tmp_path) -> None:
    said = launch.run(start("one_form_each", 2, module="fault_children", folder=str(tmp_path)), 60)
    assert "it waits in a normal call, this rank in a low-latency one; all ranks must" in said[0]
    assert "rank 1 (this one)" in said[1] and "it made other calls than the others" in said[1]


@pytest.mark.ranks
def test_with_shrink_a_rank_that_comes_back_hears_that_it_was_left(start, tmp_path) -> None:
    alone = ["a", "b", "b", "c"]  # 3 stands for nobody
    ways = [("late", 1, None), ("stopped", 1, None), ("by hand", 1, None), ("by hand", 3, alone)]
    tasks = start("come_back", 4, module="left_children", folder=str(tmp_path), ways=ways)
    with launch.Group(tasks) as group:
        while not all((tmp_path / f"1 gone on {r}").exists() for r in (0, 2, 3)):
            group.check()
            time.sleep(0.01)
        group.kill("rank 1", signal.SIGCONT)
        said = group.wait(60)
    for i, (_, victim, _) in enumerate(ways):
        heard = [rank[i] for rank in said]
        words = heard.pop(victim)
        assert f"rank {victim} (this one)" in words and "others went on without it" in words, said
        assert heard == [f"[{victim}]"] * 3, said


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("seed", range(60))
def test_a_rank_killed_or_stopped_at_any_moment_is_named(start, tmp_path, seed: int) -> None:
    dice = random.Random(seed)
    way, hosts = dice.choice(WAYS), dice.choice([None, TWO, UNEVEN])
    slots = hosts is None and WAYS.index(way) < 4 and dice.random() < 0.5
    case = way, hosts, slots, dice.randrange(4), dice.random() / 8
    how, timeout_s = ("kill", 60.0) if seed % 3 else ("stop", 4.0)
    for said in others(start, tmp_path, case, how, timeout_s):
        assert said["rank"] == case[3], said


@pytest.mark.ranks
@pytest.mark.parametrize("hosts", [None, TWO[1:3]], ids=str)
def test_a_slow_rank_is_waited_for(start, tmp_path, hosts) -> None:
    more = {"module": "fault_children", "folder": str(tmp_path), "hosts": hosts}
    with launch.Group(start("while_a_rank_is_slow", 2, **more)) as group:
        while not (tmp_path / "ready 1").exists():
            time.sleep(0.01)
        for _ in range(3):
            group.kill("rank 1", signal.SIGSTOP)
            time.sleep(0.2)
            group.kill("rank 1", signal.SIGCONT)
            time.sleep(0.02)
        assert group.wait(60) == [0, 0]
