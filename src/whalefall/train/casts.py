"""Train room: FP8 operands of torch tensors, the published tiles.

In: fp32 or bf16 matrices. Out: E4M3 values with fp32 scales, bit for bit what `gemm`'s casts give,
made by torch's own vector code, and for grouped rows too.
Source: DeepSeek-V3 report, 3.3.2: activations 1×128, weights 128×128; 128×1 for weight gradients.

# T rows, K columns, G groups, N rows of a weight
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["TILE", "cast_blocks", "cast_columns", "cast_rows"]

TILE = 128
MAXIMUM = 448.0
SMALLEST = 1e-4  # a tile's largest magnitude counts as at least this
FP8 = torch.float8_e4m3fn


def _scale(largest: Tensor) -> Tensor:
    return largest.clamp(min=SMALLEST) / MAXIMUM


def cast_rows(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Each 128 of a row get a scale: values [T, K] E4M3, scales [T, ceil(K / 128)] fp32."""
    rows, columns = x_TK.shape
    wide = torch.nn.functional.pad(x_TK.float(), (0, -columns % TILE))
    tiles = wide.view(rows, wide.shape[1] // TILE, TILE)
    scale = _scale(tiles.abs().amax(-1))
    values = (tiles * scale.reciprocal()[:, :, None]).to(FP8).view(wide.shape)
    return values[:, :columns].contiguous(), scale


def cast_blocks(w_GNK: Tensor) -> tuple[Tensor, Tensor]:
    """Each 128×128 block of each matrix gets a scale.

    Returns: values [G, N, K] E4M3, scales [G, ceil(N / 128), ceil(K / 128)] fp32.
    """
    groups, rows, columns = w_GNK.shape
    wide = torch.nn.functional.pad(w_GNK.float(), (0, -columns % TILE, 0, -rows % TILE))
    blocks = wide.view(groups, wide.shape[1] // TILE, TILE, wide.shape[2] // TILE, TILE)
    scale = _scale(blocks.abs().amax((2, 4)))
    values = (blocks * scale.reciprocal()[:, :, None, :, None]).to(FP8).view(wide.shape)
    return values[:, :rows, :columns].contiguous(), scale


def cast_columns(x_TK: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Each 128 rows of a column get a scale; tiles begin anew with every group of rows.

    Args:
        counts: rows of each group, in order; together T.
    Returns: values [T, K] E4M3, scales [sum of ceil(count / 128), K] fp32.
    """
    x_TK = x_TK.float()
    tiles_of = [-(-count // TILE) for count in counts]
    wide = x_TK.new_zeros(sum(tiles_of) * TILE, x_TK.shape[1])
    start = at = 0
    for count, tiles in zip(counts, tiles_of, strict=True):
        wide[at : at + count] = x_TK[start : start + count]
        start, at = start + count, at + tiles * TILE
    tiles_TK = wide.view(sum(tiles_of), TILE, x_TK.shape[1])
    scale = _scale(tiles_TK.abs().amax(1))
    filled = (tiles_TK * scale.reciprocal()[:, None]).to(FP8).view(wide.shape)
    if len(wide) == len(x_TK):
        return filled, scale
    values = torch.empty_like(x_TK, dtype=FP8)
    start = at = 0
    for count, tiles in zip(counts, tiles_of, strict=True):
        values[start : start + count] = filled[at : at + count]
        start, at = start + count, at + tiles * TILE
    return values, scale
