"""Experts over given codes, and even random routing: what two benchmarks multiply by."""

from __future__ import annotations

from typing import Any

import numpy as np

from whalefall import gemm


def experts_of(codes: Any, hidden: int, width: int) -> list[gemm.ExpertWeights]:
    """An expert for each of `codes` [experts, 3, hidden * width] E4M3, all scales 0.01."""
    up = np.full((-(-width // 128), -(-hidden // 128)), 0.01, np.float32)
    down = np.full((-(-hidden // 128), -(-width // 128)), 0.01, np.float32)
    return [
        gemm.ExpertWeights(
            e[0].reshape(width, hidden), e[1].reshape(width, hidden), e[2].reshape(hidden, width),
            up, up, down,
        )
        for e in codes
    ]  # fmt: skip


def choices(rng: np.random.Generator, tokens: int, experts: int, topk: int) -> Any:
    """[tokens, topk] int32, distinct experts for each token."""
    return np.stack([rng.permutation(experts)[:topk] for _ in range(tokens)]).astype(np.int32)
