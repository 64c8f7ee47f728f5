"""launch: processes start, are watched, reported and stopped, and none outlives its parent."""

import os
import pickle
import signal
import sys
import time
from pathlib import Path

import pytest

import whalefall.launch
from whalefall.errors import ConfigError, RankFailure
from whalefall.launch import Group, Task, run

HERE = str(Path(__file__).parent)


def task(name: str, function: str, **kwargs: object) -> Task:
    return Task(name, f"launch_children:{function}", kwargs=kwargs, path=(HERE,))


def wait_for(path: Path, timeout_s: float = 20.0) -> int:
    end = time.monotonic() + timeout_s
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.01)
    return int(path.read_text())


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_names_are_pinned() -> None:
    assert whalefall.launch.__all__ == ["Exit", "Group", "Task", "run"]


def test_results_come_back_in_the_order_of_the_tasks() -> None:
    tasks = [task("a", "add", a=1, b=2), task("b", "add", a=3, b=4)]
    assert run(tasks, timeout_s=30) == [{"sum": 3}, {"sum": 7}]


def test_a_module_runs_with_its_arguments(tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text("[1]")
    out = tmp_path / "out.json"
    run([Task("m", "json.tool", args=(str(tmp_path / "in.json"), str(out)))], timeout_s=30)
    assert out.read_text() == "[\n    1\n]\n"


def test_the_first_failure_is_named_with_its_last_words_and_stops_the_rest(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    tasks = [task("sleeper", "sleep", seconds=60, ready=str(ready)),
             task("rank 1", "fail", words="disk is on fire", after_s=0.5)]  # fmt: skip
    began = time.monotonic()
    with pytest.raises(RankFailure, match=r"rank 1 \(pid \d+\)") as caught:
        run([*tasks], timeout_s=60)
    assert time.monotonic() - began < 20
    assert "ValueError: disk is on fire" in str(caught.value)
    assert "sleeper" not in str(caught.value)
    assert caught.value.rank == 1
    assert pickle.loads(pickle.dumps(caught.value)).rank == 1
    assert not (ready.exists() and is_alive(int(ready.read_text())))


def test_a_killed_process_is_reported_with_its_signal() -> None:
    with Group([task("rank 0", "sleep", seconds=60)]) as group:
        group.kill("rank 0")
        with pytest.raises(RankFailure, match=r"rank 0 .*SIGKILL"):
            group.wait(20)


def test_only_the_last_lines_are_kept() -> None:
    with pytest.raises(RankFailure) as caught:
        run([task("loud", "shout", lines=5000)], timeout_s=30)
    assert "line 4999" in str(caught.value)
    assert "line 4000" not in str(caught.value)


def test_a_timeout_names_who_still_ran() -> None:
    tasks = [task("quick", "add", a=1, b=1), task("slow", "sleep", seconds=60)]
    with Group(tasks) as group:
        group.members["quick"].process.wait(20)
        with pytest.raises(RankFailure, match=r"after 0.2 s these still ran:\nslow") as caught:
            group.wait(0.2)
    assert caught.value.rank is None


def test_a_timeout_of_a_rank_has_its_number() -> None:
    with Group([task("rank 12", "sleep", seconds=60)]) as group:
        with pytest.raises(RankFailure) as caught:
            group.wait(0.1)
    assert caught.value.rank == 12


def test_who_ignores_sigterm_or_is_stopped_is_killed(tmp_path: Path) -> None:
    deaf, frozen = tmp_path / "deaf", tmp_path / "frozen"
    tasks = [task("deaf", "sleep", seconds=60, ignore_term=True, ready=str(deaf)),
             task("frozen", "sleep", seconds=60, ready=str(frozen))]  # fmt: skip
    with Group(tasks) as group:
        wait_for(deaf), wait_for(frozen)
        group.kill("frozen", signal.SIGSTOP)
        exits = {e.name: e.code for e in group.drain(grace_s=0.5)}
    assert exits == {"deaf": -signal.SIGKILL, "frozen": -signal.SIGTERM}


def test_no_orphan_after_the_parent_was_killed(tmp_path: Path) -> None:
    ready = tmp_path / "grandchild"
    with Group([task("parent", "parent_of_sleeper", ready=str(ready))]) as group:
        grandchild = wait_for(ready)
        time.sleep(0.2)
        assert is_alive(grandchild), "must outlive the thread that started it"
        group.kill("parent")
        end = time.monotonic() + 5
        while is_alive(grandchild):
            assert time.monotonic() < end, "the grandchild is an orphan"
            time.sleep(0.02)


def test_output_goes_to_the_log_and_into_the_report(tmp_path: Path) -> None:
    log = tmp_path / "log"
    failing = Task("x", "launch_children:fail", kwargs={"words": "bad"}, path=(HERE,), log=log)
    with pytest.raises(RankFailure, match="bad"):
        run([failing], timeout_s=30)
    assert "ValueError: bad" in log.read_text()


def test_a_name_is_free_again_once_its_process_has_ended() -> None:
    with Group([task("x", "sleep", seconds=60)]) as group:
        with pytest.raises(ConfigError, match="x runs already"):
            group.add(task("x", "sleep", seconds=1))
        group.kill("x")
        group.members["x"].process.wait()
        group.add(task("x", "add", a=1, b=1))
        assert group.wait(30) == [{"sum": 2}]


def test_bad_targets_are_refused() -> None:
    with pytest.raises(ConfigError, match="wanted module or module:function"):
        Task("x", "no such thing")
    with pytest.raises(ConfigError, match="kwargs need module:function"):
        Task("x", "json.tool", kwargs={"a": 1})


def test_the_child_is_ours() -> None:
    assert run([Task("x", "os:getppid")], 30) == [os.getpid()]
    assert sys.executable in Task("x", "os:getppid").command(1, 2)
