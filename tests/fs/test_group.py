"""Group commit: who waits together goes together, and an error is that group's alone."""

from __future__ import annotations

import threading
import time

import pytest

from whalefall.fs.group import GroupCommit


def in_threads(count: int, work) -> list[object]:  # type: ignore[no-untyped-def]
    """What `work(i)` returned or raised, of `count` threads."""
    outcomes: list[object] = [None] * count

    def run(i: int) -> None:
        try:
            outcomes[i] = work(i)
        except Exception as error:
            outcomes[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def test_writers_that_come_while_a_group_is_committed_share_the_next() -> None:
    groups: list[list[int]] = []
    first_runs, go_on = threading.Event(), threading.Event()

    def commit(works: list[int]) -> None:
        groups.append(sorted(works))
        first_runs.set()
        go_on.wait(10)

    group = GroupCommit("test", commit)
    first = threading.Thread(target=group.submit, args=(0,))
    first.start()
    first_runs.wait(10)
    others = [threading.Thread(target=group.submit, args=(i,)) for i in range(1, 6)]
    for thread in others:
        thread.start()
    while group._waiting < 5:
        time.sleep(0.001)
    go_on.set()
    for thread in [first, *others]:
        thread.join()
    group.close()
    assert groups == [[0], [1, 2, 3, 4, 5]]


def test_an_error_reaches_all_of_its_group_and_no_later_one() -> None:
    broken = threading.Event()
    broken.set()

    def commit(works: list[int]) -> None:
        if broken.is_set():
            raise OSError("the disk is gone")

    group = GroupCommit("test", commit)
    assert all(isinstance(outcome, OSError) for outcome in in_threads(4, group.submit))
    broken.clear()
    assert in_threads(4, group.submit) == [True] * 4
    group.close()


def test_close_commits_what_waits_and_takes_no_more() -> None:
    done: list[int] = []
    group = GroupCommit("test", done.extend)
    assert group.submit(1)
    group.close()
    assert not group.submit(2) and done == [1]


@pytest.mark.parametrize("writers", [1, 8])
def test_a_lone_writer_is_not_kept_waiting_and_many_are_gathered(writers: int) -> None:
    sizes: list[int] = []

    def commit(works: list[int]) -> None:
        sizes.append(len(works))
        time.sleep(0.002)

    group = GroupCommit("test", commit)
    in_threads(writers, lambda i: [group.submit(i) for _ in range(20)])
    group.close()
    assert sum(sizes) == 20 * writers
    assert sizes == [1] * 20 if writers == 1 else max(sizes) >= 4


def test_work_that_nobody_waits_for_goes_before_what_came_later() -> None:
    groups: list[list[int]] = []
    group = GroupCommit("test", groups.append)
    done: list[int] = []
    assert group.leave(1, lambda: done.append(1))
    assert group.submit(2) and done == [1]
    assert [work for one in groups for work in one] == [1, 2]
    assert group.leave(3, lambda: done.append(3))
    end_s = time.monotonic() + 10
    while done != [1, 3]:  # by itself, soon
        assert time.monotonic() < end_s
        time.sleep(0.001)
    group.close()
    assert not group.leave(4, lambda: done.append(4)) and done == [1, 3]


def test_work_that_nobody_waits_for_is_tried_again_in_its_place() -> None:
    broken, tried = threading.Event(), []
    broken.set()

    def commit(works: list[int]) -> None:
        tried.append(list(works))
        if broken.is_set():
            raise OSError("no room")

    group = GroupCommit("test", commit)
    done: list[int] = []
    group.leave(1, lambda: done.append(1))
    with pytest.raises(OSError, match="no room"):
        group.submit(2)
    assert done == []
    broken.clear()
    assert group.submit(3) and done == [1]
    assert tried[-1] == [1, 3] or tried[-2:] == [[1], [3]]
    group.close()
