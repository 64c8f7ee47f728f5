"""The autoscaler's eyes: tokens a second as the units see them, and how many units that wants."""

from __future__ import annotations

from dataclasses import replace

from whalefall.serve.core import ScaleState, scale
from whalefall.serve.units.layout import UnitsConfig

__all__ = ["Scaler"]

LOOK_S = 1.0


class Scaler:
    """Counts tokens, and asks `serve.core.scale` once a second."""

    def __init__(self, config: UnitsConfig) -> None:
        self._rules = {
            kind: None if rule is None else replace(rule, min_units=at.units, max_units=at.most)
            for kind, rule, at in (
                ("prefill", config.prefill_rule, config.prefill),
                ("decode", config.decode_rule, config.decode),
            )
        }
        self._states = {
            "prefill": ScaleState(config.prefill.units),
            "decode": ScaleState(config.decode.units),
        }
        self._seen = {"prefill": 0, "decode": 0}
        self._looked = {"prefill": 0.0, "decode": 0.0}

    def prompt(self, tokens: int) -> None:
        """A prompt came in."""
        self._seen["prefill"] += tokens

    def output(self, tokens: int) -> None:
        """Tokens went out."""
        self._seen["decode"] += tokens

    def missing(self, kind: str, units: int, now_s: float) -> int:
        """How many units to start, after a look at the load where one is due."""
        rule, since = self._rules[kind], now_s - self._looked[kind]
        if rule is not None and since >= LOOK_S:
            load = self._seen[kind] / since if self._looked[kind] else 0.0
            self._states[kind] = scale(self._states[kind], load, now_s, rule)
            self._seen[kind], self._looked[kind] = 0, now_s
        return max(0, self._states[kind].units - units)

    def spare(self, kind: str, units: int) -> int:
        """How many units to drain."""
        return max(0, units - self._states[kind].units)
