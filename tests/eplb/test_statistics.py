"""Online statistics and traffic, against sums written out."""

from __future__ import annotations

import numpy as np
import pytest

from whalefall import eplb
from whalefall.errors import ConfigError, ShapeError, WhalefallError

HOUR_S = 3600.0


def test_count_experts_skips_choices_not_made() -> None:
    assert eplb.count_experts([[0, 2], [2, -1]], 4).tolist() == [1, 0, 2, 0]


def test_moving_average_halves_after_its_half_life() -> None:
    average = eplb.MovingAverage(1, 2, half_life=4)
    average.update([[8, 0]])
    for _ in range(4):
        average.update([[0, 8]])
    keep = 0.5 ** (np.arange(5) / 4)
    assert average.loads()[0, 0] == pytest.approx(8 * keep[4] / keep.sum(), rel=1e-5)
    assert average.loads().sum() == pytest.approx(8, rel=1e-5)


def test_window_forgets_what_is_older_than_its_size() -> None:
    window = eplb.Window(1, 1, size=8, buckets=4)
    for _ in range(8):
        window.update([[100]])
    for _ in range(8):
        window.update([[2]])
    assert window.loads()[0, 0] == pytest.approx(2)


def test_day_forecast_knows_the_same_hour_of_yesterday() -> None:
    forecast = eplb.DayForecast(1, 2)
    for hour in range(24):
        forecast.update([[10, 0]] if hour < 12 else [[0, 10]], time_s=(hour + 0.5) * HOUR_S)
    tomorrow = 24 * HOUR_S
    assert forecast.loads(tomorrow + 6.5 * HOUR_S).tolist() == [[10, 0]]
    assert forecast.loads(tomorrow + 12 * HOUR_S).tolist() == [[5, 5]]


def test_nothing_seen_is_zero() -> None:
    assert eplb.MovingAverage(2, 3).loads().tolist() == [[0] * 3] * 2
    assert eplb.Window(2, 3).loads().sum() == 0
    assert eplb.DayForecast(2, 3).loads(0.0).sum() == 0


def test_memory_is_a_few_bytes_per_expert() -> None:
    assert eplb.MovingAverage(58, 256).bytes_per_expert == 4
    assert eplb.Window(58, 256, buckets=8).bytes_per_expert < 33
    assert eplb.DayForecast(58, 256).bytes_per_expert < 97


def test_bad_sizes_say_so() -> None:
    with pytest.raises(ShapeError, match="wanted \\(2, 3\\)"):
        eplb.Window(2, 3).update([[1]])
    with pytest.raises(ConfigError, match="half_life is 0"):
        eplb.MovingAverage(2, 3, half_life=0)
    with pytest.raises(ConfigError, match="2 steps in 4 buckets"):
        eplb.Window(2, 3, size=2, buckets=4)


def test_traffic_counts_a_token_once_per_node() -> None:
    phy2log = [0, 1, 2, 3, 4, 5, 6, 7]  # 2 nodes: experts 0 … 3 and 4 … 7
    topk = [[0, 4, 5], [1, 2, -1], [4, 5, 6]]
    traffic = eplb.count_traffic(topk, [0, 0, 0], phy2log, 2, bytes_per_token=100)
    assert traffic.sends.tolist() == [[0, 2], [0, 0]]
    assert traffic.bytes_out.tolist() == [200, 0]
    assert traffic.nodes_per_token == pytest.approx((2 + 1 + 1) / 3)


def test_a_replica_at_home_saves_the_crossing() -> None:
    assert eplb.count_traffic([[1]], [0], [0, 1, 1, 2], 2, 8).sends.sum() == 0
    assert eplb.count_traffic([[2]], [0], [0, 1, 1, 2], 2, 8).sends.sum() == 1


def test_traffic_of_an_expert_nowhere_says_so() -> None:
    with pytest.raises(ShapeError, match="no slot"):
        eplb.count_traffic([[5]], [0], [0, 1, 2, 3], 2, 8)


GOOD = np.ones((2, 4))
SLOTS = np.tile(np.arange(4), (2, 1))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: eplb.MovingAverage(2, 4).update(GOOD * np.nan), "layer 0, expert 0 is nan"),
        (lambda: eplb.Window(2, 4).update(-GOOD), "layer 0, expert 0 is -1.0"),
        (lambda: eplb.DayForecast(2, 4).update(GOOD, float("nan")), "time_s is nan"),
        (lambda: eplb.DayForecast(2, 4).loads("noon"), "time_s is 'noon'"),
        (lambda: eplb.MovingAverage(2, 4, half_life=float("inf")), "half_life is inf"),
        (lambda: eplb.Window(2.0, 4), "num_layers is 2.0"),
        (
            lambda: eplb.Window(2, 4, size=1 << 70),
            "size is 1180591620717411303424; it must be at most",
        ),
        (lambda: eplb.count_experts([[0, 4]], 4), "topk_idx are 0 … 4; give -1 … 3"),
        (lambda: eplb.count_experts([[0.5]], 4), "topk_idx have dtype float64"),
        (lambda: eplb.gpu_loads(GOOD, SLOTS - 1, 2), "phy2log are -1 … 2; give 0 … 3"),
        (
            lambda: eplb.gpu_loads(GOOD, SLOTS, 3),
            r"phy2log has shape \(2, 4\); give .2, a mult",
        ),
        (lambda: eplb.gpu_loads(GOOD, SLOTS, 2, share=-GOOD), "is -1.0"),
        (lambda: eplb.count_traffic([[0]], [2], [0, 1], 2, 10), "token_node are 2 … 2; give 0 … 1"),
        (lambda: eplb.count_traffic([[0]], [0], [0, 1], 0, 10), "0 nodes"),
    ],
)
def test_what_would_spoil_the_counts_is_refused_in_one_line(call, words: str) -> None:
    with pytest.raises(WhalefallError, match=words) as refused:
        call()
    assert "\n" not in str(refused.value)
