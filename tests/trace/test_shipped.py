"""The three traces in docs/traces: whole, small, and in the published orders (`make traces`)."""

from pathlib import Path

import pytest

from whalefall import trace
from whalefall.pipeline import decode_overlap, prefill_overlap

FOLDER = Path(__file__).parents[2] / "docs" / "traces"
LAYERS = 4


@pytest.mark.parametrize("kind", ["train", "prefill", "decode"])
def test_a_shipped_trace_is_small_sound_and_has_both_kinds_of_work(kind) -> None:
    path = FOLDER / f"{kind}.json.gz"
    assert path.stat().st_size < 100_000
    assert not trace.check(path).problems
    found = trace.summarize(path)
    assert found.compute_us > 0 and found.communication_us > 0
    assert 0.05 < found.overlap_ratio <= 1
    assert {"ep.dispatch", "ep.combine"} <= {kernel.name for kernel in found.kernels}


@pytest.mark.parametrize(
    ("kind", "schedule"), [("prefill", prefill_overlap), ("decode", decode_overlap)]
)
def test_a_serving_step_has_the_schedules_order_on_every_rank(kind, schedule) -> None:
    wanted = [str(action) for action in schedule(LAYERS) if action.phase == "run"]
    events = [e for e in trace.TraceFile(FOLDER / f"{kind}.json.gz") if e.get("cat") == "compute"]
    for rank in {event["pid"] for event in events}:
        mine = sorted((e for e in events if e["pid"] == rank), key=lambda e: float(e["ts"]))
        assert [event["name"] for event in mine] == wanted
