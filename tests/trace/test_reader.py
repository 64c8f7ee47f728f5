"""The reader: every form of the format, in bounded memory, and damage named."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from whalefall.errors import CorruptError, LimitError, MissingError
from whalefall.trace import TraceFile, check, reader, summarize

EVENTS = [
    {"ph": "X", "name": "a \"quoted\" } ] name", "ts": n, "dur": 1, "pid": 0, "tid": 0,
     "args": {"nested": [[1, {"x": "}]"}], None]}}
    for n in range(50)
]  # fmt: skip


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
def test_object_form_with_keys_on_both_sides(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "CHUNK", chunk)
    trace = {"schemaVersion": 1, "traceEvents": EVENTS, "traceName": "é", "number": 123456}
    file = TraceFile(write(tmp_path / "t.json", json.dumps(trace, indent=1, ensure_ascii=False)))
    # `CHUNK` is a default argument of `more`: set there too
    monkeypatch.setattr(reader._Text.more, "__defaults__", (chunk,))
    assert list(file) == EVENTS
    assert file.header == {"schemaVersion": 1, "traceName": "é", "number": 123456}


def test_bare_array_gzip_and_misnamed_gzip(tmp_path: Path) -> None:
    packed = gzip.compress(json.dumps(EVENTS).encode())
    for name in ("t.json.gz", "t.json"):
        (tmp_path / name).write_bytes(packed)
        assert list(TraceFile(tmp_path / name)) == EVENTS


def test_a_bare_array_may_lack_its_bracket(tmp_path: Path) -> None:
    file = TraceFile(write(tmp_path / "t.json", json.dumps(EVENTS)[:-1] + ","))
    assert list(file) == EVENTS
    assert file.truncated


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "ends early"),
        ("hello", "starts with 'h'"),
        ('{"a": 1}', "no traceEvents"),
        ('{"traceEvents": [{"ph": "X"', "ends early"),
        ('{"traceEvents": [{"ph": "X"}, 3]}', "event 1 of .* is int"),
        ('{"traceEvents": [{"ph": }]}', "event 0"),
        ("[" * 100000, "nests too deeply|is list"),
        ('{"traceEvents": [{"ph": "X"} {"ph": "X"}]}', None),
        ('{"traceEvents": [{"ph": "X"}, {"ph": "X"},]}', None),
        ('{"a": 1 "traceEvents": [{"ph": "X"}, {"ph": "X"}], }', None),
        ('{"traceEvents": [{"ph": "X"}; {"ph": "X"}]}', "has ';' after event 1"),
        ('{"traceEvents": [{"ph": "X"}]}xyz', "goes on with 'x' after its end"),
        ('{"traceEvents": []}{"traceEvents": []}', "goes on with '{' after its end"),
        ('[{"ph": "X"}]]', "goes on with ']' after its end"),
        ('{1: 2, "traceEvents": []}', "has the key 1; wanted text"),
    ],
)
def test_damage_is_one_clear_line(text: str, words: str | None, tmp_path: Path) -> None:
    file = TraceFile(write(tmp_path / "t.json", text))
    if words is None:  # a comma too few or too many is forgiven, but no sound trace
        assert len(list(file)) == 2
        assert any("comma" in kind for kind in check(file.path).problems)
        return
    assert check(file.path).problems.keys() & {"damaged", "no closing bracket"}
    with pytest.raises(CorruptError, match=words):
        list(file)


def test_truncated_gzip_says_so(tmp_path: Path) -> None:
    path = tmp_path / "t.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": EVENTS}).encode())[:-30])
    with pytest.raises(CorruptError):
        list(TraceFile(path))


def test_an_endless_event_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "LARGEST", 1 << 16)
    text = '{"traceEvents": [{"name": "' + "x" * (4 << 20)
    with pytest.raises(LimitError, match="entry of more than"):
        list(TraceFile(write(tmp_path / "t.json", text)))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no file"):
        TraceFile(tmp_path / "none.json")


GROWN = """
import resource, sys
import numpy
from whalefall.trace import summarize
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
summarize(sys.argv[1])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def grown_bytes(path: Path) -> int:
    """How much a process's memory grows while it summarizes `path`."""
    command = [sys.executable, "-c", GROWN, str(path)]
    return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def test_large_traces_stream_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "big.json"
    kernel = {
        "ph": "X", "cat": "kernel", "name": "void gemm_kernel<256, 128>(float*, int)", "pid": 0,
        "tid": 7, "ts": 0, "dur": 9, "args": {"device": 0, "stream": 7, "grid": [132, 1, 1],
        "block": [128, 1, 1], "registers per thread": 168, "correlation": 44479},
    }  # fmt: skip
    line = "  " + json.dumps(kernel)
    with path.open("w") as file:
        file.write('{"schemaVersion": 1,\n"traceEvents": [\n')
        for n in range(50_000):
            file.write(line.replace('"ts": 0', f'"ts": {n * 10}') + (",\n" if n < 49_999 else ""))
        file.write("]}")
    size = path.stat().st_size
    found = summarize(path)
    assert found.streams[0].kernels == 50_000
    assert found.streams[0].busy_us == 450_000
    assert grown_bytes(path) < 0.6 * size


def test_check_finds_each_fault(tmp_path: Path) -> None:
    events = [
        {"ph": "X", "name": "ok", "ts": 0, "dur": 1, "pid": 0, "tid": 0},
        {"ph": "X", "name": "back", "ts": 0, "dur": -1, "pid": 0, "tid": 0},
        {"ph": "X", "name": "no dur", "ts": 0, "pid": 0, "tid": 0},
        {"ph": "X", "name": "no ts", "dur": 1, "pid": 0, "tid": 0},
        {"ph": "B", "name": "open", "ts": 0, "pid": 0, "tid": 1},
        {"ph": "E", "name": "closed", "ts": 0, "pid": 0, "tid": 2},
        {"ph": "B", "name": "a", "ts": 0, "pid": 0, "tid": 3},
        {"ph": "E", "name": "b", "ts": 1, "pid": 0, "tid": 3},
        {"ph": "?", "name": "odd", "ts": 0},
        {"ph": "X", "name": "no lane", "ts": 0, "dur": 1},
    ]
    report = check(write(tmp_path / "t.json", json.dumps({"traceEvents": events})))
    assert set(report.problems) == {
        "negative duration", "no duration", "no time", "begin without end", "end without begin",
        "begin and end differ", "unknown phase", "no lane",
    }  # fmt: skip
    sound = check(write(tmp_path / "s.json", json.dumps({"traceEvents": events[:1]})))
    assert sound.problems == {}
    cut = check(write(tmp_path / "c.json", json.dumps({"traceEvents": events})[:200]))
    assert "damaged" in cut.problems
