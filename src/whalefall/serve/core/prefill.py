"""The prefill balancer: core-attention work and input tokens, even over the units.

Source: published system, "Prefill Load Balancer": balance core-attention computation across ranks,
and the number of input tokens per rank (which is what dispatch sends).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from whalefall.errors import ConfigError

__all__ = ["PrefillLoad", "attention_work", "choose_prefill"]


@dataclass(frozen=True)
class PrefillLoad:
    """What a unit (or rank) still has to do.

    Attributes:
        tokens: input tokens to compute.
        attention: query-key pairs to score.
    """

    tokens: float = 0.0
    attention: float = 0.0

    def plus(self, prompt: float, cached: float) -> PrefillLoad:
        """The load with one more prompt, of whose tokens `cached` need no computing."""
        return PrefillLoad(
            self.tokens + prompt - cached, self.attention + attention_work(prompt, cached)
        )


def attention_work(prompt: float, cached: float = 0.0) -> float:
    """Query-key pairs that a causal prompt scores beyond its cached part."""
    return (prompt * (prompt + 1) - cached * (cached + 1)) / 2


def choose_prefill(
    loads: Sequence[PrefillLoad], prompt: int, cached: Sequence[int] | None = None
) -> int:
    """The unit that a prompt goes to.

    Each unit is judged by the worse of its two loads with the prompt added, each measured against
    the mean of all units, so that neither quantity can hide behind the other.

    Args:
        loads: the units' loads.
        prompt: the prompt's tokens.
        cached: tokens of it that each unit has in its cache.
    Returns: an index into `loads`; the lowest of equals.
    Raises: ConfigError without units.
    """
    if not loads:
        raise ConfigError("choose_prefill: got no units, wanted at least one")
    hits = [0] * len(loads) if cached is None else cached
    mean_tokens = sum(load.tokens for load in loads) / len(loads) + prompt
    mean_attention = sum(load.attention for load in loads) / len(loads) + attention_work(prompt)
    best, lowest = 0, float("inf")
    for index, (load, hit) in enumerate(zip(loads, hits, strict=True)):
        tokens = load.tokens + prompt - hit
        attention = load.attention + attention_work(prompt, hit)
        pressure = max(tokens / mean_tokens, attention / mean_attention)
        if pressure < lowest:
            best, lowest = index, pressure
    return best
