"""The units' experts: ranks' loads are judged together; `test_expert_balance` has the rule."""

import numpy as np
import pytest

from whalefall.model import load_config
from whalefall.serve.core import ExpertRule, Place, imbalance
from whalefall.serve.units import Layout, UnitsConfig
from whalefall.serve.units.experts import ExpertBalancer

ONE = Layout(1, 1, 2)


def balancer(model: str, max_moves: int = 2) -> ExpertBalancer:
    rule = ExpertRule(interval_s=1.0, max_moves=max_moves)
    made = ExpertBalancer(UnitsConfig(ONE, ONE, {}, experts=rule))
    made.unit_up("decode-0", 2, load_config(model))
    return made


def see(b: ExpertBalancer, loads: np.ndarray) -> None:
    """Both ranks' selections so far: [MoE layers, experts], the dense layer before them zero."""
    whole = np.concatenate([np.zeros((1, loads.shape[1]), np.int64), loads])
    for rank in range(2):
        b.see(Place("decode-0", rank), whole // 2)


def skewed(b: ExpertBalancer) -> np.ndarray:
    """Four hot experts, all of which are on rank 0 at first."""
    loads = np.full((2, 12), 100)
    for row, held in zip(loads, b.units["decode-0"].placement.phy2log, strict=True):
        row[held[:4]] = 9000
    return loads


def test_a_skewed_load_is_balanced_with_few_moves(model) -> None:
    b = balancer(model, max_moves=4)
    loads = skewed(b)
    see(b, loads)
    ((name, placed),) = b.look(10.0)
    unit = b.units["decode-0"]
    assert name == "decode-0" and placed.version == 1
    assert unit.before > 1.5 and unit.after < 1.2
    assert 0 < unit.moves <= 2 * 4
    assert imbalance(loads, unit.placement) == pytest.approx(unit.after)


def test_an_even_load_stays_where_it_is(model) -> None:
    b = balancer(model)
    see(b, np.full((2, 12), 5000))
    assert b.look(10.0) == []
    assert b.units["decode-0"].now == pytest.approx(1.0)


def test_one_rank_alone_says_nothing_yet(model) -> None:
    b = balancer(model)
    b.see(Place("decode-0", 0), np.concatenate([np.zeros((1, 12), int), skewed(b)]))
    assert b.look(10.0) == []


def test_what_a_lost_unit_chose_stays_in_the_total(model) -> None:
    b = balancer(model)
    see(b, skewed(b))
    before = b.total()
    b.unit_down("decode-0")
    assert before is not None and (b.total() == before).all()
