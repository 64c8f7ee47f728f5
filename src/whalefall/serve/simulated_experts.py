"""The experts of a simulated cluster: what its requests choose, and the server's balancer over it.

A request has one of several topics, and a topic its own popular experts, above those that all
topics share; how many requests each topic has turns once around with the day. So loads are skewed
and drift. A few layers stand for all of them. Units run at the roofline's speed whatever the
balance: what an uneven load would cost is reported, and slows nothing.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np

from whalefall import eplb
from whalefall.errors import ConfigError
from whalefall.serve.core import ExpertBalance, ExpertRule, imbalance

__all__ = ["Choices", "ExpertFigures", "ExpertsSpec", "SimulatedExperts"]

DAY_S = 86_400.0
# each ten minutes (V3's report, 3.4.1), as many moves as the published units have redundant experts
PUBLISHED_RULE = ExpertRule(interval_s=600.0, max_moves=32)


@dataclass(frozen=True)
class ExpertsSpec:
    """The model's experts, and how requests choose them.

    Attributes:
        experts, topk, redundant: of a layer: experts, chosen for a token, replicas of a unit.
        prefill_ranks, decode_ranks: of a unit.
        layers: that stand for all.
        topics: of requests.
        skew: standard deviation of the logarithm of an expert's popularity.
        rule: the balancer's.
    """

    experts: int
    topk: int
    redundant: int
    prefill_ranks: int
    decode_ranks: int
    layers: int = 2
    topics: int = 16
    skew: float = 0.8
    rule: ExpertRule = PUBLISHED_RULE

    def __post_init__(self) -> None:
        if not (1 <= self.topk <= self.experts and self.layers > 0 and self.topics > 0):
            raise ConfigError(
                f"serve simulate: {self.experts} experts, {self.topk} for a token, {self.layers} "
                f"layers, {self.topics} topics; wanted at least one of each"
            )

    def even(self, ranks: int) -> eplb.Placement:
        """A unit's experts before anything is known of their loads."""
        slots = -(-(self.experts + self.redundant) // ranks) * ranks
        return eplb.rebalance(np.ones((self.layers, self.experts)), slots, 1, 1, ranks)


class Choices:
    """What requests choose, and when they have which topic."""

    def __init__(self, spec: ExpertsSpec, seed: int) -> None:
        rng = np.random.default_rng(seed)
        shape = (spec.layers, spec.experts)
        shared, own = rng.normal(size=shape), rng.normal(size=(spec.topics, *shape))
        popular = np.exp(spec.skew * (0.8 * shared + 0.6 * own))
        # selections of a token, by topic: [topics, layers, experts]
        self.taste = spec.topk * popular / popular.sum(axis=-1, keepdims=True)

    def topic(self, now_s: float, rng: random.Random) -> int:
        """A request's topic at a time of day."""
        topics = len(self.taste)
        while True:  # each topic has its busy hour, and its night on the other side of the day
            topic = rng.randrange(topics)
            phase = 2 * math.pi * (now_s / DAY_S - topic / topics)
            if rng.random() < (1 + math.cos(phase)) / 2:
                return topic


@dataclass
class ExpertFigures:
    """What the looks at one kind of unit showed.

    Attributes:
        looks: that judged.
        even: largest rank load over the mean had nothing been moved; mean over looks.
        balanced: the same under the placement in force, when the look came.
        moves: experts that units took over.
        placements: that were made.
    """

    looks: int = 0
    even: float = 0.0
    balanced: float = 0.0
    moves: int = 0
    placements: int = 0

    def add(self, even: float, balanced: float) -> None:
        """One more look."""
        self.looks += 1
        self.even += (even - self.even) / self.looks
        self.balanced += (balanced - self.balanced) / self.looks


class SimulatedExperts:
    """A unit's experts: tokens by topic so far, and the server's balancer over what they chose.

    Args:
        spec: sizes.
        ranks: of the unit.
        choices: what topics choose.
        figures: where looks are noted.
    """

    def __init__(
        self, spec: ExpertsSpec, ranks: int, choices: Choices, figures: ExpertFigures
    ) -> None:
        self.choices, self.figures = choices, figures
        self.balance = ExpertBalance(spec.even(ranks), spec.rule)
        self.tokens = np.zeros(len(choices.taste))

    def see(self, topic: int, tokens: float) -> None:
        """The unit computed tokens of a topic."""
        self.tokens[topic] += tokens

    def look(self, now_s: float) -> None:
        """The balancer's turn, and a note of what it showed."""
        b = self.balance
        judged, version, moves = b.judged, b.version, b.moves
        b.look(np.tensordot(self.tokens, self.choices.taste, 1), now_s)
        if b.judged > judged:
            self.figures.add(imbalance(b.weight, b.start), b.now)
        self.figures.moves += b.moves - moves
        self.figures.placements += b.version - version
