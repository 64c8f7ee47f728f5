"""Several processes on one clock."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from whalefall import trace
from whalefall.errors import ConfigError

WORKER = """
import sys, time
from whalefall import trace
trace.start("worker", rank=int(sys.argv[1]))
while time.perf_counter() < float(sys.argv[2]):
    pass
with trace.span("together", category="compute"):
    time.sleep(0.05)
trace.stop(sys.argv[3])
"""


def events(path: Path) -> list[dict]:
    return [e for e in trace.TraceFile(path) if e["ph"] == "X"]


def test_processes_of_one_host_share_a_clock(tmp_path: Path) -> None:
    paths = [tmp_path / f"rank{rank}.json.gz" for rank in range(2)]
    go = str(time.perf_counter() + 1.0)
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(rank), go, str(path)])
        for rank, path in enumerate(paths)
    ]
    assert [worker.wait(60) for worker in workers] == [0, 0]
    trace.merge(paths, tmp_path / "all.json.gz")
    first, second = events(tmp_path / "all.json.gz")
    assert {first["pid"], second["pid"]} == {0, 1}
    assert abs(first["ts"] - second["ts"]) < 45_000  # both waited for one instant


def handmade(path: Path, **header: object) -> Path:
    event = {"ph": "X", "name": "e", "pid": 3, "tid": 0, "ts": 10.0, "dur": 1}
    path.write_text(json.dumps({**header, "traceEvents": [event]}))
    return path


def test_other_hosts_are_aligned_by_wall_clock_and_measured_offset(tmp_path: Path) -> None:
    a = handmade(tmp_path / "a.json", baseTimeNanoseconds=1_000_000)
    b = handmade(tmp_path / "b.json", baseTimeNanoseconds=3_000_000)
    trace.merge([a, b], tmp_path / "out.json")
    assert [e["ts"] for e in events(tmp_path / "out.json")] == [10, 2010]
    trace.merge([a, b], tmp_path / "out.json", offsets_ns={str(b): 500_000})
    assert [e["ts"] for e in events(tmp_path / "out.json")] == [10, 1510]


def test_processes_with_the_same_number_stay_apart(tmp_path: Path) -> None:
    a, b = handmade(tmp_path / "a.json"), handmade(tmp_path / "b.json")
    trace.merge([a, b], tmp_path / "out.json")
    assert len({e["pid"] for e in events(tmp_path / "out.json")}) == 2


def test_clock_offset_trusts_the_quickest_exchange() -> None:
    # the other clock is 1000 ahead; the slow exchange would say 1450
    assert trace.clock_offset([(0, 1500, 100), (200, 1205, 210)]) == (1000, 5)
    with pytest.raises(ConfigError, match="no exchanges"):
        trace.clock_offset([])


def test_cut_keeps_what_reaches_into_the_part(tmp_path: Path) -> None:
    lane = {"ph": "X", "pid": 0, "tid": 0, "dur": 10}
    rows = [{**lane, "name": str(n), "ts": 1000 + 20 * n} for n in range(10)]
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"traceEvents": rows}))
    trace.cut(path, tmp_path / "cut.json", 45, 85)
    assert [e["name"] for e in events(tmp_path / "cut.json")] == ["2", "3", "4"]
    with pytest.raises(ConfigError, match="holds nothing"):
        trace.cut(path, tmp_path / "cut.json", 5, 5)


def test_recording_needs_no_numpy() -> None:
    code = (
        "import sys\nfrom whalefall import trace\ntrace.start()\nwith trace.span('x'): pass\n"
        "trace.stop()\nprint([n for n in ('numpy', 'torch', 'drawsvg') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.strip() == "[]"


def test_written_files_are_gzip_where_the_name_says(tmp_path: Path) -> None:
    trace.start()
    trace.stop(tmp_path / "t.json.gz")
    assert json.loads(gzip.decompress((tmp_path / "t.json.gz").read_bytes()))["traceEvents"]


def test_cut_keeps_names_that_are_half_a_surrogate_pair(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text('{"traceEvents": [{"ph": "X", "name": "\\ud800", "ts": 1, "dur": 2}]}')
    assert trace.cut(path, tmp_path / "cut.json", 0, 9) == 1
    assert '"\\ud800"' in (tmp_path / "cut.json").read_text()
