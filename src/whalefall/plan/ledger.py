"""The ledger of a day: what tokens earn, what nodes cost, what is left."""

from __future__ import annotations

from dataclasses import dataclass

from whalefall.arguments import finite
from whalefall.errors import ConfigError
from whalefall.plan import published
from whalefall.plan.fleet import Fleet

__all__ = ["Ledger", "Prices", "Traffic", "WhatIf", "ledger", "nodes_from_rates"]

MILLION = 1e6


@dataclass(frozen=True)
class Prices:
    """Dollars per million tokens: input found in the cache, input not found, output."""

    hit: float = published.R1_PRICES[0]
    miss: float = published.R1_PRICES[1]
    output: float = published.R1_PRICES[2]

    def __post_init__(self) -> None:
        for name in ("hit", "miss", "output"):
            finite(f"price of {name}", getattr(self, name), 0)


V3 = Prices(*published.V3_PRICES)


@dataclass(frozen=True)
class Traffic:
    """Tokens of a day: input (hits included), input found in the cache, output."""

    input_tokens: float = published.INPUT_TOKENS
    hit_tokens: float = published.HIT_TOKENS
    output_tokens: float = published.OUTPUT_TOKENS

    def __post_init__(self) -> None:
        finite = max(self.input_tokens, self.output_tokens) < float("inf")
        good = 0 <= self.hit_tokens <= self.input_tokens and self.output_tokens >= 0
        if not (good and finite):
            raise ConfigError(
                f"traffic: {self.hit_tokens:g} hits of {self.input_tokens:g} input tokens and "
                f"{self.output_tokens:g} output tokens, wanted 0 <= hits <= input and output >= 0"
            )

    @property
    def miss_tokens(self) -> float:
        """Input tokens that had to be computed."""
        return self.input_tokens - self.hit_tokens


@dataclass(frozen=True)
class WhatIf:
    """What the publishers said their theoretical revenue leaves out.

    Attributes:
        v3_share: share of the tokens sold at V3's lower prices.
        free_share: share of the tokens that earn nothing (web page and app).
        night_discount: price cut (0.5 = half price) in the off-peak window.
        night_share: share of the tokens in that window.
    """

    v3_share: float = 0.0
    free_share: float = 0.0
    night_discount: float = 0.0
    night_share: float = 0.0

    def __post_init__(self) -> None:
        for name in ("v3_share", "free_share", "night_discount", "night_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, wanted a share from 0 to 1")

    @property
    def paid(self) -> float:
        """The factor on revenue that free use and the night discount leave."""
        return (1 - self.free_share) * (1 - self.night_discount * self.night_share)


@dataclass(frozen=True)
class Ledger:
    """Revenue by line, cost and margin of a day, in dollars."""

    revenue_hit: float
    revenue_miss: float
    revenue_output: float
    cost: float

    @property
    def revenue(self) -> float:
        """All three revenue lines."""
        return self.revenue_hit + self.revenue_miss + self.revenue_output

    @property
    def profit(self) -> float:
        """Revenue less cost."""
        return self.revenue - self.cost

    @property
    def margin(self) -> float | None:
        """Profit as a share of cost, as the publishers state it; None without cost."""
        return self.profit / self.cost if self.cost else None


def ledger(traffic: Traffic, prices: Prices, cost: float, what_if: WhatIf | None = None) -> Ledger:
    """What a day's traffic earns at given prices against a given cost.

    Args:
        traffic: tokens of the day.
        prices: dollars per million tokens.
        cost: dollars, e.g. `Fleet.cost`.
        what_if: shares that earn less; default: all tokens at full price.
    """
    case = what_if or WhatIf()

    def line(tokens: float, price: float, v3_price: float) -> float:
        blended = (1 - case.v3_share) * price + case.v3_share * v3_price
        return tokens / MILLION * blended * case.paid

    return Ledger(
        line(traffic.hit_tokens, prices.hit, V3.hit),
        line(traffic.miss_tokens, prices.miss, V3.miss),
        line(traffic.output_tokens, prices.output, V3.output),
        cost,
    )


def nodes_from_rates(
    traffic: Traffic,
    prefill_tokens_s: float = published.PREFILL_TOKENS_S_NODE,
    decode_tokens_s: float = published.DECODE_TOKENS_S_NODE,
) -> float:
    """Nodes that a day's tokens keep busy at given tokens per second and node (hits included)."""
    if prefill_tokens_s <= 0 or decode_tokens_s <= 0:
        raise ConfigError(
            f"rates: got {prefill_tokens_s:g} and {decode_tokens_s:g} tokens/s a node, wanted > 0"
        )
    day_s = 86_400
    return (
        traffic.input_tokens / day_s / prefill_tokens_s
        + traffic.output_tokens / day_s / decode_tokens_s
    )


def night_share(fleet: Fleet) -> float:
    """Share of node-hours in the off-peak window: traffic is taken to follow the nodes."""
    hours = fleet.node_hours()
    return fleet.node_hours(published.NIGHT_WINDOW) / hours if hours else 0.0
