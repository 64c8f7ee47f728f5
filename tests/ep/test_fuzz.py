"""ep.Buffer: random sequences of its calls bring the bits of plain loops (fuzz_children.py)."""

import pytest

from whalefall import launch

GROUPS = [(2, 2), (4, 2)]  # ranks, ranks a host
LONG = [(2, 2), (2, 1), (4, 4), (4, 2), (4, 3), (8, 8), (8, 4)]


def play(start, folder, size: int, per_host: int, seeds: list[int], steps: int) -> None:
    hosts = [f"host {r // per_host}" for r in range(size)] if per_host < size else None
    asked = {"folder": str(folder), "hosts": hosts, "seeds": seeds, "steps": steps}
    tasks = start("play", size, module="fuzz_children", **asked)
    assert launch.run(tasks, 600) == [""] * size


@pytest.mark.ranks
@pytest.mark.parametrize("group", GROUPS, ids=lambda g: "{}x{}".format(*g))
def test_random_sequences_bring_the_bits_of_plain_loops(start, tmp_path, group) -> None:
    play(start, tmp_path, *group, seeds=[0, 1, 2, 3], steps=40)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("group", LONG, ids=lambda g: "{}x{}".format(*g))
def test_many_random_sequences_bring_the_bits_of_plain_loops(start, tmp_path, group) -> None:
    play(start, tmp_path, *group, seeds=list(range(100, 200)), steps=100)
