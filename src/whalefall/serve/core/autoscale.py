"""The autoscaler: how many units a load asks for; grows at once, shrinks after a calm while.

Source: the published day, whose fleet followed the load from 278 nodes down to 68 and back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from whalefall.errors import ConfigError

__all__ = ["ScaleRule", "ScaleState", "scale"]


@dataclass(frozen=True)
class ScaleRule:
    """The operator's settings.

    Attributes:
        set_point: load of one unit (tokens/s, say) that it is meant to run at.
        min_units, max_units: limits.
        calm_s: seconds that the load must ask for fewer units before one is let go.
        smooth_s: time constant of the load's moving average; 0: each look counts alone.
        margin: share of a unit by which the wish must differ before anything changes; half a unit
            keeps the average exactly at the set point.
    """

    set_point: float
    min_units: int = 1
    max_units: int = 1_000_000
    calm_s: float = 600.0
    smooth_s: float = 0.0
    margin: float = 0.5

    def __post_init__(self) -> None:
        if self.set_point <= 0 or not 0 < self.min_units <= self.max_units:
            raise ConfigError(
                f"autoscaler: set point {self.set_point:g}, {self.min_units} to {self.max_units} "
                "units; wanted a set point above 0 and 1 <= min <= max"
            )


@dataclass(frozen=True)
class ScaleState:
    """Units wanted now, the load as smoothed so far, and since when it has asked for fewer."""

    units: int
    load: float | None = None
    seen_s: float = 0.0
    calm_since_s: float | None = None


def smoothed(state: ScaleState, load: float, now_s: float, rule: ScaleRule) -> float:
    """The load averaged with what was seen before, older looks counting exponentially less."""
    if state.load is None or rule.smooth_s == 0:
        return load
    kept = math.exp(-(now_s - state.seen_s) / rule.smooth_s)
    return kept * state.load + (1 - kept) * load


def scale(state: ScaleState, load: float, now_s: float, rule: ScaleRule) -> ScaleState:
    """The state after seeing `load` at `now_s`; the caller starts or drains the difference."""
    load = smoothed(state, load, now_s, rule)
    wish = load / rule.set_point
    target = min(max(round(wish), rule.min_units), rule.max_units)
    if target > state.units and wish > state.units + rule.margin:
        return ScaleState(target, load, now_s)
    if target < state.units and wish < state.units - rule.margin:
        since = now_s if state.calm_since_s is None else state.calm_since_s
        if now_s - since >= rule.calm_s:
            return ScaleState(target, load, now_s)
        return ScaleState(state.units, load, now_s, since)
    units = min(max(state.units, rule.min_units), rule.max_units)
    return ScaleState(units, load, now_s)
