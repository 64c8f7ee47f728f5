"""Faults: killed workers, killed jobs, failed writes; and runs that find the results of others."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from whalefall import launch
from whalefall.data import Session, init, storage
from whalefall.data.driver import execute_plan
from whalefall.data.errors import TaskFailed, WorkerLost
from whalefall.data.executor import local
from whalefall.data.executor.local import LocalExecutor
from whalefall.data.memory import ArrowTableDataSet
from whalefall.data.nodes import (
    ArrowComputeNode,
    Context,
    DataSetPartitionNode,
    DataSourceNode,
)
from whalefall.data.plan import LogicalPlan
from whalefall.data.runtime import RuntimeContext
from whalefall.errors import ConfigError, RankFailure

SCRIPT = """
import sys
from whalefall.data import init
sp = init(job_id="j", job_time="2026-01-02T03:04:05", data_root=sys.argv[1], cpus=2,
          _remove_output_root=False)
scale = {scale}
frame = sp.from_items(list(range(100))).repartition(3, hash_by="item")
frame = frame.map(lambda row: {{"x": row["item"] * scale}}).filter("x > 0")
frame.write_parquet(sys.argv[1] + "/out")
print(sp.num_tasks_executed, frame.count(), sum(row["x"] for row in frame.take_all()))
sp.shutdown()
"""


def script(text: str, *args: str) -> str:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", text, *args]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_re_run_executes_no_task_and_an_edited_one_does(tmp_path: Path) -> None:
    first = script(SCRIPT.format(scale=2), str(tmp_path)).split()
    again = script(SCRIPT.format(scale=2), str(tmp_path)).split()
    edited = script(SCRIPT.format(scale=3), str(tmp_path)).split()
    assert int(first[0]) > 0 and first[1:] == ["99", "9900"]
    assert again == ["0", "99", "9900"]
    assert int(edited[0]) > 0 and edited[1:] == ["99", "14850"]


def test_a_changed_result_is_not_taken_for_the_tasks(tmp_path: Path) -> None:
    def rows() -> tuple[int, Any]:
        when = datetime(2026, 1, 2)
        with init("j", when, data_root=str(tmp_path), cpus=1, _remove_output_root=False) as session:
            found = session.partial_sql("select 7 as x").take_all()
            return session.num_tasks_executed, found

    assert rows() == (1, [{"x": 7}]) and rows() == (0, [{"x": 7}])
    (result,) = tmp_path.glob("**/*.parquet")
    pq.write_table(pa.table({"x": [8]}), result)
    assert rows() == (1, [{"x": 7}])
    status = result.stat()
    os.utime(result, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert rows() == (1, [{"x": 7}])
    result.unlink()
    assert rows() == (1, [{"x": 7}])


def die_until(folder: Path, deaths: int) -> Any:
    """A row function whose process kills itself the first times that it runs."""

    def function(row: dict[str, Any]) -> dict[str, Any]:
        marks = len(list(folder.iterdir()))
        if marks < deaths:
            (folder / str(marks)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return row

    return function


def test_a_killed_worker_is_replaced(fresh: Session, tmp_path: Path) -> None:
    (marks := tmp_path / "marks").mkdir()
    frame = fresh.from_items(list(range(10))).map(die_until(marks, 5))
    assert [row["item"] for row in frame.take_all()] == list(range(10))
    assert len(list(marks.iterdir())) == 5


def fragile(runtime_ctx: Any, tables: Any) -> pa.Table:
    runtime_ctx.task.inject_fault()
    return tables[0]


def test_injected_faults_kill_and_are_survived(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ctx, plan_ctx = (
        RuntimeContext("j", datetime.now(), str(tmp_path), fault_inject_prob=0.5),
        Context(),
    )
    ctx.usable_cpu_count = 2
    source = DataSourceNode(plan_ctx, ArrowTableDataSet(pa.table({"i": list(range(8))})))
    parts = DataSetPartitionNode(plan_ctx, (source,), 4, partition_by_rows=True)
    root = ArrowComputeNode(plan_ctx, (parts,), process_func=fragile)
    plan = execute_plan(LogicalPlan(plan_ctx, root), ctx)
    assert plan.final_output.to_arrow_table().column("i").to_pylist() == list(range(8))
    assert "killed by signal 9" in caplog.text
    with pytest.raises(ConfigError, match="unknown argument 'speed'"):
        RuntimeContext("j", datetime.now(), str(tmp_path), speed=9)


BUSY = """
import os, signal, sys, threading, time
from whalefall.data import init
sp = init(job_id="j", job_time="2026-01-02T03:04:05", data_root=sys.argv[1], cpus=2,
          _remove_output_root=False)
