"""The definition of attention, in float64: rows of keys, softmax, weighted values; and merging."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["attention", "merge", "with_sink"]

Doubles = npt.NDArray[np.float64]


def attention(
    q: npt.NDArray[Any],
    k: npt.NDArray[Any],
    v: npt.NDArray[Any],
    scale: float,
    sink: npt.NDArray[Any] | None = None,
    lonely_lse: float = np.inf,
) -> tuple[Doubles, Doubles, Doubles]:
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
    q, k, v = (x.astype(np.float64, copy=False) for x in (q, k, v))
    s = q @ k.T * scale  # [H, N]
    top = s.max(axis=1)
    weight = np.exp(s - top[:, None])
    lse = top + np.log(weight.sum(axis=1))
    out = (weight / weight.sum(axis=1)[:, None]) @ v
    return (out if sink is None else with_sink(out, lse, sink)), top, lse


def with_sink(out: Doubles, lse: Doubles, sink: npt.NDArray[Any]) -> Doubles:
    """Values [H, Dv] after a key without value has taken its weight; 0 stays 0 where no key was."""
    none = np.isinf(lse)
    with np.errstate(over="ignore"):
        more = np.exp(sink.astype(np.float64) - np.where(none, 0.0, lse))
    return np.where(none[:, None], out, out / (1.0 + more)[:, None])


def merge(
    out: npt.NDArray[Any], lse: npt.NDArray[Any], lonely_lse: float = np.inf
) -> tuple[Doubles, Doubles]:
    """Attention over all keys, of its results over disjoint parts of them.

    Args:
        out: [parts, rows, Dv]; lse: [parts, rows], an infinity for a part without keys.
    Returns: out [rows, Dv], lse [rows]; 0 and `lonely_lse` for a row that no part has keys for.
    """
    none = np.isinf(lse)  # of these parts, whatever they hold, nothing counts
    lse = np.where(none, -np.inf, lse.astype(np.float64))
    lonely = none.all(axis=0)
    top = np.where(lonely, 0.0, lse.max(axis=0, initial=-np.inf))
    weight = np.exp(lse - top)  # [parts, rows]
    total = np.where(lonely, 1.0, weight.sum(axis=0))
    parts = np.where(none[:, :, None], 0.0, out.astype(np.float64))
    merged = np.einsum("pr,prd->rd", weight / total, parts)
    return merged, np.where(lonely, lonely_lse, top + np.log(total))
