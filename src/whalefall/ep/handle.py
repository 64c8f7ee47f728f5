"""Ep room: what a dispatch leaves behind for the way back. Plain data.

# T tokens, R ranks, E experts, El experts of this rank, K top-k, H hosts, N rows received
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np

from whalefall.ep.library import pointer
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
    "call",  # how many collectives the rank called before
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

    @classmethod
    def nothing(cls, ranks: int, hosts: int) -> Layout:
        """Of no tokens and no experts: what a barrier sends."""
        ranks_32, hosts_32 = np.zeros(ranks, np.int32), np.zeros(hosts, np.int32)
        return cls(ranks_32, hosts_32, np.zeros(0, np.int32), np.zeros((0, ranks), bool))


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
        in_rank: [T, R] bool, this rank's tokens: an array, or a tensor.
        topk_idx: [T, K] int64, this rank's, per selection only.
    Attributes:
        serial: of the dispatch, the same on all ranks.
        heads_at: address of `heads`.
        num_rows: N, rows that this rank received.
        room: rows of the arrays that they lie in, where those have more (`num_worst_tokens`).
        most_tokens: of a rank.
        token: [N] int32, the source's token of each row.
        order: [N] int64, row of the j-th entry in order of (source, token, lane); per selection.
        order_token: [N] int32, its token.
        forward: for each source of another host that this rank serves: tokens, masks, ids.
    """

    serial: int
    heads_at: int
    told: Any  # heads, as the native side has filled them
    num_rows: int
    room: int = 0
    most_tokens: int
    token: np.ndarray
    order: np.ndarray | None
    order_token: np.ndarray

    def __init__(
        self, want: Want, rank: int, topology: Topology, in_rank: Any, topk_idx: np.ndarray | None
    ) -> None:
        self.want, self.rank, self.topology = want, rank, topology
        self.num_tokens = in_rank.shape[0]
        self._in_rank, self.topk_idx = in_rank, topk_idx
        self.forward: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def fill(self, heads: np.ndarray) -> None:
        """Take the counts from all ranks' headers."""
        self.heads, self.heads_at = heads, pointer(heads) or 0
        self.num_rows, self.most_tokens = int(self.order_start[-1]), int(self.tokens.max(initial=0))
        self.make_lists()

    def make_lists(self) -> None:
        """Room for what comes beside the rows, whose sizes the counts fix."""
        N, want, hosts = self.num_rows, self.want, len(self.topology.hosts)
        self.token = np.empty(0, np.int32)
        self.order = np.empty(N, np.int64) if want.per_selection else None
        self.order_token = np.empty(N, np.int32)
        host, at = self.topology.host_of(self.rank), len(HEADER_FIELDS) + self.topology.num_ranks
        per_host = self.heads[:, at : at + hosts]
        for source in self.topology.served(self.rank):
            n = int(per_host[source, host])
            self.forward[source] = (
                np.empty(n, np.int32), np.empty(n, np.uint64), np.empty((n, want.top_k), np.int32),
            )  # fmt: skip

    @cached_property
    def heads(self) -> np.ndarray:
        """[R, fields + R + H + E] int32, all ranks' headers."""
        R = self.topology.num_ranks
        length = len(HEADER_FIELDS) + R + len(self.topology.hosts) + self.want.num_experts
        return np.frombuffer(self.told, np.int32, R * length).reshape(R, length)

    @property
    def in_rank(self) -> np.ndarray:
        """[T, R] bool."""
        if not isinstance(self._in_rank, np.ndarray):
            self._in_rank = self._in_rank.numpy()
        return cast(np.ndarray, self._in_rank)

    @cached_property
    def tokens(self) -> np.ndarray:
        """[R] int64, tokens of each source."""
        return self.heads[:, HEADER_FIELDS.index("tokens")].astype(np.int64)

    @cached_property
    def _experts(self) -> np.ndarray:
        R = self.topology.num_ranks
        at = len(HEADER_FIELDS) + R + len(self.topology.hosts)
        return self.heads[:, at:].reshape(R, R, -1)  # [source, rank, El]

    @cached_property
    def rows(self) -> np.ndarray:
        """[R, R] int64, rows from each source to each rank."""
        if self.want.per_selection:
            return self._experts.sum(2, dtype=np.int64)
        at = len(HEADER_FIELDS)
        return self.heads[:, at : at + self.topology.num_ranks].astype(np.int64)

    @cached_property
    def order_start(self) -> np.ndarray:
        """[R + 1] int64, the first entry of each source."""
        start = np.zeros(self.topology.num_ranks + 1, np.int64)
        np.cumsum(self.rows[:, self.rank], out=start[1:])
        return start

    @cached_property
    def expert_counts(self) -> np.ndarray | None:
        """[R, El] int64, selections of this rank's experts by source; None without top-k."""
        if not self.want.num_experts:
            return None
        return self._experts[:, self.rank].astype(np.int64)

    @cached_property
    def addresses(self) -> tuple[int | None, int | None, int | None, int | None]:
        """Of order, order_token, in_rank and topk_idx; asked for once these are there."""
        of = self.order, self.order_token, self.in_rank, self.topk_idx
        order, order_token, in_rank, topk_idx = (pointer(a) for a in of)
        return order, order_token, in_rank, topk_idx

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
