"""The expert balancer, once as the server drives it and once as the simulator does: each term of
its rule shows in both."""

from __future__ import annotations

import numpy as np
import pytest

from whalefall.errors import ConfigError
from whalefall.model import load_config
from whalefall.serve.core import ExpertBalance, ExpertRule, Place
from whalefall.serve.simulate import Cluster
from whalefall.serve.simulated_cluster import ClusterSpec, Day
from whalefall.serve.simulated_experts import ExpertsSpec
from whalefall.serve.units import Layout, UnitsConfig
from whalefall.serve.units.experts import ExpertBalancer

EXPERTS, LAYERS = 12, 2  # of the test model: two ranks of six experts a layer
PAIR = Layout(1, 1, 2)


class Server:
    """A unit of two ranks, which report."""

    def __init__(self, model: str, rule: ExpertRule) -> None:
        self.experts = ExpertBalancer(UnitsConfig(PAIR, PAIR, {}, experts=rule))
        self.experts.unit_up("decode-0", 2, load_config(model))
        self.balance: ExpertBalance = self.experts.units["decode-0"]
        self.total = np.zeros((1 + LAYERS, EXPERTS), np.int64)  # a dense layer comes first

    def see(self, loads: np.ndarray) -> None:
        self.total[1:] += np.asarray(loads, np.int64)
        for rank, part in enumerate((self.total // 3, self.total - self.total // 3)):
            self.experts.see(Place("decode-0", rank), part)

    def look(self, now_s: float) -> bool:
        return [placed.version for _, placed in self.experts.look(now_s)] == [self.balance.version]


class Simulator:
    """A prefill unit of two ranks, whose requests have a topic for each expert."""

    def __init__(self, _: str, rule: ExpertRule) -> None:
        experts = ExpertsSpec(EXPERTS, 1, 0, 2, 2, layers=LAYERS, topics=EXPERTS, rule=rule)
        spec = ClusterSpec(1, 1, 1e6, lambda batch: 0.05, 10, 1e3, 1e6, 1e6, experts=experts)
        self.cluster = Cluster(spec, Day((1.0,), 1e9, 0.0, 1e8), 0)
        assert self.cluster.choices is not None
        self.cluster.choices.taste = np.eye(EXPERTS)[:, None, :].repeat(LAYERS, 1)
        self.experts = self.cluster.prefill[0].experts
        assert self.experts is not None
        self.balance: ExpertBalance = self.experts.balance

    def see(self, loads: np.ndarray) -> None:
        for topic, tokens in enumerate(loads):
            self.experts.see(topic, tokens)

    def look(self, now_s: float) -> bool:
        before = self.balance.version
        self.cluster.balance_experts(now_s)
        return self.balance.version > before


@pytest.fixture(params=[Server, Simulator], ids=["server", "simulator"])
def watched(request, model):
    """A function that gives a balancer's driver for a rule."""
    return lambda **rule: request.param(model, ExpertRule(**rule))


def load(unit, share: float, sum_: int = 120_000) -> np.ndarray:
    """Selections of which the first rank, as placed at first, gets a share; its experts alike."""
    loads = np.full(EXPERTS, (1 - share) * sum_ / 6)
    loads[unit.balance.placement.phy2log[0, :6]] = share * sum_ / 6
    return np.rint(loads).astype(np.int64)


def test_a_look_is_due_only_after_its_interval(watched) -> None:
    unit = watched(interval_s=1.0)
    unit.see(load(unit, 0.9))
    assert unit.look(10.0)
    unit.see(load(unit, 0.9))
    assert not unit.look(10.9)
    assert unit.look(11.1)


@pytest.mark.parametrize(("a_slot", "acts"), [(63, False), (65, True)])
def test_few_selections_are_no_reason_and_wait_for_more(watched, a_slot: int, acts: bool) -> None:
    unit = watched(min_selections=64.0)
    unit.see(load(unit, 0.9, sum_=a_slot * EXPERTS))
    assert unit.look(10.0) == acts
    unit.see(load(unit, 0.9, sum_=12 * EXPERTS))
    assert acts or unit.look(30.0)


@pytest.mark.parametrize(("share", "acts"), [(0.62, False), (0.63, True)])
def test_an_uneven_load_is_a_reason_once_mean_over_largest_is_below_the_rule(
    watched, share: float, acts: bool
) -> None:
    unit = watched(balance=0.8)  # 0.5 / 0.62 is above, 0.5 / 0.63 below
    unit.see(load(unit, share))
    assert unit.look(10.0) == acts
    assert unit.balance.now == pytest.approx(2 * share, rel=1e-3)


def test_each_look_adds_what_is_new_and_old_looks_fade(watched) -> None:
    unit = watched(balance=0.1, half_life=2.0, interval_s=1.0)
    first, second = load(unit, 0.9), load(unit, 0.3)
    unit.see(first)
    unit.look(10.0)
    unit.see(second)
    unit.look(20.0)
    kept = 0.5**0.5
    wanted = (kept * first + second) / (kept + 1)
    np.testing.assert_allclose(unit.balance.weight, [wanted] * LAYERS, rtol=1e-5)


@pytest.mark.parametrize("moves", [2, 4])
def test_no_more_experts_move_than_the_rule_allows(watched, moves: int) -> None:
    unit = watched(max_moves=moves)
    unit.see(load(unit, 1.0))
    assert unit.look(10.0)
    assert unit.balance.moves == LAYERS * moves


def test_moves_go_on_until_a_tenth_above_the_rule_and_no_further(watched) -> None:
    unit = watched(balance=0.6, max_moves=12)
    unit.see(load(unit, 0.9))
    assert unit.look(10.0)
    # swaps of a hot with a cold expert: 0.9, 0.767, 0.633 of the load; 0.5 / 0.633 is above 0.7
    assert unit.balance.before == pytest.approx(1.8, rel=1e-3)
    assert unit.balance.after == pytest.approx(1.267, rel=1e-3)


def test_a_placement_that_is_no_better_is_not_taken(watched) -> None:
    unit = watched(max_moves=0)
    unit.see(load(unit, 0.9))
    assert not unit.look(10.0)
    assert unit.balance.version == 0


@pytest.mark.parametrize(
    "rule",
    [{"balance": 0.0}, {"balance": 1.5}, {"balance": float("nan")}, {"max_moves": -1},
     {"interval_s": float("inf")}],
)  # fmt: skip
def test_a_rule_that_makes_no_sense_is_refused(rule: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="expert balancer"):
        ExpertRule(**rule)  # type: ignore[arg-type]