executor, killed = sp._job.executor, []

def killer():
    while True:
        time.sleep(float(sys.argv[2]))
        busy = [w for w in executor._workers if w.key is not None]
        for worker in [w for w in busy if w.key not in killed and len(killed) < 3][:1]:
            killed.append(worker.key)
            os.kill(worker.pid, signal.SIGKILL)

def slow(row):
    time.sleep(0.04)
    return {"x": row["item"] * 2}

if len(sys.argv) > 2:
    threading.Thread(target=killer, daemon=True).start()
frame = sp.from_items(list(range(240))).repartition(6, hash_by="item").map(slow)
frame = frame.repartition(3, hash_by="x").partial_sort("x")
frame.write_parquet(sys.argv[1] + "/out")
rows = sp.sql("select x from f order by x", f=frame).to_arrow().column("x").to_pylist()
print(sp.num_tasks_executed, len(killed), rows == list(range(0, 480, 2)))
sp.shutdown()
"""


def test_workers_killed_again_and_again_change_nothing(tmp_path: Path) -> None:
    """A real loop: a busy worker dies every second, three in all."""
    executed, killed, right = script(BUSY, str(tmp_path), "1.0").split()
    assert right == "True" and int(killed) >= 2 and int(executed) >= 11
    assert script(BUSY, str(tmp_path)).split() == ["0", "0", "True"]


def test_a_worker_killed_while_it_comes_up_is_replaced(tmp_path: Path) -> None:
    with init(data_root=str(tmp_path), cpus=1) as session:
        executor = session._job.executor
        assert isinstance(executor, LocalExecutor)
        os.kill(executor.pids[0], signal.SIGKILL)
        assert session.from_items([1]).map("item").count() == 1


def test_workers_killed_while_they_come_up_do_not_use_up_the_retries(tmp_path: Path) -> None:
    with init(data_root=str(tmp_path), cpus=1) as session:
        executor = session._job.executor
        assert isinstance(executor, LocalExecutor)
        spawn, killed = executor._spawn, [executor.pids[0]]
        os.kill(killed[0], signal.SIGKILL)

        def spawn_and_kill() -> Any:
            worker = spawn()
            if len(killed) < 9:
                killed.append(worker.pid)
                os.kill(worker.pid, signal.SIGKILL)
            return worker

        executor._spawn = spawn_and_kill  # type: ignore[method-assign]
        assert session.from_items([1]).map("item").count() == 1
        assert len(killed) == 9


def test_the_first_worker_that_is_up_gets_the_task(tmp_path: Path) -> None:
    with init(data_root=str(tmp_path), cpus=2) as session:
        executor = session._job.executor
        assert isinstance(executor, LocalExecutor)
        pids = executor.pids
        os.kill(pids[0], signal.SIGSTOP)
        assert session.from_items([1]).map("item").count() == 1
        assert executor.pids == pids and executor._workers[0].channel is None


def test_workers_that_cannot_start_end_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str, _: str, *args: Any, **kwargs: Any) -> Any:
        return launch.Task(name, "whalefall.no_such_module", *args, **kwargs)

    monkeypatch.setattr(local, "Task", broken)
    with init(data_root=str(tmp_path), cpus=1) as session:
        with pytest.raises(RankFailure, match=r"(?s)data worker did not start.*no_such_module"):
            session.from_items([1]).map("item").compute()


def test_the_sixth_death_ends_the_job(fresh: Session, tmp_path: Path) -> None:
    (marks := tmp_path / "marks").mkdir()
    with pytest.raises(WorkerLost, match="failed 6 times"):
        fresh.from_items([1]).map(die_until(marks, 99)).compute()


def test_a_users_error_is_not_tried_again(fresh: Session, tmp_path: Path) -> None:
    (marks := tmp_path / "marks").mkdir()

    def fail(row: dict[str, Any]) -> None:
        (marks / str(time.time_ns())).touch()
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fresh.from_items([1]).map(fail).compute()
    assert len(list(marks.iterdir())) == 1
    fresh.shutdown()
    ctx = fresh.runtime_ctx
    assert "failure" in Path(ctx.job_status_path).read_text()
    assert os.path.exists(ctx.staging_root)  # kept to look at


def test_idle_workers_may_die_too(fresh: Session) -> None:
    assert fresh.from_items([1]).map("item").count() == 1
    executor = fresh._job.executor
    assert isinstance(executor, LocalExecutor)
    for pid in executor.pids:
        os.kill(pid, signal.SIGKILL)
    assert fresh.from_items([1, 2]).map("item + 1 as item").count() == 2


def test_success_removes_what_only_a_running_job_needs(fresh: Session, tmp_path: Path) -> None:
    fresh.from_items([1]).map("item").write_parquet(str(tmp_path / "out"))
    fresh.shutdown()
    fresh.shutdown()
    ctx = fresh.runtime_ctx
    assert "success" in Path(ctx.job_status_path).read_text()
    for root in (ctx.queue_root, ctx.staging_root, ctx.temp_root, ctx.results_root):
        assert not os.path.exists(root)
    with pytest.raises(ConfigError, match="shut down"):
        fresh.from_items([1]).count()
    assert (
        len(list((tmp_path / "out").glob("*.parquet"))) == 1
    )  # no link into the job's folder died


def test_writing_again_replaces_and_strangers_stay(sp: Session, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sp.from_items([1, 2]).write_parquet(str(out))
    (out / "README").write_text("mine")
    (out / "sub").mkdir()
    (out / "sub" / "f").write_text("mine too")
    sp.from_items([3]).write_parquet(str(out))
    assert sp.read_parquet(str(out)).take_all() == [{"item": 3}]
    assert (out / "README").read_text() == "mine" and (out / "sub" / "f").exists()
    (out / "foreign.parquet").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"foreign\.parquet"):
        sp.from_items([4]).write_parquet(str(out))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_sink_runs_again_unless_what_it_wrote_is_still_there(sp: Session, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first, second = sp.from_items([1, 2, 3]).map("item as x"), sp.from_items([7]).map("item as x")
    for frame, want in ((first, [1, 2, 3]), (second, [7]), (first, [1, 2, 3])):
        frame.write_parquet(str(out))
        assert [row["x"] for row in sp.read_parquet(str(out)).take_all()] == want
    sink = second.write_parquet_lazy(str(tmp_path / "lazy"))
    assert not sink.is_computed()
    for _ in range(2):
        sink.compute()
        assert sink.is_computed() and sink.take_all() == [{"x": 7}]
        shutil.rmtree(tmp_path / "lazy")
        assert not sink.is_computed()
    sink.compute()
    before = os.stat(tmp_path / "lazy").st_ino
    assert sink.count() == 1 and os.stat(tmp_path / "lazy").st_ino == before
    (part,) = (tmp_path / "lazy").glob("*.parquet")
    os.rename(part, tmp_path / "taken")
    sink.compute()
    assert part.exists()


def test_a_sink_on_a_store_runs_each_time(sp: Session, tmp_path: Path) -> None:
    frame = sp.from_items([1]).map("item as x")
    for _ in range(2):
        frame.write_parquet(f"local://{tmp_path}/out")
        assert sp.read_parquet(str(tmp_path / "out")).take_all() == [{"x": 1}]
        shutil.rmtree(tmp_path / "out")


def test_a_failed_write_leaves_the_earlier_result(
    sp: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    sp.from_items([1]).write_parquet(str(out))
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "_place", full)
    with pytest.raises(OSError, match="No space left"):
        sp.from_items([2]).write_parquet(str(out))
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_job_killed_while_it_writes_leaves_no_output(tmp_path: Path) -> None:
    text = """
