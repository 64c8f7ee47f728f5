"""Eplb room: what callers hand in, checked once, with a line that says what would be right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from whalefall.arguments import shown, whole
from whalefall.errors import ConfigError, DtypeError, LimitError, ShapeError

__all__ = ["Shape", "check_loads", "check_moving", "check_previous", "check_shape"]

LARGEST = 2**31 - 1  # an int of the compiled search
MOST_PAIRS = 1 << 28  # (expert, slot) pairs of a layer, for which tables are made


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
        if weight.is_complex():
            raise DtypeError(f"eplb: loads have dtype {weight.dtype}; give real numbers")
        weight = _with_values(weight, "loads").detach().float().cpu().numpy()
    array = _array(weight, "loads", "[layers, experts]")
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


def _with_values(tensor: Any, name: str) -> Any:
    """A torch tensor as given; ShapeError where it is not dense, or of shape alone."""
    if str(tensor.layout) != "torch.strided":
        raise ShapeError(f"eplb: {name} have layout {tensor.layout}; give them .to_dense()")
    if tensor.device.type == "meta":
        raise ShapeError(f"eplb: {name} are on the device meta, which keeps no values; give values")
    return tensor


def _array(value: Any, name: str, wanted: str) -> npt.NDArray[Any]:
    try:
        return np.asarray(value)
    except (ValueError, TypeError) as error:  # rows of different lengths
        raise ShapeError(f"eplb: {name} are no array: {error}; give {wanted}") from None


def integer(name: str, value: Any) -> int:
    """`value` as an int; DtypeError or LimitError where it is none, or more than 31 bits hold."""
    number = whole(f"eplb: {name}", value, error=DtypeError)
    if number > LARGEST:
        raise LimitError(f"eplb: {name} is {shown(value)}; it must be at most {LARGEST}")
    return number


def indices(name: str, value: Any, end: int, least: int = 0) -> npt.NDArray[np.int64]:
    """`value` as integers from `least` to below `end`; DtypeError or LimitError else."""
    array = _array(value, name, "integers")
    exact = array.astype(np.float64) if array.dtype.kind == "f" else np.full(1, 0.5)
    if (exact == np.floor(exact)).all() and (abs(exact) < LARGEST).all():
        array = array.astype(np.int64)  # JSON and CSV have no others
    if array.size and array.dtype.kind not in "iu":
        raise DtypeError(f"eplb: {name} have dtype {array.dtype}; give integers")
    if array.size and not least <= int(array.min()) <= int(array.max()) < end:
        found = int(array.min()), int(array.max())
        raise LimitError(f"eplb: {name} are {found[0]} … {found[1]}; give {least} … {end - 1}")
    return array.astype(np.int64)


def check_shape(
    loads: npt.NDArray[np.float32], num_replicas: Any, num_groups: Any, num_nodes: Any,
    num_gpus: Any,
) -> Shape:  # fmt: skip
    """The sizes, groups and nodes set to 1 in global mode.

    Raises: ShapeError where they do not fit; DtypeError for what is no size; LimitError for what
        is larger than the tables can be.
    """
    experts = loads.shape[1]
    given = {
        "num_replicas": num_replicas, "num_groups": num_groups, "num_nodes": num_nodes,
        "num_gpus": num_gpus,
    }  # fmt: skip
    for name, value in given.items():
        if integer(name, value) < 1:
            raise ShapeError(f"eplb: {name} is {value}; it must be at least 1")
    replicas, groups, nodes, gpus = map(int, given.values())
    if replicas < experts:
        raise ShapeError(
            f"eplb: num_replicas is {replicas}, but there are {experts} experts; each needs a slot"
        )
    if experts * replicas > MOST_PAIRS:
        raise LimitError(
            f"eplb: {experts} experts times num_replicas {replicas} is {experts * replicas}; it "
            f"must be at most {MOST_PAIRS}, so num_replicas at most {MOST_PAIRS // experts}"
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


def check_moving(balance: Any, max_moves: Any) -> tuple[float, int | None]:
    """How far to move from a previous placement.

    Raises: DtypeError, ConfigError or LimitError naming the argument.
    """
    if not isinstance(balance, (int, float, np.integer, np.floating)) or isinstance(balance, bool):
        raise DtypeError(f"eplb: balance is {balance!r}; give a number above 0 and at most 1")
    if not 0 < balance <= 1:
        raise ConfigError(f"eplb: balance is {balance}; it must be above 0 and at most 1")
    if max_moves is None:
        return float(balance), None
    if integer("max_moves", max_moves) < 0:
        raise ConfigError(f"eplb: max_moves is {max_moves}; it must not be negative")
    return float(balance), int(max_moves)


def _whole_numbers(previous: Any, wanted: str) -> npt.NDArray[np.int64]:
    """A fresh int64 array; floats may come (JSON and CSV have no others) where they are whole."""
    if hasattr(previous, "data_ptr"):
        previous = _with_values(previous, "previous's rows").detach().cpu().numpy()
    array = _array(previous, "previous's rows", wanted)
    if array.dtype.kind not in "iuf":
        shown = f"{previous!r}" if array.ndim == 0 else f"of dtype {array.dtype}"
        raise DtypeError(f"eplb: previous is {shown}; give {wanted}, integers")
    if array.dtype.kind == "f":
        array = array.astype(np.float64)
        broken = array[(array != np.floor(array)) | (np.abs(array) > LARGEST)]
        if len(broken):
            raise DtypeError(f"eplb: previous holds {broken[0]}; give {wanted}, integers")
    return array.astype(np.int64)


def check_previous(previous: Any, shape: Shape, layers: int) -> npt.NDArray[np.int64]:
    """An earlier phy2log as a fresh array.

    Raises: DtypeError, ShapeError or ConfigError where it cannot be kept.
    """
    wanted = f"phy2log [{layers}, {shape.slots}]"
    phy2log = _whole_numbers(previous, wanted)
    if phy2log.shape != (layers, shape.slots):
        raise ShapeError(f"eplb: previous has shape {phy2log.shape}; give {wanted}")
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
