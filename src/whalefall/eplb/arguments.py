"""Eplb room: what callers hand in, checked once, with a line that says what would be right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from whalefall.errors import ConfigError, DtypeError, ShapeError

__all__ = ["Shape", "check_loads", "check_previous", "check_shape"]


@dataclass(frozen=True)
class Shape:
    """Sizes of one layer's placement; global mode has one group and one node."""

    experts: int
    slots: int
    groups: int
    nodes: int
    gpus: int

    def published(self) -> tuple[int, int, int, int]:
        """The arguments of the original's hierarchical function, after the weights."""
        return self.slots, self.groups, self.nodes, self.gpus


def check_loads(weight: Any) -> npt.NDArray[np.float32]:
    """`weight` as finite, non-negative float32 [layers, experts] on the CPU.

    Float32, since the original casts so.

    Raises: ShapeError, DtypeError or ConfigError naming the first bad entry.
    """
    if hasattr(weight, "data_ptr"):  # a torch tensor, wherever it lives
        weight = weight.detach().float().cpu().numpy()
    array = np.asarray(weight)
    if array.dtype.kind not in "fiub" and array.dtype.name not in ("bfloat16", "float8_e4m3fn"):
        raise DtypeError(f"eplb: loads have dtype {array.dtype}; give real numbers")
    if array.ndim != 2 or 0 in array.shape:
        raise ShapeError(f"eplb: loads have shape {array.shape}; give [layers, experts], neither 0")
    with np.errstate(over="ignore"):  # too large for float32 becomes infinite, refused below
        loads = np.ascontiguousarray(array, np.float32)
    bad = np.argwhere(~np.isfinite(loads) | (loads < 0))
    if len(bad):
        layer, expert = (int(i) for i in bad[0])
        value = array[layer, expert]
        raise ConfigError(
            f"eplb: the load of layer {layer}, expert {expert} is {value}; "
            "loads must be finite and not negative"
        )
    return loads


def check_shape(
    loads: npt.NDArray[np.float32], replicas: int, groups: int, nodes: int, gpus: int
) -> Shape:
    """The sizes, groups and nodes set to 1 in global mode; ShapeError where they do not fit."""
    experts = loads.shape[1]
    for name, value in (
        ("num_replicas", replicas), ("num_groups", groups), ("num_nodes", nodes), ("num_gpus", gpus)
    ):  # fmt: skip
        if value < 1:
            raise ShapeError(f"eplb: {name} is {value}; it must be at least 1")
    if replicas < experts:
        raise ShapeError(
            f"eplb: num_replicas is {replicas}, but there are {experts} experts; each needs a slot"
        )
    if replicas % gpus:
        raise ShapeError(f"eplb: num_replicas {replicas} is not a multiple of num_gpus {gpus}")
    if groups % nodes:
        return Shape(experts, replicas, 1, 1, gpus)
    if experts % groups:
        raise ShapeError(f"eplb: {experts} experts do not form {groups} groups of equal size")
    if gpus % nodes:
        raise ShapeError(f"eplb: num_gpus {gpus} is not a multiple of num_nodes {nodes}")
    return Shape(experts, replicas, groups, nodes, gpus)


def check_previous(previous: Any, shape: Shape, layers: int) -> npt.NDArray[np.int64]:
    """An earlier phy2log as a fresh array; ShapeError or ConfigError where it cannot be kept."""
    phy2log = np.array(previous, np.int64)
    if phy2log.shape != (layers, shape.slots):
        raise ShapeError(
            f"eplb: previous has shape {phy2log.shape}; give phy2log [{layers}, {shape.slots}]"
        )
    if phy2log.min() < 0 or phy2log.max() >= shape.experts:
        raise ConfigError(f"eplb: previous names experts outside 0 … {shape.experts - 1}")
    for layer, row in enumerate(phy2log):
        if len(np.unique(row)) < shape.experts:
            lost = sorted(set(range(shape.experts)) - set(row.tolist()))[0]
            raise ConfigError(f"eplb: previous has no slot for expert {lost} in layer {layer}")
        group_of_slot = row // (shape.experts // shape.groups)
        node_of_slot = np.arange(shape.slots) // (shape.slots // shape.nodes)
        homes = set(zip(group_of_slot.tolist(), node_of_slot.tolist(), strict=True))
        if len(homes) != shape.groups and shape.nodes > 1:
            raise ConfigError(
                f"eplb: previous spreads an expert group of layer {layer} over several nodes; "
                "plan anew without previous="
            )
    return phy2log