import os, sys, time
from whalefall.data import init, storage
sp = init(data_root=sys.argv[1], cpus=1)
place = storage._place
def slow(*args):
    place(*args)
    open(sys.argv[1] + "/writing", "w").close()
    time.sleep(60)
storage._place = slow
sp.from_items([1, 2]).repartition(2, by_rows=True).map("item").write_parquet(sys.argv[1] + "/out")
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen([sys.executable, "-c", text, str(tmp_path)], env=env) as process:
        end = time.monotonic() + 60
        while not (tmp_path / "writing").exists() and time.monotonic() < end:
            time.sleep(0.05)
        process.kill()
    assert (tmp_path / "writing").exists() and not (tmp_path / "out").exists()


def test_arguments_win_over_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SP_DATA_ROOT", str(tmp_path / "env"))
    monkeypatch.setenv("SP_JOBID", "from-env")
    with init(data_root=str(tmp_path / "arg"), cpus=1) as session:
        assert session.config.job_id == "from-env"
        assert session.runtime_ctx.job_root.startswith(str(tmp_path / "arg"))


def test_a_request_above_the_machine_is_capped(
    fresh: Session, caplog: pytest.LogCaptureFixture
) -> None:
    frame = fresh.from_items([1]).map("item", cpu_limit=64, memory_limit=1 << 50)
    assert frame.count() == 1
    assert fresh.from_items([2]).map("item", cpu_limit=64).count() == 1
    assert sum("asks for 64 CPUs" in r.message for r in caplog.records) == 1


