"""The definition again for long lists of keys: products in fp32, held to float64 as it goes.

`attention` of `reference.py` is the truth. At the grids' sizes its float64 takes longer than the
kernels at all levels together, so there the products are fp32, by BLAS, and every 32nd call has a
row computed in float64 too, to whom it must be 50 times closer than any kernel needs to be.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch

from whalefall.attention.reference import attention

EVERY = 32
CLOSE = 1.6e-5  # of out; the least that a kernel is granted is 8e-4
CLOSE_LSE = 5e-7  # of lse and 1: the least that a kernel is granted is 3e-5 of it, or 1e-6
calls = itertools.count()


def floats(x: Any) -> torch.Tensor:
    """An array in bf16, fp16 or fp32 as fp32."""
    x = np.ascontiguousarray(x)
    if x.dtype.itemsize == 2 and x.dtype != np.float16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).float()
    return torch.from_numpy(x).float()


def quick(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    sink: Any = None,
    seen: torch.Tensor | None = None,
    lonely_lse: float = np.inf,
) -> tuple[Any, Any, Any]:
    """`attention` of fp32 q [R, D], k [N, D], v [N, Dv]; row r sees the first `seen[r]` keys."""
    rows = len(q)
    if len(k) == 0 or rows == 0:
        none = np.full(rows, -np.inf, np.float32)
        return np.zeros((rows, v.shape[1]), np.float32), none, np.full(rows, lonely_lse)
    score = (q @ k.T).mul_(scale)
    if seen is not None:
        score.masked_fill_(torch.arange(len(k)) >= seen[:, None], -np.inf)
    top = score.amax(1)
    weight = score.sub_(torch.where(top == -np.inf, 0, top)[:, None]).exp_()
    total = weight.sum(1, dtype=torch.float64)
    lse = torch.where(total == 0, lonely_lse, top + total.log())
    out = (weight @ v).div_(torch.where(total == 0, 1, total).float()[:, None])
    if sink is not None:
        out *= torch.sigmoid(lse - torch.from_numpy(sink).double()).float()[:, None]
    number = next(calls)
    if number % EVERY == 0:
        row = number // EVERY % rows
        count = len(k) if seen is None else int(seen[row].clamp(min=0))
        one = slice(row, row + 1)
        hold_to_float64(
            attention(
                *(x.numpy() for x in (q[one], k[:count], v[:count])),
                scale,
                None if sink is None else sink[one],
                lonely_lse,
            ),
            (out[one].numpy(), top[one].numpy(), lse[one].numpy()),
        )
    return out.numpy(), top.numpy(), lse.numpy()


def hold_to_float64(wanted: tuple[Any, ...], got: tuple[Any, ...]) -> None:
    """out, max_logits and lse; infinities are the same ones."""
    for want, have, close in zip(wanted, got, (CLOSE, CLOSE_LSE, CLOSE_LSE), strict=True):
        finite = np.isfinite(want)
        assert (have[~finite] == want[~finite]).all()
        error = np.abs(have[finite] - want[finite])
        assert (error <= close * np.maximum(1, np.abs(want[finite]))).all(), error.max()
