"""Peak tokens a second of prefill and decode units, and what bounds them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from whalefall.errors import ConfigError
from whalefall.model.config import ModelConfig
from whalefall.plan import kernels as k
from whalefall.plan.hardware_files import Hardware
from whalefall.plan.kernels import Kernel

__all__ = ["Phase", "Unit", "decode_capacity", "parse_unit", "prefill_capacity", "weight_bytes"]

MAX_BATCH = 4096
MAX_RANKS = 100_000


@dataclass(frozen=True)
class Unit:
    """One unit's nodes, GPUs a node, and redundant experts."""

    nodes: int
    gpus: int
    redundant: int = 32

    @property
    def ranks(self) -> int:
        """Expert-parallel ranks."""
        return self.nodes * self.gpus


def parse_unit(text: str, redundant: int = 32) -> Unit:
    """Read NODESxGPUS, e.g. "4x8"; ConfigError for anything else."""
    nodes, cross, gpus = text.partition("x")
    if cross and nodes.isdecimal() and gpus.isdecimal() and len(text) < 20:
        unit = Unit(int(nodes), int(gpus), redundant)
        if 1 <= unit.ranks <= MAX_RANKS:
            return unit
    raise ConfigError(f"unit {text!r}: wanted NODESxGPUS, e.g. 4x8, at most {MAX_RANKS:,} GPUs")


@dataclass(frozen=True)
class Phase:
    """What one phase reaches at its best batch.

    Attributes:
        tokens_s_node: peak tokens a second and node (prefill: computed tokens; see hit rate).
        batch: tokens (prefill) or sequences (decode) a GPU and step.
        step_s: time of a step.
        bound: what limits a layer: "compute" or "communication", and its longest kernel.
        kernels: the kernels of one MoE layer.
        kv_gb: KV memory a GPU has left.
    """

    tokens_s_node: float
    batch: float
    step_s: float
    bound: str
    kv_gb: float
    kernels: tuple[Kernel, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def local_experts(config: ModelConfig, unit: Unit) -> float:
    """Routed experts (replicas included) that one GPU of a unit holds."""
    return (config.num_experts + unit.redundant) / unit.ranks


def weight_bytes(config: ModelConfig, unit: Unit) -> float:
    """FP8 weights on one GPU (embedding and head in BF16), experts spread, the rest replicated."""
    attention = sum(k.attention_weights(config, absorbed=False).values())
    expert = k.expert_weights(config)
    moe_layers = config.num_layers - config.first_k_dense
    moe = (local_experts(config, unit) + config.num_shared_experts) * expert
    dense = 3.0 * config.hidden_size * config.intermediate_size
    tables = 2 * 2.0 * config.vocab_size * config.hidden_size
    return config.num_layers * attention + moe_layers * moe + config.first_k_dense * dense + tables


def layer_time(layer: list[Kernel]) -> tuple[float, str]:
    """Time of a layer with two micro-batches overlapped: the longer of work and communication."""
    links = [kernel for kernel in layer if kernel.kind in ("dispatch", "combine")]
    work = [kernel for kernel in layer if kernel not in links]
    compute, communication = sum(w.seconds for w in work), sum(c.seconds for c in links)
    side, name = (work, "compute") if compute >= communication else (links, "communication")
    longest = max(side, key=lambda kernel: kernel.seconds)
    return max(compute, communication), f"{name}: {longest.name} ({longest.bound})"


def prefill_capacity(
    config: ModelConfig,
    hardware: Hardware,
    unit: Unit,
    prompt_tokens: float,
    cached_tokens: float = 0.0,
    batch_tokens: int = 16_384,
) -> Phase:
    """Peak of a prefill unit.

    Args:
        prompt_tokens: mean prompt length, cached part included.
        cached_tokens: of these found in the cache.
        batch_tokens: tokens a GPU and step.
    """
    context = (prompt_tokens + cached_tokens) / 2
    share = hardware.efficiency.compute_sms
    tokens = float(batch_tokens)
    layer = [
        k.gemm(name, tokens, weights, hardware, share)
        for name, weights in k.attention_weights(config, absorbed=False).items()
    ]
    shared = config.num_shared_experts * k.expert_weights(config)
    layer += [
        k.prefill_attention(config, tokens, context, hardware, share),
        k.gemm("shared expert", tokens, shared, hardware, share),
        k.routed(config, tokens, local_experts(config, unit), hardware, share),
        k.dispatch(config, tokens, unit.nodes, hardware),
        k.combine(config, tokens, unit.nodes, hardware),
    ]
    seconds, bound = layer_time(layer)
    step = seconds * config.num_layers
    memory = hardware.memory_gb - weight_bytes(config, unit) / k.GIGA
    rate = unit.gpus * tokens / step
    return Phase(rate, tokens, step, bound, memory, tuple(layer))


def decode_layer(
    config: ModelConfig,
    hardware: Hardware,
    unit: Unit,
    batch: float,
    kv_length: float,
    kv_bytes: int,
) -> list[Kernel]:
    """The kernels of one decode layer for `batch` sequences a GPU."""
    layer = [
        k.gemm(name, batch, weights, hardware)
        for name, weights in k.attention_weights(config, absorbed=True).items()
    ]
    shared = config.num_shared_experts * k.expert_weights(config)
    return [
        *layer,
        k.decode_attention(config, batch, kv_length, hardware, kv_bytes),
        k.gemm("shared expert", batch, shared, hardware),
        k.routed(config, batch, local_experts(config, unit), hardware),
        k.dispatch(config, batch, unit.nodes, hardware, per_expert=True),
        k.combine(config, batch, unit.nodes, hardware, per_expert=True),
    ]


def decode_capacity(
    config: ModelConfig,
    hardware: Hardware,
    unit: Unit,
    kv_length: float,
    tpot_s: float = 0.05,
    kv_bytes: int = 2,
) -> Phase:
    """Peak of a decode unit: the largest batch that its memory holds and `tpot_s` allows.

    Raises: ConfigError where not even one sequence fits in memory or time.
    """
    left = hardware.memory_gb * k.GIGA * 0.9 - weight_bytes(config, unit)
    per_sequence = kv_length * config.latent_dim * kv_bytes * config.num_layers
    fits = int(min(left / per_sequence, MAX_BATCH))
    if fits < 1:
        raise ConfigError(
            f"plan capacity: {weight_bytes(config, unit) / k.GIGA:.0f} GB of weights and one "
            f"sequence of {kv_length:g} tokens do not fit in {hardware.memory_gb:g} GB; "
            "use more nodes in the unit"
        )

    def step(batch: float) -> tuple[float, str]:
        layer = decode_layer(config, hardware, unit, batch, kv_length, kv_bytes)
        seconds, bound = layer_time(layer)
        return seconds * config.num_layers, bound

    if step(1)[0] > tpot_s:
        raise ConfigError(
            f"plan capacity: one sequence takes {step(1)[0] * 1e3:.1f} ms a token, over the "
            f"{tpot_s * 1e3:.1f} ms asked for"
        )
    low, high = 1, fits
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if step(middle)[0] <= tpot_s else (low, middle - 1)
    seconds, bound = step(low)
    if low == fits:
        bound = f"memory for KV; then {bound}"
    kernels = tuple(decode_layer(config, hardware, unit, low, kv_length, kv_bytes))
    return Phase(unit.gpus * low / seconds, low, seconds, bound, left / k.GIGA, kernels)
