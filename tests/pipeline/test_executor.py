"""The executor: order, what it records, and the inference schedules it runs."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from whalefall import trace
from whalefall.errors import ConfigError
from whalefall.pipeline import (
    Action,
    Task,
    decode_overlap,
    execute,
    make,
    prefill_overlap,
    simulate,
)
from whalefall.pipeline.actions import Schedule
from whalefall.pipeline.simulator import Times
from whalefall.trace import recorder

PARTS = {
    "ATTN": 3.0, "ATTN-0": 1.0, "ATTN-1": 2.0, "SHARED": 1.0, "MLP": 3.0, "DISPATCH": 2.0,
    "COMBINE": 2.0,
}  # fmt: skip


class Layers:
    """Checks, as a model would, that each part finds what it needs."""

    def __init__(self, decode: bool) -> None:
        self.done: set[tuple[str, int, int]] = set()
        self.attention = ("ATTN-0", "ATTN-1") if decode else ("ATTN",)

    def needs(self, kind: str, layer: int, batch: int) -> list[tuple[str, int, int]]:
        before = [("COMBINE", layer - 1, batch), ("SHARED", layer - 1, batch)] if layer else []
        last = (self.attention[-1], layer, batch)
        return {
            "ATTN": before, "ATTN-0": before, "ATTN-1": [("ATTN-0", layer, batch)],
            "SHARED": [last], "DISPATCH": [last], "MLP": [("DISPATCH", layer, batch)],
            "COMBINE": [("MLP", layer, batch)],
        }[kind]  # fmt: skip

    def check(self, action: Action) -> None:
        layer, batch = action.task
        missing = set(self.needs(action.kind, layer, batch)) - self.done
        assert not missing, f"{action} lacks {missing}"

    def run(self, action: Action) -> None:
        self.check(action)
        self.done.add((action.kind, *action.task))

    def begin(self, action: Action) -> Callable[[], None]:
        self.check(action)
        return lambda: self.done.add((action.kind, *action.task))


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("decode", [False, True])
def test_overlap_schedules_give_each_part_what_it_needs(layers: int, decode: bool) -> None:
    worker = Layers(decode)
    execute((decode_overlap if decode else prefill_overlap)(layers), worker)
    per_layer = 6 if decode else 5
    # prefill: ATTN SHARED MLP DISPATCH COMBINE; decode has two attention parts
    assert len(worker.done) == 2 * layers * per_layer


def test_the_prefill_order_is_the_published_one() -> None:
    middle = [a for a in prefill_overlap(3) if 1 <= a.task.stage <= 2]
    text = " ".join(f"{a.kind}({a.task.chunk})" for a in middle if a.phase == "run")
    assert "ATTN(1) SHARED(0) ATTN(0) MLP(1) MLP(0) SHARED(1)" in text
    text = " ".join(f"{a.kind}({a.task.chunk})" for a in middle if a.phase == "begin")
    assert "COMBINE(0) DISPATCH(1) DISPATCH(0) COMBINE(1)" in text


@pytest.mark.parametrize("order", [prefill_overlap, decode_overlap])
def test_communication_hides_under_compute(order: Callable) -> None:
    layers = 8
    schedule = Schedule("overlap", layers, 2, ((0,) * layers,), (order(layers),))
    result = simulate(schedule, Times(parts=PARTS))
    communication = 2 * layers * (PARTS["DISPATCH"] + PARTS["COMBINE"])
    assert sum(result.idle) < 0.15 * communication


class Timed:
    """Computes 15 ms and communicates 6 ms at a time, by a clock of its own."""

    def __init__(self) -> None:
        self.now = 1_000_000_000

    def run(self, action: Action) -> None:
        self.now += 15_000_000

    def begin(self, action: Action) -> Callable[[], tuple[int, int]]:
        start, end = self.now, self.now + 6_000_000

        def wait() -> tuple[int, int]:
            self.now = max(self.now, end)
            return start, end

        return wait


def test_the_trace_shows_the_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Timed()
    monkeypatch.setattr(time, "perf_counter_ns", lambda: worker.now)
    monkeypatch.setattr(recorder, "_now", lambda: worker.now)
    trace.start()
    execute(decode_overlap(4), worker)
    events = trace.stop()
    found = trace.summarize(
        {"ph": "X", "cat": e.category, "name": e.name, "ts": e.start_ns / 1e3,
         "dur": e.duration_ns / 1e3, "pid": 0, "tid": e.track}
        for e in events
    )  # fmt: skip
    # 16 communications of 6 ms; the last one of all has no compute beside it
    assert found.overlap_ratio == pytest.approx(15 / 16)
    assert {"DISPATCH0.0", "COMBINE1.3"} <= {kernel.name for kernel in found.kernels}


def test_a_wait_without_a_beginning_is_refused() -> None:
    with pytest.raises(ConfigError, match="never begun"):
        execute([Action("RECV_F", Task(1, 0), "wait", 0)], Timed())


def test_schedules_and_executor_need_no_torch() -> None:
    code = (
        "import sys\nfrom whalefall import pipeline\npipeline.simulate(pipeline.make('1f1b', 2, 4))"
        "\nprint([n for n in ('torch', 'drawsvg') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class Factors:
    """Torch-free stages that multiply by 2 and add the stage, with queues between threads."""

    def __init__(self, schedule: Schedule, rank: int, boxes: dict) -> None:
        self.schedule, self.rank, self.boxes = schedule, rank, boxes
        self.values: dict[tuple, float] = {}
        self.results: dict[int, float] = {}

    def run(self, action: Action) -> None:
        for kind, task in action.parts():
            if kind != "F":
                continue
            x = self.values.get(("in", task), float(task.chunk)) if task.stage == 0 else None
            if x is None:
                x = self.values.get(("in", task), self.values.get(("out", task)))
            y = 2 * x + task.stage
            self.values["out", Task(task.stage + 1, task.chunk)] = y
            if task.stage == self.schedule.num_stages - 1:
                self.results[task.chunk] = y

    def begin(self, action: Action) -> Callable[[], None]:
        key = (action.kind[-1], action.task)
        if action.kind == "SEND_F":
            self.boxes[key][1] = self.values["out", action.task]
            self.boxes[key][0].set()
        elif action.kind == "RECV_F":
            box = self.boxes[key]

            def wait() -> None:
                assert box[0].wait(10)
                self.values["in", action.task] = box[1]

            return wait
        return lambda: None


@pytest.mark.parametrize(("name", "ranks"), [("dualpipe", 4), ("dualpipev", 3), ("zb1p", 3)])
def test_threads_without_torch_compute_every_chunk(name: str, ranks: int) -> None:
    schedule = make(name, ranks, 2 * ranks + 2)
    boxes = {
        ("F", Task(stage, chunk)): [threading.Event(), None]
        for stage in range(schedule.num_stages)
        for chunk in range(schedule.num_chunks)
    }
    workers = [Factors(schedule, rank, boxes) for rank in range(ranks)]
    threads = [
        threading.Thread(target=execute, args=(schedule.ranks[rank], worker))
        for rank, worker in enumerate(workers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    results = {chunk: value for worker in workers for chunk, value in worker.results.items()}
    wanted = {}
    for chunk in range(schedule.num_chunks):
        x = float(chunk)
        for stage in range(schedule.num_stages):
            x = 2 * x + stage
        wanted[chunk] = x
    assert results == wanted
