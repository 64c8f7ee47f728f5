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
from whalefall.errors import ConfigError, CorruptError

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


def lane(name: str, start: int, took: int, device: int = 0) -> dict:
    return {
        "ph": "X", "cat": "kernel", "name": name, "pid": device, "tid": 7, "ts": start, "dur": took,
        "args": {"device": device, "stream": 7},
    }  # fmt: skip


def written(path: Path, *events: dict, **header: object) -> Path:
    path.write_text(json.dumps({"traceEvents": events, **header}))
    return path


def test_devices_of_one_number_in_different_files_do_not_hide_each_others_communication(
    tmp_path: Path,
) -> None:
    one = [lane("ncclDevKernel", 0, 100), lane("gemm", 40, 20), lane("gemm", 0, 5, device=1)]
    paths = [
        written(tmp_path / "a.json", *one),
        written(tmp_path / "b.json", lane("gemm", 0, 100)),
        written(tmp_path / "c.json", lane("nccl", 0, 30), lane("gemm", 10, 50)),
    ]
    trace.merge(paths[:2], tmp_path / "ab.json")
    trace.merge([tmp_path / "ab.json", paths[2]], tmp_path / "abc.json")
    trace.merge([tmp_path / "abc.json"] * 2, tmp_path / "twice.json")
    wanted = [
        ("0 (file 0)", 20, 100, 20), ("0 (file 1)", 100, 0, 0), ("0 (file 2)", 50, 30, 20),
        ("1", 5, 0, 0),
    ]  # fmt: skip
    found = trace.summarize(tmp_path / "abc.json")
    assert [
        (d.device, d.compute_us, d.communication_us, d.overlapped_us) for d in found.devices
    ] == wanted
    assert found.overlap_ratio == 40 / 130
    assert {e["args"]["device"] for e in events(tmp_path / "abc.json")} == {0, 1}
    twice = trace.summarize(tmp_path / "twice.json")
    assert (twice.compute_us, twice.overlapped_us) == (2 * 175, 2 * 40)
    assert len(twice.devices) == 8 and len(twice.streams) == 8


def tied(number: object) -> list[dict]:
    """Events of every kind that ids tie, all of one id."""
    at = {"cat": "c", "name": "n", "pid": 0, "tid": 0, "ts": 1}
    flows = [{**at, "ph": phase, "id": number} for phase in "stfbneSTpF"]
    twos = [{**at, "ph": "b", "id2": {scope: number}} for scope in ("local", "global")]
    return [*flows, *twos, {**at, "ph": "X", "dur": 1, "bind_id": number, "flow_out": True}]


def ids(path: Path) -> list[list[object]]:
    """The ids of a merged trace, the events of each process apart."""
    found: dict[str, list[object]] = {}
    for event in trace.TraceFile(path):
        values = [event.get("id"), event.get("bind_id"), *event.get("id2", {}).values()]
        found.setdefault(str(event["pid"]), []).extend(v for v in values if v is not None)
    return list(found.values())


@pytest.mark.parametrize(
    "number", [7, "0x7", "seven", 0xFFFF_0000_0000, 1 << 63, (1 << 64) - 1, 1.5]
)
def test_flows_and_asynchronous_events_of_different_files_stay_apart(
    number: object, tmp_path: Path
) -> None:
    paths = [written(tmp_path / f"{n}.json", *tied(number)) for n in range(3)]
    trace.merge(paths[:2], tmp_path / "ab.json")
    trace.merge([tmp_path / "ab.json", paths[2]], tmp_path / "abc.json")
    trace.merge([paths[2], tmp_path / "ab.json"], tmp_path / "cab.json")
    trace.merge([tmp_path / "abc.json"] * 2, tmp_path / "twice.json")
    for name, files in (("ab", 2), ("abc", 3), ("cab", 3), ("twice", 6)):
        found = ids(tmp_path / f"{name}.json")
        assert [len(group) for group in found] == [13] * files
        assert [len(set(group)) for group in found] == [1] * files  # still tied in their file
        assert len({group[0] for group in found}) == files
        assert all(len(str(group[0])) <= len("0x") + 16 for group in found[1:])  # 64 bits
    assert ids(tmp_path / "ab.json")[0][0] == number  # of the first file they stay


