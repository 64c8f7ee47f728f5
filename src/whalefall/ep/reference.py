"""Ep room: the definitions, in plain numpy; everything else in the room agrees with these.

# T tokens, E experts, K top-k, G groups
"""

from __future__ import annotations

from typing import Literal

import numpy as np

__all__ = ["route"]


def route(
    logits_TE: np.ndarray,
    bias_E: np.ndarray | None,
    top_k: int,
    num_groups: int = 1,
    topk_groups: int = 1,
    scoring: Literal["sigmoid", "softmax"] = "sigmoid",
    normalize: bool = True,
    scale: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Group-limited top-k gating; see `routing.route`, which checks its arguments."""
    x_TE = logits_TE.astype(np.float64)
    T, E = x_TE.shape
    with np.errstate(over="ignore"):
        if scoring == "softmax":
            p_TE = np.exp(x_TE - x_TE.max(1, keepdims=True))
            score_TE = (p_TE / p_TE.sum(1, keepdims=True)).astype(np.float32)
        else:
            score_TE = (1 / (1 + np.exp(-x_TE))).astype(np.float32)
    choice_TE = score_TE if bias_E is None else score_TE + bias_E
    if num_groups > 1:
        choice_TGe = choice_TE.reshape(T, num_groups, E // num_groups)
        best = 1 if scoring == "softmax" else min(2, E // num_groups)
        # added as float32, the greater first: what the native code does too
        group_TG = np.sort(choice_TGe, 2)[:, :, : -best - 1 : -1].sum(2, dtype=np.float32)
        kept_TG = _best(group_TG, topk_groups)
        dropped_TG = np.ones((T, num_groups), bool)
        np.put_along_axis(dropped_TG, kept_TG, False, 1)
        choice_TE = np.where(np.repeat(dropped_TG, E // num_groups, 1), -np.inf, choice_TE)
    idx_TK = _best(choice_TE, top_k)
    weight_TK = np.take_along_axis(score_TE, idx_TK, 1)
    if normalize:
        sum_T1 = np.zeros((T, 1), np.float32)
        for k in range(top_k):  # in top-k order
            sum_T1 += weight_TK[:, k : k + 1]
        weight_TK = np.divide(weight_TK, sum_T1, out=np.zeros_like(weight_TK), where=sum_T1 > 0)
    return idx_TK, weight_TK * np.float32(scale)


def _best(values: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k greatest of each row, descending; among equals the lowest index first."""
    return np.argsort(-values, axis=1, kind="stable")[:, :k].astype(np.int64)
