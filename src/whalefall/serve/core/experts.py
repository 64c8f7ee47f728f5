"""The expert balancer: when a unit's experts are placed anew, from which loads, with few moves.

In: what the unit's gates have chosen so far. Out: now and then a placement. The server gives it
what the ranks report, the simulator what its requests choose.
Source: published V3/R1 system, "Expert-Parallel Load Balancer"; `eplb.rebalance(previous=)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from whalefall import eplb
from whalefall.errors import ConfigError

__all__ = ["ExpertBalance", "ExpertRule", "imbalance"]

AIM = 0.1  # above the balance that is asked for, so that a small drift is no new reason
WORTH = 0.98  # of the imbalance: less relief than that is not worth the moves


@dataclass(frozen=True)
class ExpertRule:
    """The operator's settings.

    Attributes:
        balance: experts are placed anew where a layer's mean over largest rank load is below it.
        max_moves: experts of a layer that may move at a time.
        interval_s: between looks.
        half_life: looks after which what was seen counts half.
        min_selections: an expert and look, on average, before anything is judged.
    """

    balance: float = 0.8
    max_moves: int = 2
    interval_s: float = 10.0
    half_life: float = 8.0
    min_selections: float = 64.0

    def __post_init__(self) -> None:
        if not (0 < self.balance <= 1 and self.max_moves >= 0 and 0 <= self.interval_s < math.inf):
            raise ConfigError(
                f"expert balancer: balance {self.balance:g}, {self.max_moves} moves, every "
                f"{self.interval_s:g} s; wanted above 0 to 1, 0 or more, and a finite time"
            )


class ExpertBalance:
    """One unit's experts, watched.

    Args:
        placement: where they are at first.
        rule: settings.
    Attributes:
        start: the placement at first.
        placement: in force.
        judged: looks that saw enough to judge.
        version: placements made.
        moves: experts that ranks took over so far.
        now: largest rank load over the mean, worst layer, at the last look that judged.
        before, after: the same, under the last change.
    """

    def __init__(self, placement: eplb.Placement, rule: ExpertRule) -> None:
        self.start = self.placement = placement
        self.rule = rule
        self.judged = self.version = self.moves = 0
        self.now = self.before = self.after = 0.0
        layers, experts = placement.logcnt.shape
        self._average = eplb.MovingAverage(layers, experts, rule.half_life)
        self._counted = np.zeros((layers, experts))
        self._looked_s = -math.inf

    @property
    def weight(self) -> npt.NDArray[np.float32]:
        """[layers, experts] selections a look, newer looks counting more."""
        return self._average.loads()

    def look(self, total: npt.ArrayLike, now_s: float) -> eplb.Placement | None:
        """A placement to take over now, if it is time and worth it.

        Args:
            total: [layers, experts] selections since the unit's start.
            now_s: the time.
        """
        rule = self.rule
        if now_s - self._looked_s < rule.interval_s:
            return None
        self._looked_s = now_s
        counted = np.array(total, np.float64)
        fresh = counted - self._counted
        if fresh.sum() < rule.min_selections * fresh.size:
            return None
        self._counted = counted
        self.judged += 1
        self._average.update(fresh)
        self.now = imbalance(self.weight, self.placement)
        if 1 / self.now >= rule.balance:
            return None
        better = eplb.rebalance(
            self.weight, self.placement.phy2log.shape[1], 1, 1, self.placement.num_gpus,
            previous=self.placement, max_moves=rule.max_moves,
            balance=min(0.99, rule.balance + AIM),
        )  # fmt: skip
        after = imbalance(self.weight, better)
        if after > WORTH * self.now:
            return None
        self.before, self.after, self.placement = self.now, after, better
        self.version += 1
        self.moves += int(better.moves.sum())
        return better


def imbalance(weight: npt.ArrayLike, placement: eplb.Placement) -> float:
    """Largest rank load over the mean, of the layer where it is worst; 1.0 at best."""
    loads = eplb.gpu_loads(weight, placement.phy2log, placement.num_gpus)
    mean = loads.mean(axis=1)
    return float((loads.max(axis=1)[mean > 0] / mean[mean > 0]).max(initial=1.0))
