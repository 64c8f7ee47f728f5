"""Ep room: how a batch spreads over experts, ranks and hosts, counted before it is sent.

# T tokens, R ranks, E experts, K top-k, H hosts
"""

from __future__ import annotations

import numpy as np

from whalefall.arguments import whole
from whalefall.ep.arguments import arrays
from whalefall.ep.handle import Layout
from whalefall.ep.library import library
from whalefall.errors import DtypeError, LimitError

__all__ = ["count_spread"]

MAX_TOP_K = 128


def count_spread(
    topk_idx: np.ndarray, num_experts: int, host_of: np.ndarray, num_hosts: int
) -> Layout:
    """Which ranks and hosts the tokens of a batch go to, and how many each expert gets.

    Args:
        topk_idx: [T, K] int64; −1 is not sent.
        num_experts: E, a multiple of the ranks.
        host_of: [R] int32, each rank's host.
        num_hosts: H.
    Raises: ConfigError, DtypeError; LimitError for an expert that does not exist.
    """
    arrays("layout", topk_idx=topk_idx if topk_idx is not None else 0)
    if topk_idx.ndim != 2 or topk_idx.dtype != np.int64:
        raise DtypeError(
            f"ep: topk_idx is {topk_idx.dtype} {list(topk_idx.shape)}, wanted int64 [T, K]"
        )
    whole("ep: top-k", topk_idx.shape[1], 0, MAX_TOP_K)
    topk_idx = np.ascontiguousarray(topk_idx)
    T, R = len(topk_idx), len(host_of)
    layout = Layout(
        np.empty(R, np.int32), np.empty(num_hosts, np.int32), np.empty(num_experts, np.int32),
        np.empty((T, R), bool),
    )  # fmt: skip
    bad = library().wf_ep_layout(
        topk_idx.ctypes.data, T, topk_idx.shape[1], num_experts, R, host_of.ctypes.data, num_hosts,
        layout.per_rank.ctypes.data, layout.per_host.ctypes.data, layout.per_expert.ctypes.data,
        layout.in_rank.ctypes.data,
    )  # fmt: skip
    if bad < 0:
        row = topk_idx[-1 - bad].tolist()
        raise LimitError(
            f"ep: token {-1 - bad} names experts {row}, wanted −1 or 0 … {num_experts - 1}"
        )
    return layout
