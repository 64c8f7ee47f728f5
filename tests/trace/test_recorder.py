"""The recorder: what it keeps, what it costs, and that files appear whole."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from whalefall import trace
from whalefall.errors import ConfigError


@pytest.fixture(autouse=True)
def _stopped() -> Iterator[None]:
    yield
    if trace.is_recording():
        trace.stop()


def test_a_span_keeps_name_category_args_and_duration() -> None:
    trace.start()
    with trace.span("dispatch", category="communication", layer=3):
        time.sleep(0.002)
    (event,) = trace.stop()
    assert (event.name, event.category, event.args) == ("dispatch", "communication", {"layer": 3})
    assert 2e6 <= event.duration_ns < 200e6


def test_nothing_is_kept_when_not_started() -> None:
    with trace.span("lost"):
        trace.instant("lost too")
    trace.start()
    assert trace.stop() == []


def test_a_span_that_raises_is_kept_and_the_error_passes() -> None:
    trace.start()
    with pytest.raises(KeyError), trace.span("fails"):
        raise KeyError("x")
    assert [event.name for event in trace.stop()] == ["fails"]


def test_the_buffer_is_bounded_and_counts_what_it_drops(tmp_path: Path) -> None:
    trace.start(max_events=3)
    for _ in range(5):
        with trace.span("s"):
            pass
    assert len(trace.stop(tmp_path / "t.json")) == 3
    assert json.loads((tmp_path / "t.json").read_text())["whalefall"]["dropped"] == 2


def test_threads_and_tracks_get_lanes_of_their_own(tmp_path: Path) -> None:
    trace.start("worker", rank=5)

    def work() -> None:
        with trace.span("in thread"):
            pass

    thread = threading.Thread(target=work, name="sender")
    with trace.span("main"), trace.span("on track", track="stream 7"):
        thread.start()
        thread.join()
    trace.stop(tmp_path / "t.json.gz")
    loaded = json.loads(gzip.decompress((tmp_path / "t.json.gz").read_bytes()))
    spans = [e for e in loaded["traceEvents"] if e["ph"] == "X"]
    assert len({e["tid"] for e in spans}) == 3
    assert {e["pid"] for e in spans} == {5}
    names = [e["args"]["name"] for e in loaded["traceEvents"] if e["name"] == "thread_name"]
    assert "stream 7" in names


def test_start_twice_and_stop_twice_say_so() -> None:
    trace.start()
    with pytest.raises(ConfigError, match="records already"):
        trace.start()
    trace.stop()
    with pytest.raises(ConfigError, match="nothing is being recorded"):
        trace.stop()


def test_a_stop_that_cannot_write_keeps_the_recording(tmp_path: Path) -> None:
    trace.start("kept", rank=4)
    with trace.span("before"):
        pass
    (tmp_path / "file").touch()
    for path, error in (
        (tmp_path / "none" / "t.json", FileNotFoundError),
        (tmp_path / "file" / "t.json", NotADirectoryError),
        (tmp_path, IsADirectoryError),
    ):
        with pytest.raises(error, match=f"the recording goes on, .*'{path}'$") as refused:
            trace.stop(path)
        assert "\n" not in str(refused.value)
    with trace.span("after"):
        pass
    assert [event.name for event in trace.stop(tmp_path / "t.json")] == ["before", "after"]
    assert json.loads((tmp_path / "t.json").read_text())["distributedInfo"]["rank"] == 4


def test_a_save_holds_one_moment_while_other_threads_record(tmp_path: Path) -> None:
    from whalefall.trace.chrome import session_events, write
    from whalefall.trace.recorder import _current

    trace.start()
    trace.instant("before", track="a")
    written = session_events(_current("test"))
    begun = [next(written)]  # the process's name: now the lanes are known
    trace.instant("later", track="b")
    write(tmp_path / "t.json", [*begun, *written], {})
    assert "later" not in (tmp_path / "t.json").read_text()
    assert [event.name for event in trace.stop()] == ["before", "later"]


def test_a_failing_write_leaves_no_half_file(tmp_path: Path) -> None:
    from whalefall.trace.chrome import write

    def events() -> Iterator[dict[str, object]]:
        yield {"ph": "X"}
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError):
        write(tmp_path / "t.json", events(), {})
    assert list(tmp_path.iterdir()) == []


def test_the_environment_variable_records_any_process(tmp_path: Path) -> None:
    code = "from whalefall import trace\nwith trace.span('work'): pass"
    environ = {**os.environ, "WHALEFALL_TRACE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environ, check=True)
    (path,) = tmp_path.glob("trace-*.json.gz")
    assert "work" in gzip.decompress(path.read_bytes()).decode()


def test_a_forked_child_does_not_repeat_its_parents_events() -> None:
    trace.start()
    with trace.span("parent"):
        pass
    child = os.fork()
    if child == 0:
        os._exit(len(trace.stop()))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_recorder_keeps_at_least_one_event() -> None:
    with pytest.raises(ConfigError, match=r"trace.start: max_events is 0, wanted a whole number"):
        trace.start(max_events=0)
