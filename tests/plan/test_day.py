"""The published day: computed and cited figures apart, each what-if moves its own line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whalefall import plan
from whalefall.errors import ConfigError
from whalefall.plan import published
from whalefall.plan.fleet import Fleet
from whalefall.plan.ledger import night_share, nodes_from_rates
from whalefall.plan.training import TrainingRun


def command(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "whalefall", "plan", *args],
        capture_output=True,
        text=True,
        check=False,
    )


def day(*args: str) -> dict[str, Any]:
    done = command("day", "--json", *args)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_the_published_day_comes_out() -> None:
    report = day()
    assert report["cost"] == 87072.00
    assert report["revenue"]["total"] == 562100
    assert report["nodes"] == {"peak": 278, "average": 226.75}
    assert report["nodes_from_rates"] == 226.86
    assert report["node_hours"] == 5442
    assert report["cited"]["revenue"] == 562027
    assert report["margin"] == pytest.approx(5.4556, abs=1e-4)


@pytest.mark.parametrize("kind", ["hit", "miss", "output"])
def test_doubling_a_price_doubles_its_line_alone(kind: str) -> None:
    base = day()
    twice = day(f"--price-{kind}", str(2 * base["prices"][kind]))
    for line in ("hit", "miss", "output"):
        factor = 2 if line == kind else 1
        assert twice["revenue"][line] == pytest.approx(factor * base["revenue"][line])
    assert twice["cited"] == base["cited"]


def test_the_night_window_holds_its_node_hours() -> None:
    fleet = plan.published_fleet()
    by_hand = (
        218 * 0.75 + 188 * 0.75 + 158 * 0.75 + 128 * 0.25 + 98 * 0.5 + 68 * 3
        + 98 * 0.5 + 128 * 0.5 + 188 * 0.5 + 218 * 0.5
    )  # fmt: skip
    assert night_share(fleet) == pytest.approx(by_hand / 5442)


def test_what_the_publishers_left_out_lowers_revenue() -> None:
    case = plan.WhatIf(v3_share=1.0)
    result = plan.ledger(plan.Traffic(), plan.Prices(), 1.0, case)
    assert result.revenue == pytest.approx(342e3 * 0.07 + 266e3 * 0.27 + 168e3 * 1.10)
    half_free = plan.ledger(plan.Traffic(), plan.Prices(), 1.0, plan.WhatIf(free_share=0.5))
    assert half_free.revenue == pytest.approx(562100 / 2)
    night = plan.WhatIf(night_discount=0.75, night_share=0.2)
    assert plan.ledger(plan.Traffic(), plan.Prices(), 1.0, night).revenue == pytest.approx(
        562100 * 0.85
    )


def test_the_published_revenue_in_yuan_needs_its_rate() -> None:
    done = command("day", "--currency", "¥", "--rate", "7.28")
    assert "¥4,090,000" in done.stdout
    assert "¥4,092,088" in done.stdout  # 562,100 x 7.28
    assert command("day", "--currency", "¥").returncode == 2
    assert "$87,072" in done.stdout  # the published cost is not converted
    done = command("day", "--rate", "7.28")
    assert done.returncode == 2 and "--rate 7.28 needs a --currency" in done.stderr


def test_a_chart_is_written(tmp_path: Path) -> None:
    path = tmp_path / "day.svg"
    day("--svg", str(path))
    text = path.read_text(encoding="utf-8")
    assert "<svg" in text
    assert "https://" not in text.replace("http://www.w3.org", "").replace("https://www.w3.org", "")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--hit-tokens", "1e15"), "wanted 0 <= hits <= input"),
        (("--nodes", "-3"), "--nodes is -3"),
        (("--gpus", "0"), "--gpus is 0"),
        (("--rate", "0"), "--rate is 0"),
        (("--rate", "inf"), "--rate is inf"),
        (("--rate", "nan"), "--rate is nan"),
    ],
)
def test_absurd_values_get_one_line(args: tuple[str, ...], words: str) -> None:
    done = command("day", *args)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


STEPS = st.lists(
    st.tuples(st.floats(0.01, 23.9), st.integers(0, 500)),
    max_size=8,
    unique_by=lambda step: step[0],
)


@given(STEPS, st.integers(0, 500))
def test_node_hours_add_up_over_any_cut(steps: list[tuple[float, int]], first: int) -> None:
    fleet = plan.Fleet(((0.0, first), *sorted(steps)))
    cut = 11.37
    parts = fleet.node_hours((0.0, cut)) + fleet.node_hours((cut, 24.0))
    assert fleet.node_hours() == pytest.approx(parts)
    assert min(n for _, n in fleet.steps) <= fleet.average_nodes + 1e-9
    assert fleet.average_nodes <= fleet.peak_nodes + 1e-9


def test_a_fleet_must_cover_its_day() -> None:
    with pytest.raises(ConfigError, match="wanted the first at 0"):
        plan.Fleet(((1.0, 5),))
    with pytest.raises(ConfigError, match="do not rise"):
        plan.Fleet(((0.0, 5), (3.0, 1), (3.0, 2)))


def test_nodes_from_rates_is_linear_in_tokens() -> None:
    double = plan.Traffic(
        2 * published.INPUT_TOKENS, published.HIT_TOKENS, 2 * published.OUTPUT_TOKENS
    )
    assert nodes_from_rates(double) == pytest.approx(2 * nodes_from_rates(plan.Traffic()))


def test_the_room_exports_what_it_says() -> None:
    wanted = "Fleet Ledger Prices Traffic WhatIf ledger published_fleet"
    assert plan.__all__ == wanted.split()


def test_live_without_a_server_is_one_line() -> None:
    done = command("live", "http://127.0.0.1:9")
    assert done.returncode == 2
    assert done.stderr.startswith("MissingError: plan live: http://127.0.0.1:9/metrics")


def test_all_money_of_a_live_ledger_is_printed_as_money() -> None:
    from whalefall.plan.live import live_rows

    report = {"revenue_hit_dollars": 0.025, "revenue_dollars": 0.265, "output_tokens": 1200.0}
    assert live_rows(report) == [
        ("revenue hit", "$0.025000"),
        ("revenue", "$0.265000"),
        ("output tokens", "1,200"),
    ]


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_the_parts_refuse_absurd_values_too(bad: float) -> None:
    makers: list[Callable[[], object]] = [
        lambda: plan.Prices(hit=bad),
        lambda: plan.Traffic(output_tokens=bad),
        lambda: plan.Traffic(input_tokens=bad),
        lambda: plan.WhatIf(free_share=bad),
        lambda: Fleet(((0.0, bad),)),
        lambda: Fleet(((0.0, 1.0),), gpu_hour=bad),
        lambda: TrainingRun(gpu_hour=bad),
        lambda: TrainingRun(other_hours=bad),
        lambda: TrainingRun(tokens=bad),
    ]
    for make in makers:
        with pytest.raises(ConfigError):
            make()
