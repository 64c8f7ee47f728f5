"""Eplb room: a placement made anew, laid over the previous one so that little has to move.

In: the previous slots, what few moves reached, a fresh plan. Out: per layer, the few moves, unless
they miss the stated balance and the fresh plan is lighter and worth its own: it reaches the
balance, or the busiest GPU would be heavier by more than `CLEAR` without it, or it moves no more.
"""

# L layers, P slots, G GPUs, N nodes, p slots of a GPU

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from whalefall.eplb.arguments import Shape
from whalefall.eplb.cpu import Planned

__all__ = ["align", "or_anew"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Moved = tuple[Ints, Floats, Ints]

CLEAR = 0.01  # a busiest GPU heavier by no more than this is not worth a fresh plan's moves


def or_anew(
    loads: npt.NDArray[np.float32], shape: Shape, start_LP: Ints, few: Moved, fresh: Planned,
    balance: float, max_moves: int | None,
) -> Moved:  # fmt: skip
    """Few moves; for layers that they leave short of `balance`, a fresh plan worth its moves.

    Args:
        loads: [layers, experts].
        start_LP: the previous phy2log.
        few: phy2log, largest loads and moves that local search reached.
        fresh: the plan without a previous placement.
        balance: the aim, mean over largest load.
        max_moves: a fresh plan that moves more is not taken; None: no limit.
    """
    phy2log_LP, load, moves = few[0].copy(), few[1].copy(), few[2].copy()
    aim = loads.sum(1, dtype=np.float64) / shape.gpus / balance
    for layer in np.flatnonzero((load > aim) & (fresh.load < load)):
        laid = align(start_LP[layer], fresh.phy2log[layer], shape)
        moved = count_moves(start_LP[layer], laid, shape.gpus)
        lighter = fresh.load[layer] <= aim[layer] or fresh.load[layer] * (1 + CLEAR) < load[layer]
        if (lighter or moved <= moves[layer]) and (max_moves is None or moved <= max_moves):
            phy2log_LP[layer], load[layer], moves[layer] = laid, fresh.load[layer], moved
    return phy2log_LP, load, moves


def count_moves(before_P: Ints, after_P: Ints, gpus: int) -> int:
    """Experts that a GPU holds after and did not hold before."""
    pairs = zip(before_P.reshape(gpus, -1), after_P.reshape(gpus, -1), strict=True)
    return sum(len(set(new.tolist()) - set(old.tolist())) for old, new in pairs)


def align(before_P: Ints, after_P: Ints, shape: Shape) -> Ints:
    """Rename nodes, GPUs of a node and slots of a GPU so that most of `before_P` stays in place.

    GPUs of a node are alike, and so are nodes: their names cost nothing. Best pairs first.
    """
    before = before_P.reshape(shape.nodes, shape.gpus // shape.nodes, -1)
    after = after_P.reshape(before.shape)
    out = np.empty_like(before)
    kept = overlap(before.reshape(shape.nodes, -1), after.reshape(shape.nodes, -1), shape.experts)
    for old_node, new_node in best_pairs(kept):
        gpus = overlap(before[old_node], after[new_node], shape.experts)
        for old, new in best_pairs(gpus):
            out[old_node, old] = keep_slots(before[old_node, old], after[new_node, new])
    return out.reshape(-1)


def overlap(before: Ints, after: Ints, experts: int) -> Ints:
    """[rows of before, rows of after] experts that both rows hold."""
    held = [np.zeros((len(rows), experts), np.int64) for rows in (before, after)]
    for table, rows in zip(held, (before, after), strict=True):
        table[np.arange(len(rows))[:, None], rows] = 1
    return held[0] @ held[1].T


def best_pairs(gain: Ints) -> list[tuple[int, int]]:
    """Row and column pairs, the largest gain first, each row and column once."""
    left, pairs = gain.copy(), []
    for _ in range(len(gain)):
        row, column = np.unravel_index(left.argmax(), left.shape)
        pairs.append((int(row), int(column)))
        left[row], left[:, column] = -1, -1
    return pairs


def keep_slots(before_p: Ints, after_p: Ints) -> Ints:
    """`after_p` in an order in which experts that were here keep their slots."""
    out, rest = np.full_like(before_p, -1), after_p.tolist()
    for slot, expert in enumerate(before_p.tolist()):
        if expert in rest:
            out[slot] = expert
            rest.remove(expert)
    out[out < 0] = rest
    return out
