"""The expert balancer: what the ranks' gates chose, and a better placement with few moves.

In: each rank's selections so far. Out: now and then a placement for a unit, which all its ranks
take over between the same two steps, without stopping.
Source: published V3/R1 system, "Expert-Parallel Load Balancer"; `eplb.rebalance(previous=)`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from whalefall import eplb
from whalefall.model import ModelConfig
from whalefall.model.expert_parallel import even_placement
from whalefall.serve.core import Place
from whalefall.serve.units.layout import UnitsConfig
from whalefall.serve.units.messages import Placed

__all__ = ["Balance", "ExpertBalancer"]

HALF_LIFE = 8.0  # looks
MIN_SELECTIONS = 64  # an expert and look, on average, before anything is judged


@dataclass
class Balance:
    """A unit's experts: largest rank load over the mean, worst layer, before and after a change."""

    placement: eplb.Placement
    average: eplb.MovingAverage
    ranks: int
    first: int
    loads: dict[int, np.ndarray] = field(default_factory=dict)
    looked: np.ndarray | None = None
    version: int = 0
    before: float = 0.0
    after: float = 0.0
    now: float = 0.0
    moves: int = 0


class ExpertBalancer:
    """Watches the units' expert loads."""

    def __init__(self, config: UnitsConfig) -> None:
        self._config = config
        self.units: dict[str, Balance] = {}
        self._past: np.ndarray | None = None
        self._looked_s = 0.0

    def unit_up(self, name: str, ranks: int, model: ModelConfig) -> None:
        """A unit begins with an even placement."""
        if ranks < 2 or not model.num_experts:
            return
        placement = even_placement(model, ranks, self._config.redundant)
        average = eplb.MovingAverage(len(placement.logcnt), model.num_experts, HALF_LIFE)
        self.units[name] = Balance(placement, average, ranks, model.first_k_dense)

    def unit_down(self, name: str) -> None:
        """A unit is gone; what its gates chose still counts in the total."""
        balance = self.units.pop(name, None)
        if balance is not None and balance.loads:
            gone = np.sum(list(balance.loads.values()), axis=0)
            self._past = gone if self._past is None else self._past + gone

    def see(self, place: Place, loads: np.ndarray) -> None:
        """A rank's selections so far: [layers, experts]."""
        if place.unit in self.units:
            self.units[place.unit].loads[place.rank] = loads

    def total(self) -> np.ndarray | None:
        """All selections: [layers, experts]; None before any."""
        parts = [load for b in list(self.units.values()) for load in list(b.loads.values())]
        if self._past is not None:
            parts.append(self._past)
        return np.sum(parts, axis=0) if parts else None

    def look(self, now_s: float) -> list[tuple[str, Placed]]:
        """Placements to be taken over now: (unit, what to tell its ranks)."""
        if now_s - self._looked_s < self._config.rebalance_s:
            return []
        self._looked_s = now_s
        found = ((name, self._judge(balance)) for name, balance in self.units.items())
        return [(name, placed) for name, placed in found if placed is not None]

    def _judge(self, b: Balance) -> Placed | None:
        if len(b.loads) < b.ranks:
            return None
        total = np.sum(list(b.loads.values()), axis=0)[b.first :]
        fresh = total if b.looked is None else total - b.looked
        if fresh.sum() < MIN_SELECTIONS * fresh.size:
            return None
        b.looked = total
        b.average.update(fresh)
        weight = b.average.loads()
        b.now = imbalance(weight, b.placement)
        if 1 / b.now >= self._config.balance:
            return None
        better = eplb.rebalance(
            weight, b.placement.phy2log.shape[1], 1, 1, b.ranks, previous=b.placement,
            max_moves=self._config.max_moves, balance=min(0.99, self._config.balance + 0.1),
        )  # fmt: skip
        after = imbalance(weight, better)
        if after > 0.98 * b.now:
            return None
        b.before, b.after, b.placement = b.now, after, better
        b.version += 1
        b.moves += int(better.moves.sum())
        return Placed(b.version, better.phy2log.tolist())


def imbalance(weight: np.ndarray, placement: eplb.Placement) -> float:
    """Largest rank load over the mean, of the layer where it is worst; 1.0 at best."""
    loads = eplb.gpu_loads(weight, placement.phy2log, placement.num_gpus)
    mean = loads.mean(axis=1)
    return float((loads.max(axis=1)[mean > 0] / mean[mean > 0]).max(initial=1.0))
