"""Eplb room: the calls into `native/plan.cpp`, which is compiled at first use."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from whalefall.eplb.arguments import Shape

__all__ = ["Planned", "improve", "plan", "split"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Loads = npt.NDArray[np.float32]


class Planned(NamedTuple):
    """A placement: phy2log [layers, slots]; load, bound and the published one's load [layers]."""

    phy2log: Ints
    load: Floats
    bound: Floats
    greedy: Floats


def _library() -> ctypes.CDLL:
    from whalefall.jit import build

    return build(Path(__file__).parent / "native" / "plan.cpp")


def _address(array: npt.NDArray | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


def plan(loads: Loads, shape: Shape, judge: bool = False) -> Planned:
    """Place every layer anew; `judge` sharpens the bound and weighs the published placement too."""
    layers = len(loads)
    phy2log = np.empty((layers, shape.slots), np.int64)
    load, bound = np.empty(layers), np.empty(layers)
    greedy = np.full(layers, np.nan)
    sizes = (layers, shape.experts, shape.slots, shape.groups, shape.nodes, shape.gpus)
    outputs = (phy2log, load, bound, greedy if judge else None)
    _library().eplb_plan(_address(loads), *sizes, *map(_address, outputs))
    return Planned(phy2log, load, bound, greedy)


def improve(
    loads: Loads, shape: Shape, start: Ints, balance: float, max_moves: int | None
) -> tuple[Ints, Floats, Ints]:
    """Move replicas from `start` until `balance`; phy2log, largest loads, moves of each layer."""
    layers = len(loads)
    phy2log = np.array(start, np.int64, order="C")  # a copy: the search writes into it
    load, moves = np.empty(layers), np.empty(layers, np.int64)
    budget = -1 if max_moves is None else max_moves
    sizes = (layers, shape.experts, shape.slots, shape.nodes, shape.gpus)
    _library().eplb_improve(
        _address(loads), *sizes, ctypes.c_double(balance), budget,
        *map(_address, (phy2log, load, moves)),
    )  # fmt: skip
    return phy2log, load, moves


def split(loads: Loads, shape: Shape, phy2log: Ints) -> tuple[Floats, Floats]:
    """Shares [layers, slots] that make the largest load smallest, and that load [layers]."""
    share, load = np.empty(phy2log.shape), np.empty(len(loads))
    sizes = (len(loads), shape.experts, shape.slots, shape.gpus)
    inputs = np.ascontiguousarray(phy2log)
    _library().eplb_split(_address(loads), *sizes, *map(_address, (inputs, share, load)))
    return share, load
