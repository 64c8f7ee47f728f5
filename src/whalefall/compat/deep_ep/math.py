"""`deep_ep.utils.math`: casts, closeness and hashes of the original's scripts.

Source: DeepEP dd758ca `deep_ep/utils/math.py`.

# T tokens, N columns, E experts, G groups
"""

from __future__ import annotations

from typing import Any

import torch

from whalefall.compat.deep_gemm.testing import count_bytes
from whalefall.gemm.casts import align, ceil_div

__all__ = [
    "align",
    "calc_diff",
    "ceil_div",
    "count_bytes",
    "create_grouped_scores",
    "hash_tensor",
    "hash_tensors",
    "inplace_unique",
    "per_token_cast_back",
    "per_token_cast_to_fp8",
    "safe_div",
]

BLOCK = 128  # channels that share a scale
LARGEST = 448.0  # of E4M3


def calc_diff(x: torch.Tensor, y: torch.Tensor) -> float:
    """1 − 2 Σab / Σ(a² + b²) in float64 with a = x + 1, b = y + 1."""
    a, b = x.double() + 1, y.double() + 1
    return float(1 - 2 * (a * b).sum() / (a.square() + b.square()).sum())


def safe_div(a: float, b: float) -> float:
    """a / b; 0 where both are zero.

    Raises: ZeroDivisionError.
    """
    return 0 if a == 0 and b == 0 else a / b


def _blocks(x: torch.Tensor) -> torch.Tensor:
    """[T, N] as float32 [T, blocks, 128], zeros appended."""
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % BLOCK))
    return padded.view(len(x), padded.shape[1] // BLOCK, BLOCK)


def per_token_cast_to_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, N] to E4M3 [T, N] and float32 scales [T, ceil(N / 128)] = max(|x|, 1e-4) / 448."""
    blocks = _blocks(x)
    largest = blocks.abs().amax(2).clamp_min(1e-4)
    codes = (blocks * (LARGEST / largest).unsqueeze(2)).to(torch.float8_e4m3fn)
    return codes.flatten(1)[:, : x.shape[1]].contiguous(), largest / LARGEST


def per_token_cast_back(x_fp8: torch.Tensor, x_scales: torch.Tensor) -> torch.Tensor:
    """E4M3 [T, N] times float32 scales, or int32 of four exponents each, as bfloat16."""
    if x_scales.dtype == torch.int32:
        exponents = x_scales.contiguous().view(torch.uint8).to(torch.int32)
        x_scales = (exponents << 23).view(torch.float32)
    blocks = _blocks(x_fp8) * x_scales.reshape(len(x_fp8), -1, 1)
    return blocks.flatten(1)[:, : x_fp8.shape[1]].to(torch.bfloat16)


def inplace_unique(x: torch.Tensor, num_slots: int) -> None:
    """Leave of each row's values 0 … num_slots − 1 one each, the largest first, then −1."""
    ordered = x.sort(dim=1, descending=True).values
    ordered[:, 1:].masked_fill_(ordered[:, 1:] == ordered[:, :-1], -1)
    ordered.masked_fill_(ordered < 0, -1)
    x.copy_(ordered.sort(dim=1, descending=True).values)


def create_grouped_scores(
    scores: torch.Tensor, group_idx: torch.Tensor, num_groups: int
) -> torch.Tensor:
    """[T, E] scores, 0 outside the groups of experts that `group_idx` [T, …] names."""
    chosen = torch.zeros(len(scores), num_groups, dtype=torch.bool).scatter_(1, group_idx, True)
    return scores * chosen.repeat_interleave(scores.shape[1] // num_groups, 1)


def hash_tensor(t: torch.Tensor) -> int:
    """The sum of its int32 words."""
    return int(t.view(torch.int32).sum())


def hash_tensors(*tensors: Any) -> int:
    """The hashes of all tensors, nested in tuples and lists or None, under exclusive or."""
    value = 0
    for one in tensors:
        if isinstance(one, (tuple, list)):
            value ^= hash_tensors(*one)
        elif isinstance(one, torch.Tensor):
            value ^= hash_tensor(one)
    return value