def exit_with(folder: Path, code: object) -> Any:
    def function(row: dict[str, Any]) -> None:
        (folder / str(time.time_ns())).touch()
        sys.exit(code)  # type: ignore[arg-type]

    return function


@pytest.mark.parametrize(("code", "shown"), [(3, r"exit\(3\)"), ("no", r"exit\('no'\)"), (0, "0")])
def test_a_function_that_exits_is_an_error_at_once(
    fresh: Session, tmp_path: Path, code: object, shown: str
) -> None:
    (marks := tmp_path / "marks").mkdir()
    with pytest.raises(TaskFailed, match=rf"ArrowStreamTask(.*\n)*.*{shown}"):
        fresh.from_items([1]).map(exit_with(marks, code)).compute()
    assert len(list(marks.iterdir())) == 1
    assert fresh.from_items([1]).map(lambda row: row).count() == 1  # the worker lives on


def test_a_process_that_ends_itself_is_tried_again(fresh: Session, tmp_path: Path) -> None:
    (marks := tmp_path / "marks").mkdir()

    def leave_once(row: dict[str, Any]) -> dict[str, Any]:
        if not list(marks.iterdir()):
            (marks / "1").touch()
            os._exit(3)
        return row

    assert fresh.from_items([7]).map(leave_once).take_all() == [{"item": 7}]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("num_executors", [-3, 10**9, True, 1.5, "2"]),
        ("cpus", [0, -1, "two", 10**9]),
        ("memory", [0, -5, "-1GB", "nan", "many", True, "1e30"]),
        ("job_id", ["", "a/b", "../x", ".", "-x", "a b", "a\nb", "ö", "x" * 200, 7]),
        ("job_time", ["yesterday", 1e30, float("nan"), ()]),
        ("data_root", ["", 3, "s3://bucket/x"]),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    tmp_path: Path, name: str, values: list[Any]
) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=name if name != "memory" else "size") as caught:
            init(**{"data_root": str(tmp_path), name: value})
        assert "\n" not in str(caught.value) and "wanted" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_job_ids_that_name_a_folder_are_taken(tmp_path: Path) -> None:
    for value in ("a", "2026-01-02_run.7", "user@host:3", "x" * 128):
        with init(data_root=str(tmp_path), job_id=value, cpus=1) as session:
            assert os.path.dirname(session.runtime_ctx.job_root) == str(tmp_path)
    with pytest.raises(ConfigError, match=r"job_id is '\.\./x'"):
        RuntimeContext("../x", datetime.now(), str(tmp_path))
