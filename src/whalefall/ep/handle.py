"""Ep room: what a dispatch leaves behind for the way back. Plain data.

# T tokens, R ranks, E experts, El experts of this rank, K top-k, H hosts, N rows received
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

__all__ = ["Handle", "Layout", "Received"]


@dataclass(frozen=True)
class Layout:
    """How a batch's tokens spread.

    Attributes:
        per_rank: [R] int32, tokens with an expert on the rank.
        per_host: [H] int32, tokens with an expert on the host.
        per_expert: [E] int32, selections of the expert.
        in_rank: [T, R] bool.
    """

    per_rank: np.ndarray
    per_host: np.ndarray
    per_expert: np.ndarray
    in_rank: np.ndarray


@dataclass
class Handle:
    """Where the rows of one dispatch came from.

    Attributes:
        num_experts: E; 0 where a dispatch had no top-k.
        top_k: K.
        per_selection: one row a selection (else one a token and rank).
        in_rank: [T, R] bool, this rank's tokens.
        topk_idx: [T, K] int64, per selection only.
        tokens: [R] int64, tokens of each source.
        rows: [R, R] int64, rows from each source to each rank.
        token: [N] int32, the source's token of each row.
        order: [N] int64, row of the j-th entry in order of (source, token, lane); per selection.
        order_token: [N] int32, its token.
        order_start: [R + 1] int64, the first entry of each source.
        expert_counts: [R, E] int64, selections of each source; None without top-k.
        forward: for each source of another host that this rank serves: tokens, masks, ids.
    """

    num_experts: int
    top_k: int
    per_selection: bool
    in_rank: np.ndarray
    topk_idx: np.ndarray | None
    tokens: np.ndarray
    rows: np.ndarray
    token: np.ndarray
    order: np.ndarray | None
    order_token: np.ndarray
    order_start: np.ndarray
    expert_counts: np.ndarray | None
    rows_per_expert: int = 0
    forward: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """Rows that this rank received."""
        return int(self.order_start[-1])


@dataclass
class Received:
    """What a dispatch brought; arrays are filled when the call (or its event) is done.

    Attributes:
        x: [N, …] rows of x.
        scale: [N, …] their scales, or None.
        topk_idx: [N, K] int64, experts of this rank from 0 on, −1 for those elsewhere; or None.
        topk_weights: [N, K] float32, 0 for experts elsewhere; per selection [N]; or None.
        per_expert: [El] int64 rows of each local expert; None without top-k.
        handle: for combine.
    """

    x: np.ndarray
    scale: np.ndarray | None
    topk_idx: np.ndarray | None
    topk_weights: np.ndarray | None
    per_expert: np.ndarray | None
    handle: Handle
