"""Engine room: what a step of a checkpoint reads, for the rule that switches drafts off.

In: weights in place. Out: `StepCosts` in bytes.
"""

from __future__ import annotations

from collections.abc import Iterator

from whalefall.engine.core import StepCosts
from whalefall.model import ModelConfig, Weights
from whalefall.model.weights import Experts, Layer, Linear, Mlp

__all__ = ["step_costs"]


def step_costs(weights: Weights, config: ModelConfig) -> StepCosts:
    """Bytes that a step, an expert and the MTP layer read."""
    routed = [layer.mlp for layer in weights.layers if isinstance(layer.mlp, Experts)]
    step = sum(map(_layer_bytes, weights.layers)) + _linear_bytes(weights.head)
    mtp = weights.mtp[0] if weights.mtp else None
    draft = 0
    if mtp is not None:
        draft = _layer_bytes(mtp.layer) + _linear_bytes(mtp.eh_proj) + _linear_bytes(mtp.head)
    return StepCosts(
        step=step,
        expert=_mlp_bytes(routed[0].experts[0]) if routed else 0,
        draft=draft,
        top_k=config.num_experts_per_tok,
        draft_experts=mtp is not None and isinstance(mtp.layer.mlp, Experts),
    )


def _linear_bytes(linear: Linear | None) -> int:
    return 0 if linear is None else linear.weight.nbytes


def _mlp_bytes(mlp: Mlp | None) -> int:
    return 0 if mlp is None else sum(map(_linear_bytes, (mlp.gate, mlp.up, mlp.down)))


def _always_read(layer: Layer) -> Iterator[int]:
    a = layer.attention
    yield from map(_linear_bytes, (a.q, a.q_a, a.q_b, a.kv_a, a.kv_b, a.o))
    if isinstance(layer.mlp, Experts):
        yield _linear_bytes(layer.mlp.gate_weight) + _mlp_bytes(layer.mlp.shared)
    else:
        yield _mlp_bytes(layer.mlp)


def _layer_bytes(layer: Layer) -> int:
    """What a layer reads for any token: all but the routed experts."""
    return sum(_always_read(layer))
