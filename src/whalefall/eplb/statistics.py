"""Eplb room: load statistics while tokens flow.

In: tokens per expert of each step. Out: the weights that `rebalance` wants: a moving average, a
window, or what this time of day brought before. Memory is a fixed number of bytes per expert.
"""

# L layers, E experts, B buckets

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from whalefall.arguments import finite
from whalefall.eplb.arguments import check_loads, indices, integer
from whalefall.errors import ConfigError, ShapeError

__all__ = ["DayForecast", "MovingAverage", "Window", "count_experts"]

Loads = npt.NDArray[np.float32]
DAY_S = 86400.0


def count_experts(topk_idx: npt.ArrayLike, num_experts: int) -> npt.NDArray[np.int64]:
    """Tokens per expert [experts] of a gate's choices [tokens, k]; −1 marks a choice not made."""
    integer("num_experts", num_experts)
    chosen = indices("topk_idx", topk_idx, num_experts, -1).ravel()
    return np.bincount(chosen[chosen >= 0], minlength=num_experts)


class Statistics:
    """What the three kinds share: the shape, its check, and the memory they take."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        if integer("num_layers", num_layers) < 1 or integer("num_experts", num_experts) < 1:
            raise ShapeError(f"eplb: statistics of {num_layers} layers, {num_experts} experts")
        self.shape = (num_layers, num_experts)

    def _checked(self, counts: npt.ArrayLike) -> Loads:
        counts_LE = check_loads(counts)
        if counts_LE.shape != self.shape:
            raise ShapeError(f"eplb: counts have shape {counts_LE.shape}; wanted {self.shape}")
        return counts_LE

    @property
    def bytes_per_expert(self) -> float:
        """Memory of the arrays, divided by layers × experts."""
        held = sum(a.nbytes for a in vars(self).values() if isinstance(a, np.ndarray))
        return held / math.prod(self.shape)


class MovingAverage(Statistics):
    """The mean of all steps, each worth half as much as one `half_life` steps later."""

    def __init__(self, num_layers: int, num_experts: int, half_life: float = 100.0) -> None:
        super().__init__(num_layers, num_experts)
        self._keep = 0.5 ** (1 / finite("eplb: half_life", half_life, 0, above=True))
        self._sum_LE = np.zeros(self.shape, np.float32)
        self._steps = 0.0

    def update(self, counts: npt.ArrayLike) -> None:
        """Add one step's tokens per expert [layers, experts]."""
        counts_LE = self._checked(counts)
        self._sum_LE *= self._keep
        self._sum_LE += counts_LE
        self._steps = self._steps * self._keep + 1

    def loads(self) -> Loads:
        """Tokens per expert and step [layers, experts]; zeros before the first step."""
        return self._sum_LE / np.float32(max(self._steps, 1e-30))


class Window(Statistics):
    """The mean of the last `size` steps, to within a bucket: old buckets leave as a whole."""

    def __init__(
        self, num_layers: int, num_experts: int, size: int = 1024, buckets: int = 8
    ) -> None:
        super().__init__(num_layers, num_experts)
        if integer("buckets", buckets) < 1 or integer("size", size) < buckets:
            raise ConfigError(f"eplb: a window of {size} steps in {buckets} buckets")
        self._per_bucket = -(-size // buckets)
        self._sum_BLE = np.zeros((buckets, *self.shape), np.float32)
        self._steps_B = np.zeros(buckets, np.int64)
        self._now = 0

    def update(self, counts: npt.ArrayLike) -> None:
        """Add one step's tokens per expert [layers, experts]."""
        counts_LE = self._checked(counts)
        if self._steps_B[self._now] == self._per_bucket:
            self._now = (self._now + 1) % len(self._steps_B)
            self._sum_BLE[self._now] = 0
            self._steps_B[self._now] = 0
        self._sum_BLE[self._now] += counts_LE
        self._steps_B[self._now] += 1

    def loads(self) -> Loads:
        """Tokens per expert and step [layers, experts]; zeros before the first step."""
        return self._sum_BLE.sum(0) / np.float32(max(int(self._steps_B.sum()), 1))


class DayForecast(Statistics):
    """What to expect at a time of day: the moving average of that time on the days before."""

    def __init__(
        self, num_layers: int, num_experts: int, slots: int = 24, half_life_days: float = 3.0
    ) -> None:
        super().__init__(num_layers, num_experts)
        if integer("slots", slots) < 1:
            raise ConfigError(f"eplb: a day of {slots} slots; give 1 or more")
        self._half_life_s = finite("eplb: half_life_days", half_life_days, 0, above=True) * DAY_S
        self._sum_BLE = np.zeros((slots, *self.shape), np.float32)
        self._weight_B = np.zeros(slots, np.float64)
        self._when_B = np.zeros(slots, np.float64)

    def update(self, counts: npt.ArrayLike, time_s: float) -> None:
        """Add one step's tokens per expert [layers, experts] at `time_s` (Unix seconds)."""
        counts_LE, time_s = self._checked(counts), finite("eplb: time_s", time_s)
        slot = int(time_s % DAY_S / DAY_S * len(self._when_B))
        keep = 0.5 ** (max(0.0, time_s - self._when_B[slot]) / self._half_life_s)
        self._sum_BLE[slot] = self._sum_BLE[slot] * np.float32(keep) + counts_LE
        self._weight_B[slot] = self._weight_B[slot] * keep + 1
        self._when_B[slot] = time_s

    def loads(self, time_s: float) -> Loads:
        """Tokens per expert and step expected at `time_s`, between the two nearest slots' centres.

        A slot not seen yet counts as its neighbour; zeros before the first step.
        """
        slots, time_s = len(self._when_B), finite("eplb: time_s", time_s)
        place = time_s % DAY_S / DAY_S * slots - 0.5
        before, part = int(np.floor(place)), float(place - np.floor(place))
        left, right = self._slot(before % slots), self._slot((before + 1) % slots)
        if left is None or right is None:
            seen = left if right is None else right
            return np.zeros(self.shape, np.float32) if seen is None else seen
        return left * np.float32(1 - part) + right * np.float32(part)

    def _slot(self, slot: int) -> Any:
        if self._weight_B[slot] == 0:
            return None
        return self._sum_BLE[slot] / np.float32(self._weight_B[slot])
