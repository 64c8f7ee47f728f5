"""Eplb room: what a placement costs on the network, counted from the gate's real choices.

In: topk_idx, the tokens' home nodes, one layer of a placement. Out: nodes touched, bytes sent.
A token crosses to a node once, however many of its experts live there (DeepEP's two hops).
"""

# T tokens, K chosen experts, N nodes, P slots

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from whalefall.eplb.arguments import indices, integer
from whalefall.errors import ShapeError

MAX_EXPERTS = 1 << 20  # of a table with a row for each

__all__ = ["Traffic", "count_traffic"]


@dataclass(frozen=True)
class Traffic:
    """Tokens that cross between nodes under one layer's placement.

    Attributes:
        sends: [nodes, nodes] tokens sent from home to expert node; the diagonal is zero.
        bytes_out: [nodes] bytes each node sends.
        nodes_per_token: mean number of nodes, its own included, that a token's experts are on.
    """

    sends: npt.NDArray[np.int64]
    bytes_out: npt.NDArray[np.int64]
    nodes_per_token: float


def count_traffic(
    topk_idx: npt.ArrayLike,
    token_node: npt.ArrayLike,
    phy2log: npt.ArrayLike,
    num_nodes: int,
    bytes_per_token: int,
) -> Traffic:
    """Count the crossings of one layer; a replica on the token's own node is preferred.

    Args:
        topk_idx: [tokens, k] experts the gate chose; −1 for none.
        token_node: [tokens] node each token is on.
        phy2log: [slots] expert of each slot, nodes in order.
        num_nodes: divides the number of slots.
        bytes_per_token: of one token's hidden state, as sent.
    Returns: the counts; replicas elsewhere are taken in turn, token by token.
    Raises: ShapeError for sizes that do not fit.
    """
    if integer("num_nodes", num_nodes) < 1 or integer("bytes_per_token", bytes_per_token) < 0:
        raise ShapeError(f"eplb: {num_nodes} nodes, {bytes_per_token} bytes a token")
    chosen_TK = indices("topk_idx", topk_idx, MAX_EXPERTS, -1)
    home_T = indices("token_node", token_node, num_nodes)
    slot_P = indices("phy2log", phy2log, MAX_EXPERTS)
    if chosen_TK.ndim != 2 or home_T.shape != chosen_TK.shape[:1]:
        raise ShapeError(f"eplb: topk_idx {chosen_TK.shape}, token_node {home_T.shape}")
    if slot_P.ndim != 1 or not len(slot_P) or len(slot_P) % num_nodes:
        raise ShapeError(f"eplb: {slot_P.shape} slots do not divide over {num_nodes} nodes")
    experts = int(max(slot_P.max(), chosen_TK.max(initial=-1))) + 1
    on_EN = np.zeros((experts, num_nodes), bool)
    on_EN[slot_P, np.arange(len(slot_P)) // (len(slot_P) // num_nodes)] = True
    # the r-th node that holds each expert, for the turn of tokens without a replica at home
    count_E = on_EN.sum(1)
    if (count_E[chosen_TK[chosen_TK >= 0]] == 0).any():
        raise ShapeError("eplb: topk_idx names an expert that has no slot in phy2log")
    nodes_EN = np.argsort(~on_EN, axis=1, kind="stable")
    turn_TK = np.arange(len(home_T))[:, None] % np.maximum(count_E[chosen_TK], 1)
    target_TK = np.where(
        on_EN[chosen_TK, home_T[:, None]], home_T[:, None], nodes_EN[chosen_TK, turn_TK]
    )
    touched_TN = np.zeros((len(home_T), num_nodes), bool)
    token, place = np.nonzero(chosen_TK >= 0)
    touched_TN[token, target_TK[token, place]] = True
    sends = np.zeros((num_nodes, num_nodes), np.int64)
    np.add.at(sends, home_T, touched_TN)
    np.fill_diagonal(sends, 0)
    nodes_per_token = float(touched_TN.sum(1).mean()) if len(home_T) else 0.0
    return Traffic(sends, sends.sum(1) * bytes_per_token, nodes_per_token)
