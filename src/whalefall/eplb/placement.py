"""Eplb room: which expert sits in which slot of which GPU.

In: loads [layers, experts]. Out: a `Placement`: slots to experts, experts to slots, largest loads
beside a bound that no placement can beat. `native/plan.cpp` searches, called through `cpu.py`;
`published.py` is the oracle.
Source: EPLB `rebalance_experts`.
"""

# L layers, E experts, P physical slots, X largest number of replicas

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from whalefall.eplb import cpu, published
from whalefall.eplb.arguments import (
    Shape,
    check_loads,
    check_moving,
    check_previous,
    check_shape,
    indices,
    integer,
)
from whalefall.eplb.moving import or_anew
from whalefall.errors import ConfigError, MissingError, ShapeError

__all__ = ["Placement", "gpu_loads", "rebalance", "rebalance_experts"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Placement:
    """Where the replicas of each layer's experts are.

    Attributes:
        phy2log: [layers, slots] expert of each slot; GPU g has slots g·p … g·p + p − 1.
        log2phy: [layers, experts, X] slots of each expert, padded with −1.
        logcnt: [layers, experts] replicas of each expert.
        share: [layers, slots] part of its expert's tokens that a slot gets.
        load: [layers] load of the busiest GPU, in the units of the weights.
        bound: [layers] no placement with equal shares has a lighter busiest GPU.
        mean: [layers] load of the average GPU.
        moves: [layers] experts that a GPU must load which it did not hold before; zero without a
            previous placement.
        num_gpus: GPUs the slots belong to, in order.
    """

    phy2log: Ints
    log2phy: Ints
    logcnt: Ints
    share: Floats
    load: Floats
    bound: Floats
    mean: Floats
    moves: Ints
    num_gpus: int
    num_nodes: int = field(default=1)

    @property
    def balance(self) -> Floats:
        """[layers] mean over largest GPU load: the utilisation, 1.0 at best."""
        return ratio(self.mean, self.load)


def ratio(part: Floats, whole: Floats) -> Floats:
    """part / whole, and 1 where both are zero."""
    return np.divide(part, whole, out=np.ones_like(part), where=whole > 0)


def rebalance_experts(
    weight: Any, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[Any, Any, Any]:
    """Place expert replicas so that the busiest GPU is as light as possible.

    Args:
        weight: [layers, experts], tokens routed to each expert; any array, or a torch tensor.
        num_replicas: slots per layer, a multiple of `num_gpus`, at least the number of experts.
        num_groups: expert groups of the gate. If `num_nodes` divides it, a group stays on one node
            (hierarchical); else nodes and groups are ignored (global).
        num_nodes: hosts.
        num_gpus: in all nodes together.
    Returns: phy2log [layers, num_replicas], log2phy [layers, experts, X] padded with −1, logcnt
        [layers, experts]; int64, CPU torch tensors if `weight` is one, numpy arrays else.
    Raises: ShapeError for sizes that do not divide; ConfigError for negative or NaN loads;
        DtypeError, LimitError for sizes that are no integers, or beyond 31 bits.
    Source: EPLB `rebalance_experts`.
    """
    loads_LE = check_loads(weight)
    shape = check_shape(loads_LE, num_replicas, num_groups, num_nodes, num_gpus)
    try:
        phy2log_LP = cpu.plan(loads_LE, shape).phy2log
    except MissingError:  # no compiler on this machine: the published algorithm, as published
        even_LE = np.where(loads_LE.any(axis=1, keepdims=True), loads_LE, 1.0)  # no load: evenly
        phy2log_LP = published.rebalance_experts_hierarchical(even_LE, *shape.published())[0]
    log2phy, logcnt = invert(phy2log_LP, shape.experts)
    return _like(weight, phy2log_LP), _like(weight, log2phy), _like(weight, logcnt)


def rebalance(
    weight: Any,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    *,
    previous: Placement | npt.ArrayLike | None = None,
    max_moves: int | None = None,
    balance: float = 0.99,
    split: str = "equal",
) -> Placement:
    """Place expert replicas, and say how good the placement is; or improve one with few moves.

    Args:
        weight, num_replicas, num_groups, num_nodes, num_gpus: as `rebalance_experts`.
        previous: a placement (or its phy2log) to start from. Replicas move only while a layer's
            balance (mean over largest load) is below `balance`, the most relief per move first.
            Where that ends below `balance`, a lighter fresh plan is laid over the previous one if
            it reaches `balance`, or without it the busiest GPU is over 1 % heavier, or it moves no
            more. An aim out of reach thus costs many moves, unless `max_moves` limits them.
        max_moves: with `previous`: most experts a layer's GPUs may have to load anew.
        balance: with `previous`: the aim, between 0 and 1.
        split: "equal" shares an expert's tokens evenly among its replicas, as the original does;
            "best" weighs the replicas so that the busiest GPU is as light as this placement allows.
    Raises: ShapeError, DtypeError, ConfigError, LimitError; MissingError without a C++ compiler.
    """
    if split not in ("equal", "best"):
        raise ConfigError(f"eplb: split is {split!r}; give 'equal' or 'best'")
    loads_LE = check_loads(weight)
    shape = check_shape(loads_LE, num_replicas, num_groups, num_nodes, num_gpus)
    balance, max_moves = check_moving(balance, max_moves)
    result = cpu.plan(loads_LE, shape, judge=True)
    phy2log_LP, load = result.phy2log, result.load
    moves = np.zeros(len(loads_LE), np.int64)
    if previous is not None:
        old = previous.phy2log if isinstance(previous, Placement) else previous
        start_LP = check_previous(old, shape, len(loads_LE))
        few = cpu.improve(loads_LE, shape, start_LP, balance, max_moves)
        phy2log_LP, load, moves = or_anew(
            loads_LE, shape, start_LP, few, result, balance, max_moves
        )
    elif max_moves is not None:
        raise ConfigError("eplb: max_moves needs previous=, the placement to move from")
    log2phy, logcnt = invert(phy2log_LP, shape.experts)
    share = 1 / np.take_along_axis(logcnt, phy2log_LP, axis=1)
    if split == "best":
        share, load = best_split(loads_LE, shape, phy2log_LP, share, load)
    mean = loads_LE.sum(axis=1, dtype=np.float64) / shape.gpus
    return Placement(
        phy2log_LP, log2phy, logcnt, share, load, result.bound, mean, moves, shape.gpus, shape.nodes
    )


def best_split(
    loads_LE: npt.NDArray[np.float32],
    shape: Shape,
    phy2log_LP: Ints,
    equal_LP: Floats,
    load: Floats,
) -> tuple[Floats, Floats]:
    """The best shares and the loads they make; the equal ones where nothing is gained by others."""
    share_LP, lighter = cpu.split(loads_LE, shape, phy2log_LP)
    gains = lighter < load
    return np.where(gains[:, None], share_LP, equal_LP), np.where(gains, lighter, load)


def invert(phy2log_LP: Ints, num_experts: int) -> tuple[Ints, Ints]:
    """log2phy [layers, experts, X], slots ascending, padded with −1; logcnt [layers, experts]."""
    L, P = phy2log_LP.shape
    row = np.arange(L)[:, None] * num_experts
    logcnt = np.bincount((phy2log_LP + row).ravel(), minlength=L * num_experts)
    first = (np.cumsum(logcnt) - logcnt).reshape(L, num_experts)  # of each expert, over all layers
    logcnt = logcnt.reshape(L, num_experts)
    order_LP = np.argsort(phy2log_LP, axis=1, kind="stable")
    expert_LP = np.take_along_axis(phy2log_LP, order_LP, axis=1)
    start_LP = np.take_along_axis(first, expert_LP, axis=1)
    rank_LP = np.arange(L * P).reshape(L, P) - start_LP
    log2phy = np.full((L, num_experts, int(logcnt.max(initial=0))), -1, np.int64)
    log2phy[np.arange(L)[:, None], expert_LP, rank_LP] = order_LP
    return log2phy, logcnt.astype(np.int64)


def gpu_loads(
    weight: npt.ArrayLike, phy2log: npt.ArrayLike, num_gpus: int, share: Any = None
) -> Floats:
    """The load of each GPU under a placement.

    Args:
        weight: [layers, experts].
        phy2log: [layers, slots].
        num_gpus: GPUs the slots belong to, in order.
        share: [layers, slots] part of its expert's tokens that a slot gets; equal by default.
    Returns: [layers, num_gpus] float64.
    Raises: ShapeError, DtypeError, LimitError, ConfigError for what does not fit.
    """
    check_loads(weight)
    w_LE = np.asarray(weight, np.float64)
    phy2log_LP = indices("phy2log", phy2log, w_LE.shape[1])
    fits = phy2log_LP.ndim == 2 and len(phy2log_LP) == len(w_LE)
    if integer("num_gpus", num_gpus) < 1 or not fits or phy2log_LP.shape[1] % num_gpus:
        raise ShapeError(
            f"eplb: phy2log has shape {phy2log_LP.shape}; give [{len(w_LE)}, a multiple of "
            f"{num_gpus} GPUs]"
        )
    if share is not None:
        check_loads(share)
        share = np.asarray(share, np.float64)
        if share.shape != phy2log_LP.shape:
            raise ShapeError(f"eplb: share has shape {share.shape}; give {phy2log_LP.shape}")
    if share is None:
        _, logcnt = invert(phy2log_LP, w_LE.shape[1])
        share = 1 / np.take_along_axis(logcnt, phy2log_LP, axis=1)
    slot_LP = np.take_along_axis(w_LE, phy2log_LP, axis=1) * share
    return slot_LP.reshape(len(w_LE), num_gpus, -1).sum(-1)


def _like(weight: Any, array: Ints) -> Any:
    """`array` in the library of `weight`: a torch tensor for a torch tensor."""
    if hasattr(weight, "data_ptr"):
        import sys

        return sys.modules["torch"].from_numpy(array)
    return array