def test_ids_of_objects_stay_since_arguments_name_them(tmp_path: Path) -> None:
    thing = {"ph": "O", "name": "n", "pid": 0, "tid": 0, "ts": 1, "id": "0x1"}
    snapshot = {**thing, "args": {"snapshot": {"other": {"id_ref": "0x1"}}}}
    path = written(tmp_path / "a.json", snapshot)
    trace.merge([path, path], tmp_path / "out.json")
    assert {e["id"] for e in trace.TraceFile(tmp_path / "out.json")} == {"0x1"}
    assert len({e["pid"] for e in trace.TraceFile(tmp_path / "out.json")}) == 2


def test_a_file_without_a_clock_beside_one_with_is_refused_unless_an_offset_says(
    tmp_path: Path,
) -> None:
    a = handmade(tmp_path / "a.json", baseTimeNanoseconds=3_000_000)
    b = handmade(tmp_path / "b.json")
    with pytest.raises(ConfigError, match=r"b.json has no baseTimeNanoseconds, .*a.json has; "):
        trace.merge([a, b], tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()
    trace.merge([a, b], tmp_path / "out.json", offsets_ns={str(b): -2_000_000})
    assert [e["ts"] for e in events(tmp_path / "out.json")] == [1010, 10]


UNCLEAR = {
    "a text for an object": {"whalefall": "v1"},
    "a list for a boot": {"whalefall": {"boot": ["x"]}},
    "a clock as text": {"whalefall": {"boot": "x", "monotonic_ns": "7"}},
    "a time as text": {"baseTimeNanoseconds": "soon"},
    "a time that is none": {"baseTimeNanoseconds": float("nan")},
    "a time beyond reason": {"baseTimeNanoseconds": 10**300},
}


@pytest.mark.parametrize("header", UNCLEAR.values(), ids=UNCLEAR)
def test_a_header_without_a_clock_is_refused_in_one_line(header: dict, tmp_path: Path) -> None:
    a = written(tmp_path / "a.json", lane("gemm", 0, 1), baseTimeNanoseconds=1000)
    b = written(tmp_path / "b.json", lane("gemm", 0, 1), **header)
    with pytest.raises(CorruptError, match=f"b.json: .*{next(iter(header))}.* wanted") as refused:
        trace.merge([a, b], tmp_path / "out.json")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300
    trace.cut(b, tmp_path / "cut.json", 0, 1)
    text = (tmp_path / "cut.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_cut_keeps_begins_and_ends_together(tmp_path: Path) -> None:
    def mark(phase: str, at: int, name: str = "", tid: int = 1) -> dict:
        return {"ph": phase, "pid": 1, "tid": tid, "ts": at} | ({"name": name} if name else {})

    spans = {  # on lanes of their own: from, to, whether any of it lies in 40 … 70
        "around": (0, 100, True), "before": (0, 39, False), "into": (10, 40, True),
        "within": (50, 60, True), "out of": (69, 90, True), "after": (70, 90, False),
    }  # fmt: skip
    marks = [
        mark(phase, at, name, tid)
        for tid, (name, (start, end, _)) in enumerate(spans.items(), 10)
        for phase, at in (("B", start), ("E", end))
    ]
    nested = [mark("B", 1, "outer"), mark("B", 2, "gone"), mark("E", 3), mark("B", 45, "inner")]
    nested += [mark("E", 50), mark("B", 80, "late"), mark("E", 90), mark("E", 95)]
    unended = [mark("B", 5, "open", 2)]
    path = written(tmp_path / "t.json", *sorted(marks, key=lambda e: e["ts"]), *nested, *unended)
    trace.cut(path, tmp_path / "cut.json", 40, 70)
    kept = list(trace.TraceFile(tmp_path / "cut.json"))
    begun = {e["name"] for e in kept if e["ph"] == "B"}
    inside = {name for name, (*_, some) in spans.items() if some}
    assert begun == inside | {"outer", "inner", "open"}
    assert [(e["ph"], e["ts"]) for e in kept if e["tid"] == 1] == [
        ("B", 1), ("B", 45), ("E", 50), ("E", 95),
    ]  # fmt: skip
    assert trace.check(tmp_path / "cut.json").problems.keys() == {"begin without end"}
