"""Eplb room: the published greedy algorithm, in numpy.

In: weights. Out: its placements, with float32 sums and low-index ties as published. The oracle that
`placement` must never be worse than, and what runs where there is no C++ compiler.
Source: EPLB `balanced_packing`, `replicate_experts`, `rebalance_experts_hierarchical`.
"""

# L layers, E experts, P physical slots, N items, M packs

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from whalefall.errors import ShapeError

__all__ = ["balanced_packing", "rebalance_experts_hierarchical", "replicate_experts"]

Ints = npt.NDArray[np.int64]


def balanced_packing(weight: npt.ArrayLike, num_packs: int) -> tuple[Ints, Ints]:
    """Pack items, heaviest first, each to the lightest pack that has room.

    Args:
        weight: [layers, items].
        num_packs: packs of equal size; divides the number of items.
    Returns: pack_index and rank_in_pack, both [layers, items] int64.
    Raises: ShapeError where the packs would differ in size.
    Source: EPLB `balanced_packing`.
    """
    w_LN = np.asarray(weight, np.float32)
    L, N = w_LN.shape
    if num_packs < 1 or N % num_packs:
        raise ShapeError(f"eplb: {N} items do not fill {num_packs} packs of equal size")
    room = N // num_packs
    pack_LN, rank_LN = np.zeros((L, N), np.int64), np.zeros((L, N), np.int64)
    if room == 1:
        pack_LN[:] = np.arange(N)
        return pack_LN, rank_LN
    order_LN = np.argsort(-w_LN, axis=1, kind="stable")
    load_LM = np.zeros((L, num_packs), np.float32)
    used_LM = np.zeros((L, num_packs), np.int64)
    rows = np.arange(L)
    for n in range(N):
        item = order_LN[:, n]
        pack = np.where(used_LM < room, load_LM, np.inf).argmin(axis=1)
        pack_LN[rows, item] = pack
        rank_LN[rows, item] = used_LM[rows, pack]
        used_LM[rows, pack] += 1
        load_LM[rows, pack] += w_LN[rows, item]
    return pack_LN, rank_LN


def replicate_experts(weight: npt.ArrayLike, num_phy: int) -> tuple[Ints, Ints, Ints]:
    """Give each slot beyond the experts themselves to the expert with the largest share.

    Args:
        weight: [layers, experts].
        num_phy: slots, at least as many as experts.
    Returns: expert of each slot and its replica number, [layers, num_phy]; replicas of each expert,
        [layers, experts]; int64.
    Raises: ShapeError for fewer slots than experts.
    Source: EPLB `replicate_experts`.
    """
    w_LE = np.asarray(weight, np.float32)
    L, E = w_LE.shape
    if num_phy < E:
        raise ShapeError(f"eplb: {num_phy} slots cannot hold {E} experts; give at least {E}")
    phy2log_LP = np.tile(np.arange(num_phy, dtype=np.int64), (L, 1))
    rank_LP = np.zeros((L, num_phy), np.int64)
    count_LE = np.ones((L, E), np.int64)
    rows = np.arange(L)
    for p in range(E, num_phy):
        hottest = (w_LE / count_LE.astype(np.float32)).argmax(axis=1)
        phy2log_LP[:, p] = hottest
        rank_LP[:, p] = count_LE[rows, hottest]
        count_LE[rows, hottest] += 1
    return phy2log_LP, rank_LP, count_LE


def rebalance_experts_hierarchical(
    weight: npt.ArrayLike,
    num_physical_experts: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
) -> tuple[Ints, Ints, Ints]:
    """Groups to nodes, replicas inside each node, replicas to the node's GPUs.

    Args:
        weight: [layers, experts].
        num_physical_experts: slots per layer.
        num_groups, num_nodes, num_gpus: each divides as its name asks; one group and one node make
            the global form.
    Returns: expert of each slot, replica number of each slot, [layers, slots]; replicas of each
        expert, [layers, experts].
    Source: EPLB `rebalance_experts_hierarchical`.
    """
    w_LE = np.asarray(weight, np.float32)
    L, E = w_LE.shape
    size, slots, gpus = E // num_groups, num_physical_experts // num_nodes, num_gpus // num_nodes
    group_LK = w_LE.reshape(L, num_groups, size).sum(-1, dtype=np.float32)
    node_LK, rank_LK = balanced_packing(group_LK, num_nodes)
    # place of each expert when sorted by node, then by the group's rank in it
    start_LK = (node_LK * (num_groups // num_nodes) + rank_LK) * size
    place_LE = (start_LK[:, :, None] + np.arange(size)).reshape(L, E)
    expert_LE = np.argsort(place_LE, axis=1)
    sorted_LE = np.take_along_axis(w_LE, expert_LE, axis=1).reshape(-1, E // num_nodes)
    phy2mid, rank, count = replicate_experts(sorted_LE, slots)
    share = np.take_along_axis(sorted_LE / count.astype(np.float32), phy2mid, axis=1)
    gpu, place = balanced_packing(share, gpus)
    order = np.argsort(gpu * (slots // gpus) + place, axis=1)
    phy2mid = np.take_along_axis(phy2mid, order, axis=1)
    rank = np.take_along_axis(rank, order, axis=1)
    first = (np.arange(num_nodes) * (E // num_nodes))[None, :, None]
    phy2mid_LP = (phy2mid.reshape(L, num_nodes, slots) + first).reshape(L, -1)
    phy2log_LP = np.take_along_axis(expert_LE, phy2mid_LP, axis=1)
    count_LE = np.take_along_axis(count.reshape(L, E), place_LE, axis=1)
    return phy2log_LP, rank.reshape(L, -1), count_LE
