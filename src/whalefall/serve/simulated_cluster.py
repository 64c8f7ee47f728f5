"""What a simulated cluster is made of: its units, a day's traffic, the outcome."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from whalefall.serve.core import PrefillLoad
from whalefall.serve.simulated_experts import ExpertFigures, ExpertsSpec, SimulatedExperts

__all__ = ["DAY_S", "ClusterSpec", "Day", "DecodeUnit", "Outcome", "PrefillUnit"]

DAY_S = 86_400.0


@dataclass(frozen=True)
class ClusterSpec:
    """The units' sizes and speeds.

    Attributes:
        prefill_nodes, decode_nodes: nodes in a unit.
        prefill_tokens_s: computed tokens a second of a prefill unit, at its peak.
        decode_step_s: step time of a decode unit for a number of sequences in all its ranks.
        decode_max_requests, decode_kv_tokens: what a decode unit can hold.
        prefill_set_point: input tokens (hits included) a second and node to aim at.
        decode_set_point: output tokens a second and node to aim at.
        start_s: from the decision to the first request.
        interval_s: between the autoscaler's looks.
        calm_s, smooth_s: low load before a unit is drained; time constant of the load's average.
        experts: of the model; None: it has none.
    """

    prefill_nodes: int
    decode_nodes: int
    prefill_tokens_s: float
    decode_step_s: Callable[[float], float]
    decode_max_requests: float
    decode_kv_tokens: float
    prefill_set_point: float
    decode_set_point: float
    start_s: float = 120.0
    interval_s: float = 60.0
    calm_s: float = 300.0
    smooth_s: float = 600.0
    experts: ExpertsSpec | None = None


@dataclass(frozen=True)
class Day:
    """The traffic.

    Attributes:
        curve: relative load of each hour; joined by straight lines, around the clock.
        input_tokens, hit_rate, output_tokens: of the whole day.
        prompt, answer: mean tokens of a request; lengths are exponential around them (those of
            prompts are averaged over the requests that travel together).
        weight: real requests that a simulated one stands for.
    """

    curve: tuple[float, ...]
    input_tokens: float
    hit_rate: float
    output_tokens: float
    prompt: float = 4096.0
    weight: int = 300

    @property
    def answer(self) -> float:
        """Mean output tokens of a request."""
        return self.prompt * self.output_tokens / self.input_tokens

    def rate(self, now_s: float) -> float:
        """Simulated requests a second at a time of day."""
        hours = len(self.curve)
        position = now_s / DAY_S * hours
        left = int(position) % hours
        share = position - int(position)
        level = self.curve[left] * (1 - share) + self.curve[(left + 1) % hours] * share
        mean = sum(self.curve) / hours
        return self.input_tokens / self.prompt / self.weight / DAY_S * level / mean


@dataclass
class PrefillUnit:
    """A queue at a constant rate, known by when it will be done with what it has."""

    ready_s: float
    load: PrefillLoad = field(default_factory=PrefillLoad)
    free_s: float = 0.0
    draining: bool = False
    experts: SimulatedExperts | None = None


@dataclass
class DecodeUnit:
    """Sequences that advance together.

    Attributes:
        clock: tokens that a sequence present since the start would have generated.
        finish: (clock at which a sequence is done, KV tokens, start time, tokens, topic), a heap.
    """

    ready_s: float
    clock: float = 0.0
    now_s: float = 0.0
    kv: float = 0.0
    finish: list[tuple[float, float, float, float, int]] = field(default_factory=list)
    draining: bool = False
    experts: SimulatedExperts | None = None


@dataclass
class Outcome:
    """What a run showed.

    Attributes:
        average_nodes, peak_nodes: over the day, units that start or drain included.
        curve: (hour, nodes) samples.
        ttft_s, tpot_s: percentiles 50, 90, 99.
        prefill_utilisation, decode_utilisation: busy share of the nodes' peak.
        input_tokens, output_tokens, requests: real ones, as served.
        waited: simulated requests that found no decode unit with room at first.
        experts: kind of unit → what the expert balancer did; empty without experts.
    """

    average_nodes: float
    peak_nodes: int
    curve: list[tuple[float, int]]
    ttft_s: list[float]
    tpot_s: list[float]
    prefill_utilisation: float
    decode_utilisation: float
    input_tokens: float
    hit_tokens: float
    output_tokens: float
    requests: int
    waited: int
    experts: dict[str, ExpertFigures]
