"""What a `rebalance_experts` must do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

__all__ = ["PlacementSuite"]

# layers, experts, replicas, groups, nodes, GPUs
CASES = [(1, 4, 4, 1, 1, 2), (3, 12, 16, 4, 2, 8), (2, 64, 72, 8, 3, 9), (4, 256, 288, 8, 4, 32)]


class PlacementSuite:
    """Give `rebalance_experts`: EPLB's."""

    @pytest.fixture
    def rebalance_experts(self) -> Callable[..., Any]:
        """(weight, num_replicas, num_groups, num_nodes, num_gpus) → phy2log, log2phy, logcnt."""
        raise NotImplementedError("a PlacementSuite gives the fixture `rebalance_experts`")

    @pytest.mark.parametrize(("layers", "experts", "slots", "groups", "nodes", "gpus"), CASES)
    def test_its_maps_agree_and_no_expert_is_missing(
        self, rebalance_experts: Callable[..., Any],
        layers: int, experts: int, slots: int, groups: int, nodes: int, gpus: int,
    ) -> None:  # fmt: skip
        weight = loads(layers, experts)
        phy2log, log2phy, logcnt = map(
            np.asarray, rebalance_experts(weight, slots, groups, nodes, gpus)
        )
        assert phy2log.shape == (layers, slots)
        assert logcnt.shape == (layers, experts)
        for layer in range(layers):
            counted = np.bincount(phy2log[layer], minlength=experts)
            assert (counted == logcnt[layer]).all() and (counted >= 1).all()
            for expert in range(experts):
                own = log2phy[layer, expert]
                assert sorted(own[own >= 0]) == sorted(np.flatnonzero(phy2log[layer] == expert))

    def test_replicas_make_the_busiest_gpu_lighter(
        self, rebalance_experts: Callable[..., Any]
    ) -> None:
        weight = loads(4, 64)
        busiest = [
            _busiest(weight, *map(np.asarray, rebalance_experts(weight, slots, 1, 1, 8)))
            for slots in (64, 96)
        ]
        assert busiest[1] < busiest[0]
        even = weight.sum(axis=1) / 8
        assert (busiest[1] <= 1.15 * even.max()).all()

    def test_a_group_stays_on_one_node(self, rebalance_experts: Callable[..., Any]) -> None:
        experts, groups, nodes, gpus = 64, 8, 4, 16
        phy2log = np.asarray(rebalance_experts(loads(2, experts), 80, groups, nodes, gpus)[0])
        node_of_slot = np.arange(80) // (80 // nodes)
        for layer in phy2log:
            for group in range(groups):
                where = node_of_slot[layer // (experts // groups) == group]
                assert len(set(where)) == 1


def loads(layers: int, experts: int) -> Any:
    """Zipf-like tokens a routed expert gets, [layers, experts]."""
    rng = np.random.default_rng(experts)
    zipf = 1e4 / np.arange(1, experts + 1) ** 0.8
    return np.stack([rng.permutation(zipf) for _ in range(layers)]).astype(np.int64)


def _busiest(weight: Any, phy2log: Any, log2phy: Any, logcnt: Any) -> float:
    per_slot = np.take_along_axis(weight / logcnt, phy2log, axis=1)
    return float(per_slot.reshape(len(weight), 8, -1).sum(axis=2).max())
