"""The published cluster as the simulator takes it: peaks by roofline, set points as published."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from pathlib import Path

from whalefall.errors import ConfigError
from whalefall.model.config import ModelConfig
from whalefall.plan import published
from whalefall.plan.capacity import (
    Unit,
    decode_capacity,
    decode_layer,
    layer_time,
    prefill_capacity,
)
from whalefall.plan.hardware_files import Hardware
from whalefall.serve.simulated_cluster import ClusterSpec, Day
from whalefall.serve.simulated_experts import ExpertsSpec

__all__ = ["cluster_spec", "default_curve", "published_day", "read_curve"]

PROMPT = 4096.0


def cluster_spec(
    config: ModelConfig, hardware: Hardware, prefill: Unit, decode: Unit, hit_rate: float
) -> ClusterSpec:
    """Units of a model on a kind of node; the autoscaler aims at the published daily averages."""
    first = prefill_capacity(config, hardware, prefill, PROMPT, PROMPT * hit_rate)
    length = float(published.MEAN_KV_LENGTH)
    second = decode_capacity(config, hardware, decode, length)
    per_token = config.latent_dim * 2 * config.num_layers
    return ClusterSpec(
        prefill_nodes=prefill.nodes,
        decode_nodes=decode.nodes,
        prefill_tokens_s=first.tokens_s_node * prefill.nodes,
        decode_step_s=step_table(config, hardware, decode, length, second.batch),
        decode_max_requests=second.batch * decode.ranks,
        decode_kv_tokens=second.kv_gb * 1e9 / per_token * decode.ranks,
        prefill_set_point=published.PREFILL_TOKENS_S_NODE,
        decode_set_point=published.DECODE_TOKENS_S_NODE,
        experts=experts_spec(config, prefill, decode),
    )


def experts_spec(config: ModelConfig, prefill: Unit, decode: Unit) -> ExpertsSpec | None:
    """The experts of units; None where a model or a unit has none to spread."""
    if not config.num_experts or min(prefill.ranks, decode.ranks) < 2:
        return None
    return ExpertsSpec(
        config.num_experts,
        config.num_experts_per_tok,
        prefill.redundant,
        prefill.ranks,
        decode.ranks,
    )


def step_table(
    config: ModelConfig, hardware: Hardware, unit: Unit, length: float, batch: float
) -> Callable[[float], float]:
    """Step time of a unit by its sequences, joined by straight lines between 65 batches."""
    batches = [max(1.0, batch * i / 64) for i in range(65)]
    steps = [
        layer_time(decode_layer(config, hardware, unit, b, length, 2))[0] * config.num_layers
        for b in batches
    ]

    def step_s(requests: float) -> float:
        each = requests / unit.ranks
        right = min(max(1, bisect.bisect_left(batches, each)), len(batches) - 1)
        low, high = batches[right - 1], batches[right]
        share = min(1.0, max(0.0, (each - low) / (high - low))) if high > low else 0.0
        return steps[right - 1] * (1 - share) + steps[right] * share

    return step_s


def default_curve() -> tuple[float, ...]:
    """A day's shape by hour: flat, with one smooth night whose floor is the published 68 : 278."""
    floor = 68 / published.PEAK_NODES
    night, width = 5.0, 3.2
    return tuple(1 - (1 - floor) * math.exp(-(((hour - night) / width) ** 4)) for hour in range(24))


def read_curve(path: Path) -> tuple[float, ...]:
    """Relative loads, one a line (24 for hours); ConfigError for anything else."""
    if not path.is_file():
        raise ConfigError(f"serve simulate: no traffic file {path}")
    values = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split(), 1):
        try:
            values.append(float(line))
        except ValueError:
            raise ConfigError(f"serve simulate: {path}: {line!r} is no number") from None
        if not 0 <= values[-1] < math.inf:
            raise ConfigError(f"serve simulate: {path}: value {number} is {line}, wanted 0 or more")
    if len(values) < 2 or sum(values) == 0:
        raise ConfigError(f"serve simulate: {path} has {len(values)} values, wanted 2 or more")
    return tuple(values)


def published_day(curve: tuple[float, ...], weight: int) -> Day:
    """The published totals, spread over a curve."""
    rate = published.HIT_TOKENS / published.INPUT_TOKENS
    return Day(curve, published.INPUT_TOKENS, rate, published.OUTPUT_TOKENS, PROMPT, weight)
