"""`whalefall trace …`: what a user types, and what he sees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from whalefall import trace
from whalefall.cli import main


def run(*args: object) -> int:
    with pytest.raises(SystemExit) as left:
        main(["trace", *map(str, args)])
    return int(left.value.code or 0)


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    trace.start("demo", rank=0)
    with trace.span("dispatch", category="communication", track="network"):
        with trace.span("</script>gemm", category="compute"):
            pass
    trace.stop(tmp_path / "t.json.gz")
    return tmp_path / "t.json.gz"


def test_summary_as_json_has_the_documented_keys(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("summary", recorded, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {
        "streams", "compute_us", "communication_us", "overlapped_us", "overlap_ratio", "kernels",
        "span_us",
    } <= set(found)  # fmt: skip
    assert set(found["streams"][0]) == {"id", "kernels", "busy_us", "span_us"}
    assert {"name", "count", "total_us"} <= set(found["kernels"][0])
    assert 0 < found["overlap_ratio"] <= 1


def test_summary_and_overlap_print(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("summary", recorded) == 0
    assert "of communication)" in capsys.readouterr().out
    assert run("overlap", recorded) == 0
    assert "device 0" in capsys.readouterr().out


def test_what_the_recorder_dropped_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, both = tmp_path / "t.json", tmp_path / "both.json"
    trace.start(max_events=2)
    for _ in range(5):
        with trace.span("gemm", category="compute"):
            pass
    trace.stop(file)
    assert run("merge", file, file, "-o", both) == 0
    for path, dropped in ((file, 3), (both, 6)):
        capsys.readouterr()
        assert run("summary", path) == 0
        assert f"{dropped} events are missing: " in capsys.readouterr().out
        assert run("summary", path, "--json") == 0
        assert json.loads(capsys.readouterr().out)["dropped"] == dropped
        assert run("check", path) == 1
        assert f"{dropped} x dropped: the recorder's buffer was full" in capsys.readouterr().out
        assert run("check", path, "--json") == 1
        (problem,) = json.loads(capsys.readouterr().out)["problems"]
        assert (problem["kind"], problem["count"]) == ("dropped", dropped)


def test_fewer_than_no_kernels_are_refused(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("summary", recorded, "--top", -1) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert "trace summary: top is -1, wanted a whole number >= 0" in said.err


def test_check_exits_1_for_faults(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("check", recorded) == 0
    bad = tmp_path / "bad.json"
    bad.write_text('[{"ph": "E", "name": "x", "ts": 1, "pid": 0, "tid": 0}]')
    assert run("check", bad) == 1
    assert "end without begin" in capsys.readouterr().out


def test_html_is_one_page_that_fetches_nothing(recorded: Path, tmp_path: Path) -> None:
    assert run("html", recorded, tmp_path / "t.html") == 0
    text = (tmp_path / "t.html").read_text()
    assert "http" not in text
    assert text.count("</script>") == 1  # the event's name does not end the script
    data = json.loads(text.split("const TRACE=")[1].split(";\n")[0])
    assert sum(len(lane["events"]) for lane in data["lanes"]) == 2


def test_the_data_of_a_page_has_no_mark_that_html_or_javascript_reads(tmp_path: Path) -> None:
    name = "<!--<script> </script> --> \u2028\u2029 \ud800"
    file, page = tmp_path / "t.json", tmp_path / "t.html"
    file.write_text(json.dumps([{**KERNEL, "name": name, "pid": "<a"}]))
    assert run("html", file, page) == 0
    data = page.read_text().split("const TRACE=")[1].split(";\n")[0]
    assert not set(data) & set("<\u2028\u2029") and json.loads(data)["names"] == [name]


def test_diff_and_cut_and_merge(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("diff", recorded, recorded, "--json") == 0
    assert all(row["change_us"] == 0 for row in json.loads(capsys.readouterr().out))
    assert run("cut", recorded, tmp_path / "cut.json", "--to", 1000) == 0
    assert run("merge", recorded, tmp_path / "cut.json", "-o", tmp_path / "all.json") == 0
    assert run("check", tmp_path / "all.json") == 0


def test_errors_are_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("summary", tmp_path / "none.json") == 2
    (tmp_path / "text.json").write_text("no trace")
    assert run("summary", tmp_path / "text.json") == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_public_names() -> None:
    assert all(getattr(trace, name) is not None for name in trace.__all__)
    assert sorted(trace.__all__) == [
        "Event", "Rules", "Summary", "TraceFile", "check", "clock_offset", "cut", "instant",
        "is_recording", "merge", "record", "save", "span", "start", "stop", "summarize",
        "write_page",
    ]  # fmt: skip


KERNEL = {"ph": "X", "name": "k", "cat": "kernel", "ts": 0, "dur": 5, "pid": 1, "tid": 1}
BEGIN = {"ph": "B", "name": "b", "cat": "kernel", "ts": 1, "pid": 1, "tid": 1}
END = {"ph": "E", "ts": 3, "pid": 1, "tid": 1}
FOREIGN = {  # what other people's writers put into traces, and one sound kernel
    "args are a list": [{**KERNEL, "args": [1]}],
    "args are text": [{**KERNEL, "args": "x"}],
    "a name's args are text": [{"ph": "M", "name": "thread_name", "args": "x"}, KERNEL],
    "begin without a time": [{**BEGIN, "ts": None}, END, KERNEL],
    "end without a time": [BEGIN, {**END, "ts": None}, KERNEL],
    "lanes that are lists": [{**BEGIN, "pid": [1]}, {**END, "pid": [1]}, KERNEL],
    "times as text": [{**KERNEL, "ts": "0", "dur": "5"}],
    "times beyond reason": [{**KERNEL, "ts": 1e308, "dur": 1e308}, KERNEL],
    "an end before its begin": [{**BEGIN, "ts": 9}, END, KERNEL],
    "a negative duration": [{**KERNEL, "name": "gone", "ts": 100, "dur": -3}, KERNEL],
    "times that are none": [{**KERNEL, "ts": float("nan")}, {**KERNEL, "dur": {}}, KERNEL],
}


@pytest.mark.parametrize("events", FOREIGN.values(), ids=FOREIGN)
def test_foreign_events_are_left_out_not_stumbled_over(
    events: list[dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "t.json", tmp_path / "out.json"
    file.write_text(json.dumps({"traceEvents": events}))
    assert run("summary", file, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["span_us"] == 5
    assert all(kernel["total_us"] > 0 for kernel in found["kernels"])
    for command in (("overlap", file), ("html", file, out), ("cut", file, out, "--to", 4)):
        assert run(*command) == 0
    assert run("merge", file, file, "-o", out) == 0
    assert run("check", file) in (0, 1)


UNSOUND = {  # JSON of the time, of the duration, and the kind of fault
    "time NaN": ("NaN", "5", "time out of range"),
    "time 1e999": ("1e999", "5", "time out of range"),
    "time 1e300": ("1e300", "5", "time out of range"),
    "duration NaN": ("0", "NaN", "duration out of range"),
    "duration of 401 digits": ("0", "1" + "0" * 400, "duration out of range"),
    "time of 5000 digits": ("1" * 5000, "5", "damaged"),
    "duration negative": ("0", "-5", "negative duration"),
}


@pytest.mark.parametrize(("at", "took", "kind"), UNSOUND.values(), ids=UNSOUND)
def test_check_counts_what_summary_leaves_out(
    at: str, took: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "t.json"
    event = json.dumps({**KERNEL, "ts": "AT", "dur": "TOOK"})
    file.write_text(f"[{event}]".replace('"AT"', at).replace('"TOOK"', took))
    assert run("check", file, "--json") == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert (problem["kind"], problem["count"]) == (kind, 1)
    assert len(problem["example"]) < 400
    code = run("summary", file, "--json")
    said = capsys.readouterr()
    if kind == "damaged":
        assert code == 2
        assert said.err.count("\n") == 1
    else:
        assert json.loads(said.out)["kernels"] == []


def test_a_trace_without_work_says_what_would_be_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "t.json"
    file.write_text(json.dumps([{**KERNEL, "cat": "mine"}]))
    for command in ("summary", "overlap"):
        assert run(command, file) == 0
        assert "no work in this trace" in capsys.readouterr().out


def test_names_that_are_half_a_surrogate_pair_are_shown_as_escapes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file, page = tmp_path / "t.json", tmp_path / "t.html"
    file.write_text(json.dumps([{**KERNEL, "name": "\ud800x", "pid": "\udfff"}]))
    for command, *more in (("summary",), ("overlap",), ("html", page), ("diff", file)):
        assert run(command, file, *more) == 0
    said = capfd.readouterr().out
    assert "\\ud800x" in said and "device \\udfff" in said
    assert '"\\ud800x"' in page.read_text(encoding="utf-8")


def test_what_cannot_be_written_is_named_as_given(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("html", "cut"):
        for target in (tmp_path, Path("/")):
            assert run(command, recorded, target) == 2
            assert capsys.readouterr().err == f"IsADirectoryError: {target}: Is a directory\n"
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
