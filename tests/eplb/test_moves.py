"""From one placement to the next with few moves, and unequal shares between replicas."""

from __future__ import annotations

import numpy as np
import pytest

from whalefall import eplb
from whalefall.errors import ConfigError, ShapeError

SIZES = (72, 4, 2, 8)


def drifted(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Loads of 10 layers, and the same after a while."""
    random = np.random.default_rng(seed)
    before = random.lognormal(0, 1, (10, 64))
    return before, before * random.lognormal(0, 0.5, before.shape)


def new_pairs(old: np.ndarray, new: np.ndarray, gpus: int) -> np.ndarray:
    """[layers] experts that a GPU holds now and did not hold before."""
    layers = len(old)
    pairs = [
        len(set(map(int, b)) - set(map(int, a)))
        for a, b in zip(old.reshape(layers * gpus, -1), new.reshape(layers * gpus, -1), strict=True)
    ]
    return np.array(pairs).reshape(layers, gpus).sum(1)


def test_moves_are_counted_and_reach_the_stated_balance() -> None:
    before, after = drifted()
    old = eplb.rebalance(before, *SIZES)
    stale = after.sum(1) / 8 / eplb.gpu_loads(after, old.phy2log, 8).max(1)
    fresh = eplb.rebalance(after, *SIZES)
    new = eplb.rebalance(after, *SIZES, previous=old, balance=0.9)
    assert (new.moves == new_pairs(old.phy2log, new.phy2log, 8)).all()
    reachable = fresh.balance >= 0.9
    assert (reachable & (stale < 0.9)).sum() >= 5
    assert (new.balance[reachable] >= 0.9).all()
    assert new.moves.sum() < new_pairs(old.phy2log, fresh.phy2log, 8).sum() / 3


def test_a_balanced_placement_does_not_move() -> None:
    before, _ = drifted()
    old = eplb.rebalance(before, *SIZES)
    new = eplb.rebalance(before, *SIZES, previous=old.phy2log, balance=0.5)
    assert new.moves.sum() == 0
    assert (new.phy2log == old.phy2log).all()


@pytest.mark.parametrize("budget", [0, 1, 3, 6])
def test_max_moves_is_kept_and_more_moves_never_hurt(budget: int) -> None:
    before, after = drifted(1)
    old = eplb.rebalance(before, *SIZES)
    new = eplb.rebalance(after, *SIZES, previous=old, max_moves=budget)
    assert (new_pairs(old.phy2log, new.phy2log, 8) <= budget).all()
    stale = eplb.gpu_loads(after, old.phy2log, 8).max(1)
    assert (new.load <= stale * (1 + 1e-6)).all()
    if budget >= 3:
        assert new.load.sum() < stale.sum()


def test_groups_stay_on_their_nodes_when_moving() -> None:
    before, after = drifted(2)
    old = eplb.rebalance(before, *SIZES)
    new = eplb.rebalance(after, *SIZES, previous=old)
    node = np.arange(72) // 36
    for layer in range(10):
        homes = {(int(e) // 16, int(n)) for e, n in zip(new.phy2log[layer], node, strict=True)}
        assert len(homes) == 4


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"max_moves": 3}, ConfigError, "needs previous="),
        ({"previous": np.zeros((10, 4))}, ShapeError, "previous has shape"),
        ({"previous": np.zeros((10, 72))}, ConfigError, "no slot for expert 1"),
        ({"previous": np.full((10, 72), 64)}, ConfigError, "outside 0 … 63"),
        ({"previous": "old", "balance": 1.5}, ConfigError, "balance is 1.5"),
        ({"previous": "old", "max_moves": -1}, ConfigError, "max_moves is -1"),
        ({"previous": "shuffled"}, ConfigError, "over several nodes"),
        ({"split": "half"}, ConfigError, "split is 'half'"),
    ],
)
def test_bad_previous_is_one_clear_line(change: dict, error: type[Exception], words: str) -> None:
    before, _ = drifted()
    old = eplb.rebalance(before, *SIZES).phy2log
    given = {"old": old, "shuffled": old[:, ::-1].copy()}
    if isinstance(change.get("previous"), str):
        rolled = np.roll(old, 9, axis=1)
        change = {**change, "previous": {**given, "shuffled": rolled}[change["previous"]]}
    with pytest.raises(error, match=words):
        eplb.rebalance(before, *SIZES, **change)


def test_best_split_never_loses_and_shares_sum_to_one() -> None:
    random = np.random.default_rng(3)
    loads = random.lognormal(0, 0.7, (10, 256))
    equal = eplb.rebalance(loads, 288, 1, 1, 144)
    best = eplb.rebalance(loads, 288, 1, 1, 144, split="best")
    assert (best.phy2log == equal.phy2log).all()
    assert (best.load <= equal.load * (1 + 1e-9)).all()
    assert best.load.sum() < equal.load.sum()
    np.testing.assert_allclose(
        eplb.gpu_loads(loads, best.phy2log, 144, best.share).max(1), best.load, rtol=1e-5
    )
    assert (best.share >= 0).all()


def test_best_split_is_optimal_where_the_answer_is_known() -> None:
    # expert 0 on both GPUs levels them: 10 + 6 = 16, 8 a GPU
    loads = np.array([[6.0, 7.0, 3.0]])
    placement = eplb.rebalance(loads, 4, 1, 1, 2, split="best")
    assert placement.load[0] == pytest.approx(8.0)
