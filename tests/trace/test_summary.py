"""The summary, against counting microseconds one by one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whalefall.errors import ConfigError
from whalefall.trace import Rules, summarize


def kernel(name: str, start: int, took: int, stream: int = 7, device: int = 0) -> dict[str, Any]:
    return {
        "ph": "X", "cat": "kernel", "name": name, "pid": device, "tid": stream, "ts": start,
        "dur": took, "args": {"device": device, "stream": stream},
    }  # fmt: skip


def test_a_hand_made_trace() -> None:
    found = summarize(
        [
            kernel("gemm", 0, 100),
            kernel("combine", 50, 100, stream=27),
            kernel("gemm", 200, 10),
            kernel("dispatch", 0, 30, stream=27, device=1),
            {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "pid": 9, "tid": 9, "ts": 0, "dur": 5},
            {"ph": "X", "cat": "user_annotation", "name": "ProfilerStep#3", "ts": 0, "dur": 250},
            {"ph": "X", "cat": "user_annotation", "name": "ProfilerStep#4", "ts": 250, "dur": 150},
        ]
    ).as_dict()
    streams = {s["id"]: (s["kernels"], s["busy_us"], s["span_us"]) for s in found["streams"]}
    assert streams == {"0/7": (2, 110, 210), "0/27": (1, 100, 100), "1/27": (1, 30, 30)}
    # device 1's communication has no compute beside it: devices do not hide each other's
    assert (found["compute_us"], found["communication_us"]) == (110, 130)
    assert (found["overlapped_us"], found["overlap_ratio"]) == (50, 50 / 130)
    top = {k["name"]: (k["count"], k["total_us"]) for k in found["kernels"]}
    assert top == {"gemm": (2, 110), "combine": (1, 100), "dispatch": (1, 30)}
    assert found["span_us"] == 210
    assert found["gaps"][0] == {"stream": "0/7", "start_us": 100, "duration_us": 100}
    assert found["steps"]["ProfilerStep#"]["count"] == 2
    assert found["steps"]["ProfilerStep#"]["mean_us"] == 200


spans = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12)), max_size=25)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(spans, spans)
def test_overlap_equals_counting_microseconds(
    compute: list[tuple[int, int]], communication: list[tuple[int, int]]
) -> None:
    found = summarize(
        [kernel("gemm", *s) for s in compute] + [kernel("nccl", *s, 9) for s in communication]
    )
    busy = [{t for start, took in side for t in range(start, start + took)}
            for side in (compute, communication)]  # fmt: skip
    assert found.compute_us == len(busy[0])
    assert found.communication_us == len(busy[1])
    assert found.overlapped_us == len(busy[0] & busy[1])


def test_begin_and_end_count_like_complete_events() -> None:
    lane = {"pid": 0, "tid": 0, "cat": "compute"}
    found = summarize(
        [
            {"ph": "B", "name": "outer", "ts": 0, **lane},
            {"ph": "B", "name": "inner", "ts": 2, **lane},
            {"ph": "E", "ts": 5, **lane},
            {"ph": "E", "ts": 10, **lane},
        ]
    )
    assert found.compute_us == 10
    assert {k.name: k.total_us for k in found.kernels} == {"inner": 3, "outer": 10}


def test_without_device_events_host_work_counts() -> None:
    op = {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "pid": 1, "tid": 1, "ts": 0, "dur": 5}
    send = {**op, "name": "gloo:send", "tid": 2, "ts": 3}
    found = summarize([op, send])
    assert (found.compute_us, found.communication_us, found.overlapped_us) == (5, 5, 2)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ncclDevKernel_SendRecv(ncclDevKernelArgs)", "communication"),
        ("void deep_ep::internode::combine<false>(int4*)", "communication"),
        ("Memcpy DtoD (Device -> Device)", "communication"),
        ("Memset (Device)", "other"),
        ("void cutlass::device_kernel<GemmKernel>(Params)", "compute"),
    ],
)
def test_names_are_told_apart(name: str, kind: str) -> None:
    assert Rules().kind("kernel", name) == kind


def test_rules_can_be_replaced() -> None:
    rules = Rules((("gemm", "communication"),))
    assert summarize([kernel("my_GEMM", 0, 5)], rules).communication_us == 5
    with pytest.raises(ConfigError, match="kind 'fast'"):
        Rules((("gemm", "fast"),))
    with pytest.raises(ConfigError, match="no regular expression"):
        Rules((("(", "compute"),))


def test_an_empty_trace_is_zero() -> None:
    found = summarize([])
    assert (found.span_us, found.overlap_ratio, found.streams) == (0.0, 0.0, [])
