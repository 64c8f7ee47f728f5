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


@pytest.mark.ranks
def test_a_zero_copy_buffer_is_for_the_next_call_of_its_handle_alone(start, tmp_path) -> None:
    tasks = start("take_the_next_buffer", 2, module="split_children", folder=str(tmp_path))
    for said in launch.run(tasks, 60):
        assert said.pop("nothing") is True and said.pop("the other") is True
        refused, first = said.pop("taken twice")
        assert "another handle has the buffer" in refused and first is True
        assert len(said) == 6
        for name, words in said.items():
            assert "right before this call, and fill it again" in str(words), (name, words)
