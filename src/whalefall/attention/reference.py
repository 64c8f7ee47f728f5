"""The definition of attention, in float64: rows of keys, softmax, weighted values; and merging."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["attention", "merge", "with_sink"]

Doubles = npt.NDArray[np.float64]
_FLOAT_MAX = float(np.finfo(np.float32).max)
_LOG2_E = math.log2(math.e)  # kernels keep scores in units of log2


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
    Returns: out [H, Dv], max_logits [H], lse [H] (natural log). A score beyond fp32's range is an
        infinity, as it is for kernels. A row whose weights' sum is NaN is NaN, its lse +inf; NaN
        has no say in max_logits. A row whose scores are all -inf is one without keys.
    """
    heads = q.shape[0]
    if len(k) == 0:
        none = np.full(heads, -np.inf)
        return np.zeros((heads, v.shape[-1])), none, np.full(heads, lonely_lse)
    q, k, v = (x.astype(np.float64, copy=False) for x in (q, k, v))
    with np.errstate(all="ignore"):
        s = (q @ k.T).astype(np.float32) if _beyond_fp32(q, k) else q @ k.T  # [H, N]
        s = s.astype(np.float64) * scale
        s = np.where(np.abs(s) * _LOG2_E > _FLOAT_MAX, np.copysign(np.inf, s), s)
        top = np.fmax.reduce(s, axis=1, initial=-np.inf)
        weight = np.exp(s - np.where(top == -np.inf, 0.0, top)[:, None])
        total = weight.sum(axis=1)
        lse = np.where(np.isnan(total), np.inf, top + np.log(total))
        out = (weight / total[:, None]) @ v
    lonely = total == 0
    out[lonely], lse[lonely] = 0.0, lonely_lse
    return (out if sink is None else with_sink(out, lse, sink)), top, lse


def _beyond_fp32(q: Doubles, k: Doubles) -> bool:
    """Whether a product of rows might overflow fp32; NaN and infinities may say what they like."""
    most = float(np.abs(q).max(initial=0)) * float(np.abs(k).max(initial=0)) * q.shape[1]
    return most > _FLOAT_MAX


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
        out: [parts, rows, Dv]; lse: [parts, rows], an infinity for a part without keys, or
            for one whose sum is NaN: that has NaN in `out`.
    Returns: out [rows, Dv], lse [rows]; 0 and `lonely_lse` for a row that no part has keys for;
        NaN and +inf where a part's lse is NaN, or its sum was.
    """
    none = np.isinf(lse) & ~np.isnan(out).any(axis=2)
    broken = ~(none | np.isfinite(lse)).all(axis=0)
    lse = np.where(none, -np.inf, lse.astype(np.float64))
    lonely = none.all(axis=0)
    top = np.where(lonely, 0.0, lse.max(axis=0, initial=-np.inf))
    weight = np.exp(lse - top)  # [parts, rows]
    total = np.where(lonely, 1.0, weight.sum(axis=0))
    parts = np.where(none[:, :, None], 0.0, out.astype(np.float64))
    merged = np.einsum("pr,prd->rd", weight / total, parts)
    merged[broken] = np.nan
    lse = np.where(lonely, lonely_lse, top + np.log(total))
    return merged, np.where(broken, np.inf, lse)
