"""Ep room: what a dispatch leaves behind for the way back. Plain data.

# T tokens, R ranks, E experts, El experts of this rank, K top-k, H hosts, N rows received
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from whalefall.ep.topology import Topology

__all__ = ["HEADER_FIELDS", "Handle", "Layout", "Received", "Want"]

# A header is these int32, then per_rank [R], per_host [H], per_expert [E] of its rank's batch.
HEADER_FIELDS = (
    "kind",
    "tokens",
    "x_bytes",
    "scale_bytes",
    "top_k",
    "flags",
    "num_experts",
    "extra",
    "room",
    "room_at",
)


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


@dataclass(frozen=True)
class Want:
    """What a dispatch asks for, besides its arrays.

    Attributes:
        num_experts: E; 0 without top-k.
        top_k: K; 0 without top-k.
        per_selection: one row a selection (else one a token and rank).
        rows_per_expert: room of each local expert's group; 0: groups without gaps.
    """

    num_experts: int
    top_k: int
    per_selection: bool = False
    rows_per_expert: int = 0


class Handle:
    """Where the rows of one dispatch came from; filled once every rank's counts are known.

    Args:
        want: what was asked for.
        rank: this process.
        topology: hosts and ranks.
        in_rank: [T, R] bool, this rank's tokens.
        topk_idx: [T, K] int64, this rank's, per selection only.
    Attributes:
        tokens: [R] int64, tokens of each source.
        rows: [R, R] int64, rows from each source to each rank.
        token: [N] int32, the source's token of each row.
        order: [N] int64, row of the j-th entry in order of (source, token, lane); per selection.
        order_token: [N] int32, its token.
        order_start: [R + 1] int64, the first entry of each source.
        expert_counts: [R, El] int64, selections of this rank's experts by source; None without
            top-k.
        forward: for each source of another host that this rank serves: tokens, masks, ids.
    """

    tokens: np.ndarray
    rows: np.ndarray
    token: np.ndarray
    order: np.ndarray | None
    order_token: np.ndarray
    order_start: np.ndarray
    expert_counts: np.ndarray | None

    def __init__(
        self, want: Want, rank: int, topology: Topology, in_rank: np.ndarray,
        topk_idx: np.ndarray | None,
    ) -> None:  # fmt: skip
        self.want, self.rank, self.topology = want, rank, topology
        self.in_rank, self.topk_idx = in_rank, topk_idx
        self.forward: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def fill(self, heads: np.ndarray) -> None:
        """Take the counts from all ranks' headers [R, fields + R + H + E]."""
        R, want = self.topology.num_ranks, self.want
        at = len(HEADER_FIELDS)
        rows = heads[:, at : at + R].astype(np.int64)
        per_host = heads[:, at + R : at + R + len(self.topology.hosts)]
        self.expert_counts = None
        if want.num_experts:
            experts = heads[:, at + R + len(self.topology.hosts) :].reshape(R, R, -1)
            self.expert_counts = experts[:, self.rank].astype(np.int64)
            if want.per_selection:
                rows = experts.sum(2, dtype=np.int64)
        self.rows, self.tokens = rows, heads[:, 1].astype(np.int64)
        self.order_start = np.zeros(R + 1, np.int64)
        np.cumsum(rows[:, self.rank], out=self.order_start[1:])
        N = int(self.order_start[-1])
        self.token = np.empty(0, np.int32)
        self.order = np.empty(N, np.int64) if want.per_selection else None
        self.order_token = np.empty(N, np.int32)
        host = self.topology.host_of(self.rank)
        for source in self.topology.served(self.rank):
            n = int(per_host[source, host])
            self.forward[source] = (
                np.empty(n, np.int32), np.empty(n, np.uint64), np.empty((n, want.top_k), np.int32),
            )  # fmt: skip

    def first_rows(self, heads: np.ndarray) -> np.ndarray:
        """[E] int64, per selection: the row, at its rank, of this rank's first for each expert."""
        R = self.topology.num_ranks
        experts = heads[:, len(HEADER_FIELDS) + R + len(self.topology.hosts) :]
        counts = np.ascontiguousarray(experts.T).reshape(R, -1).astype(np.int64)  # [R, El·R]
        begin = np.cumsum(counts, 1) - counts
        return np.ascontiguousarray(begin.reshape(-1, R)[:, self.rank])

    @property
    def num_rows(self) -> int:
        """Rows that this rank received."""
        return int(self.order_start[-1])

    @property
    def num_local_experts(self) -> int:
        """El; 1 without top-k."""
        return max(1, self.want.num_experts // self.topology.num_ranks)

    def expert_cursor(self) -> np.ndarray:
        """[El, R] int64: the first row of each (local expert, source)."""
        assert self.expert_counts is not None
        counts = np.ascontiguousarray(self.expert_counts.T)  # [El, R]
        if room := self.want.rows_per_expert:
            begin = np.cumsum(counts, 1) - counts
            return begin + np.arange(len(counts))[:, None] * room
        flat = counts.reshape(-1)
        return (np.cumsum(flat) - flat).reshape(counts.shape)


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
    per_expert: np.ndarray | None = None
    handle: Handle = None  # type: ignore[assignment]  # set before anyone sees it
