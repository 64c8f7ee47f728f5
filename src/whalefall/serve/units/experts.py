"""The units' experts: what the ranks' gates chose, shown to the expert balancer.

In: each rank's selections so far. Out: now and then a placement for a unit, which all its ranks
take over between the same two steps, without stopping.
"""

from __future__ import annotations

import numpy as np

from whalefall.model import ModelConfig
from whalefall.model.expert_parallel import even_placement
from whalefall.serve.core import ExpertBalance, Place
from whalefall.serve.units.layout import UnitsConfig
from whalefall.serve.units.messages import Placed

__all__ = ["ExpertBalancer", "UnitExperts"]


class UnitExperts(ExpertBalance):
    """A unit's balance, and the last loads that its ranks told.

    Attributes:
        ranks: of the unit.
        first: dense layers before the first with experts.
        loads: rank → [layers, experts] selections so far.
    """

    def __init__(self, ranks: int, model: ModelConfig, config: UnitsConfig) -> None:
        super().__init__(even_placement(model, ranks, config.redundant), config.experts)
        self.ranks, self.first = ranks, model.first_k_dense
        self.loads: dict[int, np.ndarray] = {}


class ExpertBalancer:
    """Watches the units' expert loads."""

    def __init__(self, config: UnitsConfig) -> None:
        self._config = config
        self.units: dict[str, UnitExperts] = {}
        self._past: np.ndarray | None = None

    def unit_up(self, name: str, ranks: int, model: ModelConfig) -> None:
        """A unit begins with an even placement."""
        if ranks > 1 and model.num_experts:
            self.units[name] = UnitExperts(ranks, model, self._config)

    def unit_down(self, name: str) -> None:
        """A unit is gone; what its gates chose still counts in the total."""
        unit = self.units.pop(name, None)
        if unit is not None and unit.loads:
            gone = np.sum(list(unit.loads.values()), axis=0)
            self._past = gone if self._past is None else self._past + gone

    def see(self, place: Place, loads: np.ndarray) -> None:
        """A rank's selections so far: [layers, experts]."""
        if place.unit in self.units:
            self.units[place.unit].loads[place.rank] = loads

    def total(self) -> np.ndarray | None:
        """All selections: [layers, experts]; None before any."""
        parts = [load for unit in list(self.units.values()) for load in list(unit.loads.values())]
        if self._past is not None:
            parts.append(self._past)
        return np.sum(parts, axis=0) if parts else None

    def look(self, now_s: float) -> list[tuple[str, Placed]]:
        """Placements to be taken over now: (unit, what to tell its ranks)."""
        found = []
        for name, unit in self.units.items():
            if len(unit.loads) < unit.ranks:
                continue  # the ranks' loads are only judged together
            total = np.sum(list(unit.loads.values()), axis=0)[unit.first :]
            placement = unit.look(total, now_s)
            if placement is not None:
                found.append((name, Placed(unit.version, placement.phy2log.tolist())))
        return found
