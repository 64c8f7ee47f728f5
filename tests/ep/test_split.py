"""ep: low-latency calls in halves: what is given may change, buffers may go (split_children.py)."""

import pytest

from whalefall import launch


@pytest.mark.ranks
def test_a_buffer_may_be_destroyed_while_a_slot_is_waited_for(start, tmp_path) -> None:
    tasks = start("leave_with_hooks", 2, module="split_children", folder=str(tmp_path))
    assert launch.run(tasks, 60) == [[], [0]]


@pytest.mark.ranks
@pytest.mark.parametrize("hosts", [None, ["a", "a", "b", "b"]], ids=str)
def test_what_is_given_may_change_before_the_hook(start, tmp_path, hosts) -> None:
    size = len(hosts or "12")
    tasks = start(
        "change_before_the_hook", size, module="split_children", folder=str(tmp_path), hosts=hosts
    )
    for said in launch.run(tasks, 60):
        assert len(said) == 5 and all(said.values()), said
