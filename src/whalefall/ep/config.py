"""Ep room: the original's tuning values and buffer sizes, to the byte, as its callers compute them.

Our engine takes memory as it needs it; these sizes are what callers ask for and compare.
Source: DeepEP `Config`, `Buffer.get_dispatch_config`, `get_low_latency_rdma_size_hint`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from whalefall.arguments import whole
from whalefall.ep.arguments import MOST
from whalefall.errors import ConfigError

__all__ = ["Config", "combine_config", "dispatch_config", "low_latency_size_hint"]

NVL_PEERS = 8  # ranks of a node in the original


def _up(value: int, to: int = 128) -> int:
    return -(-value // to) * to


@dataclass(frozen=True)
class Config:
    """Chunk sizes of the original's kernels; ours chooses its own, and keeps these for the sizes.

    Raises: ConfigError for values that the original refuses.
    """

    num_sms: int = 20
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256

    def __post_init__(self) -> None:
        for field in fields(self):
            whole(f"Config: {field.name}", getattr(self, field.name), 0, MOST)
        send, recv = self.num_max_rdma_chunked_send_tokens, self.num_max_rdma_chunked_recv_tokens
        if not 0 < self.num_max_nvl_chunked_send_tokens < self.num_max_nvl_chunked_recv_tokens:
            raise ConfigError(
                f"Config: nvl send {self.num_max_nvl_chunked_send_tokens}, receive "
                f"{self.num_max_nvl_chunked_recv_tokens}; wanted 0 < send < receive"
            )
        if not 0 < send < recv:
            raise ConfigError(
                f"Config: rdma send {send}, receive {recv}; wanted 0 < send < receive"
            )
        object.__setattr__(self, "num_max_rdma_chunked_recv_tokens", _up(recv, send))

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes for the traffic within a host.

        Args:
            hidden_bytes: of one token's row.
            num_ranks: of the group.
        """
        _sizes(hidden_bytes, num_ranks)
        channels, peers = self.num_sms // 2, min(num_ranks, NVL_PEERS)
        nodes = max(num_ranks // NVL_PEERS, 1)
        queue = self.num_max_nvl_chunked_recv_tokens
        heads = 4 * channels * peers * (2 * nodes + 3)
        return _up(heads + channels * peers * queue * (hidden_bytes + 2056))

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes for the traffic between hosts; 0 for at most 8 ranks."""
        _sizes(hidden_bytes, num_ranks)
        if num_ranks <= NVL_PEERS:
            return 0
        channels, nodes = self.num_sms // 2, num_ranks // NVL_PEERS
        queue = self.num_max_rdma_chunked_recv_tokens
        heads = 144 * channels * nodes
        return _up(heads + 2 * channels * nodes * queue * (hidden_bytes + 2072))


def _sizes(hidden_bytes: int, num_ranks: int) -> None:
    whole("Config: hidden_bytes", hidden_bytes, 0, MOST)
    whole("Config: num_ranks", num_ranks, 1, MOST)


# ranks: nvl send, nvl receive, rdma send, rdma receive
_DISPATCH = {
    2: (24, 256, 6, 128), 4: (6, 256, 6, 128), 8: (6, 256, 6, 128), 16: (36, 288, 20, 128),
    24: (32, 288, 8, 128), 32: (32, 288, 8, 128), 48: (32, 288, 8, 128), 64: (32, 288, 8, 128),
    96: (20, 480, 12, 128), 128: (20, 560, 12, 128), 144: (32, 720, 12, 128),
    160: (28, 720, 12, 128),
}  # fmt: skip
_COMBINE = {
    2: (10, 256, 6, 128), 4: (9, 256, 6, 128), 8: (4, 256, 6, 128), 16: (4, 288, 12, 128),
    24: (1, 288, 8, 128), 32: (1, 288, 8, 128), 48: (1, 288, 8, 128), 64: (1, 288, 8, 128),
    96: (1, 480, 8, 128), 128: (1, 560, 8, 128), 144: (2, 720, 8, 128), 160: (2, 720, 8, 128),
}  # fmt: skip


def _nearest(table: dict[int, tuple[int, int, int, int]], num_ranks: int, num_sms: int) -> Config:
    whole("ep: num_ranks", num_ranks, 1, MOST)
    known = min((k for k in table if k >= num_ranks), default=max(table))
    return Config(num_sms, *table[known])


def dispatch_config(num_ranks: int, num_sms: int) -> Config:
    """The original's values for dispatch; for a number it does not know, the next larger one's."""
    return _nearest(_DISPATCH, num_ranks, num_sms)


def combine_config(num_ranks: int, num_sms: int) -> Config:
    """The original's values for combine; for a number it does not know, the next larger one's."""
    return _nearest(_COMBINE, num_ranks, num_sms)


def low_latency_size_hint(max_tokens: int, hidden: int, num_experts: int) -> int:
    """Bytes of a buffer for the low-latency form: two slots, each for a dispatch or a combine.

    Args:
        max_tokens: of a rank and dispatch.
        hidden: elements of a row.
        num_experts: E.
    """
    for name, value in (
        ("max_tokens", max_tokens),
        ("hidden", hidden),
        ("num_experts", num_experts),
    ):
        whole(f"get_low_latency_rdma_size_hint: {name}", value, 0, MOST)
    scales = hidden // 128
    dispatch = 16 + max(2 * hidden, hidden + 4 * scales)
    combine = 4 * scales + 2 * hidden
    send = 2 * max(max_tokens * dispatch, num_experts * max_tokens * combine)
    recv = 2 * num_experts * max_tokens * max(dispatch, combine)
    signals = 2 * _up(4 * num_experts)
    return ((send + recv + signals) // 128 + 1) * 128
