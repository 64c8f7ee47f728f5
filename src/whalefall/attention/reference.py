"""The definition of attention, in float64: rows of keys, softmax, weighted values."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["attention"]


def attention(
    q: npt.NDArray[Any],
    k: npt.NDArray[Any],
    v: npt.NDArray[Any],
    scale: float,
    sink: npt.NDArray[Any] | None = None,
    lonely_lse: float = np.inf,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """One query token over the keys that it sees.

    Args:
        q: [H, D]; k: [N, D]; v: [N, Dv]; N may be 0.
        sink: [H], natural units: the weight of a key without a value, left out of lse.
        lonely_lse: lse of a row without keys; its out is 0, its max_logits -inf.
    Returns: out [H, Dv], max_logits [H], lse [H] (natural log).
    """
    heads = q.shape[0]
    if len(k) == 0:
        none = np.full(heads, -np.inf)
        return np.zeros((heads, v.shape[-1])), none, np.full(heads, lonely_lse)
    s = q.astype(np.float64) @ k.astype(np.float64).T * scale  # [H, N]
    top = s.max(axis=1)
    weight = np.exp(s - top[:, None])
    lse = top + np.log(weight.sum(axis=1))
    out = (weight / weight.sum(axis=1)[:, None]) @ v.astype(np.float64)
    if sink is not None:
        with np.errstate(over="ignore"):
            out *= 1.0 / (1.0 + np.exp(sink.astype(np.float64) - lse))[:, None]
    return out, top, lse
