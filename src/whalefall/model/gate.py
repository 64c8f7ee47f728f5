"""Model room: a config's routing rules handed to `ep.route`, the project's only gate.

In: router logits and a `ModelConfig`. Out: expert ids and weights, best first.
Source: V2's groups count by their best expert, V3's by the sum of their two best with bias.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from whalefall.ep import route
from whalefall.model.config import ModelConfig

__all__ = ["choose_experts", "rules"]


def rules(config: ModelConfig) -> dict[str, Any]:
    """The keyword arguments of `ep.route` that a config stands for."""
    scoring: Literal["sigmoid", "softmax"] = "sigmoid" if config.scoring == "sigmoid" else "softmax"
    grouped = config.topk_method != "greedy" and config.n_group > 1
    return {
        "top_k": config.num_experts_per_tok,
        "num_groups": config.n_group if grouped else 1,
        "topk_groups": config.topk_group if grouped else 1,
        "scoring": scoring,
        "normalize": config.norm_topk_prob,
        "scale": config.routed_scaling_factor,
    }


def choose_experts(
    logits: np.ndarray, bias: np.ndarray | None, config: ModelConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Expert ids [tokens, top_k] int64 and weights [tokens, top_k] float32 of router logits."""
    return route(logits, bias, **rules(config))
