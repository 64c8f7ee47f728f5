"""What a product is given: matrices and scales checked, and described for the native side.

In: tensors and (tensor, scales) pairs in any of DeepGEMM's layouts and scale formats.
Out: `Operand`s and `Target`s, with strides in the native side's terms, or one clear refusal.
Source: DeepGEMM `csrc/apis/gemm.hpp`, `csrc/apis/layout.hpp`, for both GPU generations' rules.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np

from whalefall.arguments import shown
from whalefall.dtypes import View, as_numpy, empty_like, refuse_gradient, unpack_ue8m0, view
from whalefall.dtypes.written import refuse_overlap as result_apart
from whalefall.dtypes.written import written
from whalefall.errors import ConfigError, DtypeError, ShapeError
from whalefall.gemm.structs import Layout

__all__ = [
    "OUT_TYPES",
    "Operand",
    "Target",
    "accumulator",
    "all_whole",
    "bf16_operand",
    "fp8_operand",
    "int32_array",
    "recipes",
    "refuse_dtype",
    "refuse_overlap",
    "result_or_new",
    "target",
    "value_pair",
]

BF16, FP8 = 1, 2
OUT_TYPES = ("float32", "bfloat16")
Recipe = tuple[int, int, int]
Pair = tuple[int, int]


@dataclass(frozen=True)
class Operand:
    """One operand [groups, rows, k]: addresses, strides, scales.

    Attributes:
        rows, k: the logical size; `groups` is 1 for a matrix.
        address, group_bytes: of the values, and how far apart groups are.
        scale_address, scale_group_bytes: the same of fp32 scales; 0 without scales.
        layout: what the native side needs to know of both.
        keep: arrays that must live until the product is done.
        views: what must not overlap the result.
    """

    rows: int
    k: int
    groups: int
    address: int
    group_bytes: int
    scale_address: int
    scale_group_bytes: int
    layout: Layout
    keep: tuple[Any, ...]
    views: tuple[View, ...]

    def at(self, group: int = 0, row: int = 0) -> tuple[int, int]:
        """Addresses of a group's values and scales from `row` on.

        `row` is for operands with scales of their own in each row, and not FP4 packed along rows.
        """
        values = self.address + group * self.group_bytes
        values += row * int(self.layout.row_stride) * (2 if self.layout.kind == BF16 else 1)
        if not self.scale_address:
            return values, 0
        scales = self.scale_address + group * self.scale_group_bytes
        return values, scales + row * int(self.layout.scale_row_stride) * 4


@dataclass(frozen=True)
class Target:
    """A result [groups, rows, n] that is written, or added to."""

    seen: View
    rows: int
    n: int
    groups: int
    pitch: int
    kind: int

    def at(self, group: int = 0, row: int = 0) -> int:
        """The address of a row of a group."""
        apart = self.seen.strides[0] if len(self.seen.shape) == 3 else 0
        return self.seen.address + (group * apart + row * self.pitch) * (2 if self.kind else 4)


def recipes(
    where: str,
    sfb_dtype: str,
    recipe: Recipe | None,
    recipe_a: Pair | None,
    recipe_b: Pair | None,
) -> tuple[Pair, Pair]:
    """The (rows, k) that share a scale, of a and of b.

    Raises: ConfigError for half a pair, both kinds at once, or sizes other than 1|128 and 32|128.
    """
    if (recipe_a is None) != (recipe_b is None) or (recipe is not None and recipe_a is not None):
        raise ConfigError(
            f"{where}: recipe={shown(recipe)}, recipe_a={shown(recipe_a)}, "
            f"recipe_b={shown(recipe_b)}, wanted recipe alone, or recipe_a and recipe_b together; "
            "leave out the rest"
        )
    if recipe_a is None or recipe_b is None:
        if recipe is None:
            recipe = (1, 1, 128) if sfb_dtype == "int32" else (1, 128, 128)
        if not isinstance(recipe, (tuple, list)) or len(recipe) != 3:
            raise ConfigError(
                f"{where}: recipe={shown(recipe)}, wanted (rows of a, rows of b, k); pass a tuple, "
                "such as (1, 128, 128)"
            )
        recipe_a, recipe_b = (recipe[0], recipe[2]), (recipe[1], recipe[2])
    for name, pair in (("a", recipe_a), ("b", recipe_b)):
        if not isinstance(pair, (tuple, list)):
            raise ConfigError(
                f"{where}: recipe_{name}={shown(pair)}, wanted (rows, k); pass a tuple, such as "
                "(1, 128)"
            )
        if not all_whole(pair, 2) or pair[0] not in (1, 128) or pair[1] not in (32, 128):
            raise ConfigError(
                f"{where}: scales of {name} for {shown(tuple(pair))} (rows, k), wanted rows 1 or "
                "128 and k 32 or 128; name what the cast made, in recipe or "
                f"recipe_{name}"
            )
    return tuple(recipe_a), tuple(recipe_b)  # type: ignore[return-value]


def all_whole(given: Any, count: int) -> bool:
    """Whether these are `count` whole numbers, in a list or tuple."""
    return (
        isinstance(given, (tuple, list))
        and len(given) == count
        and all(isinstance(n, Integral) and not isinstance(n, bool) for n in given)
    )


def transposed(array: Any) -> Any:
    """The last two axes swapped, over the same memory."""
    return array.swapaxes(-1, -2)


def _axes(where: str, name: str, array: Any, swap: bool, dims: int) -> View:
    """The memory of an array of `dims` axes, the last two swapped where wanted."""
    v = view(array, f"{where}: {name}")
    refuse_gradient(where, (array,), names=(name,))
    if len(v.shape) != dims:
        raise ShapeError(
            f"{where}: {name} has shape {list(v.shape)}, wanted {dims} axes; reshape it"
        )
    if not swap:
        return v
    turned = (*range(dims - 2), dims - 1, dims - 2)
    shape, strides = (tuple(of[i] for i in turned) for of in (v.shape, v.strides))
    return View(v.address, shape, strides, v.dtype)


def fp8_operand(
    where: str, name: str, pair: Any, recipe: Pair, swap: bool = False, dims: int = 2
) -> Operand:
    """An FP8 or FP4 operand with its scales.

    Args:
        pair: (values, scales); values float8_e4m3fn, or int8 with two E2M1 codes a byte.
        recipe: (rows, k) that share a scale.
        swap: values and scales come as [k, rows].
        dims: 2, or 3 with a leading group axis.
    """
    values, scales = value_pair(where, name, pair)
    v = _axes(where, name, values, swap, dims)
    s = _axes(where, f"scale of {name}", scales, swap, dims)
    if v.dtype not in ("float8_e4m3fn", "int8"):
        raise DtypeError(
            f"{where}: {name} is {v.dtype}, wanted float8_e4m3fn, or int8 holding FP4 "
            "pairs; per_token_cast_to_fp8 or per_token_cast_to_fp4 makes it"
        )
    row_stride, k_stride = _strides(where, name, v)
    rows, k = v.shape[-2:]
    packing = 0
    if v.dtype == "int8":
        packing = 1 if k_stride == 1 else 2
        rows, k = (rows, k * 2) if packing == 1 else (rows * 2, k)
    groups = v.shape[0] if dims == 3 else 1
    views = (v, s)  # the caller's own scales: unpacked ones are a copy
    s, keep = _scales(where, name, s, scales, swap, groups if dims == 3 else None, rows, k, recipe)
    layout = Layout(
        row_stride, k_stride, s.strides[-2], s.strides[-1], recipe[0], recipe[1], FP8, packing
    )
    return Operand(
        rows,
        k,
        groups,
        v.address,
        v.strides[0] if dims == 3 else 0,
        s.address,
        s.strides[0] * 4 if dims == 3 else 0,
        layout,
        (values, scales, keep),
        views,
    )


def bf16_operand(
    where: str, name: str, array: Any, swap: bool = False, dims: int = 2, plain_fp8: bool = False
) -> Operand:
    """A BF16 operand, in either layout; with `plain_fp8` also E4M3 values without scales."""
    v = _axes(where, name, array, swap, dims)
    fp8 = plain_fp8 and v.dtype == "float8_e4m3fn"
    if v.dtype != "bfloat16" and not fp8:
        wanted = "bfloat16 or float8_e4m3fn" if plain_fp8 else "bfloat16"
        raise DtypeError(f"{where}: {name} is {v.dtype}, wanted {wanted}; convert it")
    row_stride, k_stride = _strides(where, name, v)
    layout = Layout(row_stride, k_stride, 0, 0, 1, 128, FP8 if fp8 else BF16, 0)
    groups = v.shape[0] if dims == 3 else 1
    group_bytes = v.strides[0] * (1 if fp8 else 2) if dims == 3 else 0
    rows, k = v.shape[-2:]
    return Operand(rows, k, groups, v.address, group_bytes, 0, 0, layout, (array,), (v,))


def target(where: str, name: str, array: Any, shape: tuple[int, ...]) -> Target:
    """A result (or what is added to it) in float32 or bfloat16, stride 1 along its last axis."""
    v = written(array, f"{where}: {name}") if name == "d" else view(array, f"{where}: {name}")
    refuse_gradient(where, (array,), names=(name,))
    if v.shape != shape:
        raise ShapeError(
            f"{where}: {name} has shape {list(v.shape)}, wanted {list(shape)}; make it by torch or "
            "numpy.empty of that shape"
        )
    refuse_dtype(f"{where}: {name}", v, OUT_TYPES)
    if 0 not in shape and shape[-1] > 1 and v.strides[-1] != 1:
        raise ShapeError(
            f"{where}: {name} has strides {list(v.strides)}, wanted 1 along the last "
            "axis; pass a contiguous one"
        )
    groups = shape[0] if len(shape) == 3 else 1
    return Target(v, shape[-2], shape[-1], groups, v.strides[-2], int(v.dtype != "float32"))


def refuse_dtype(what: str, v: View, wanted: tuple[str, ...]) -> None:
    """DtypeError unless `v` has one of the dtypes `wanted`."""
    if v.dtype not in wanted:
        raise DtypeError(f"{what} is {v.dtype}, wanted {' or '.join(wanted)}; convert it")


def int32_array(where: str, name: str, array: Any) -> np.ndarray[Any, Any]:
    """An array of int32, or DtypeError."""
    refuse_dtype(f"{where}: {name}", view(array, f"{where}: {name}"), ("int32",))
    return as_numpy(array)


def accumulator(where: str, d: Any, c: Any, shape: tuple[int, ...]) -> tuple[Target, Target | None]:
    """The result `d` and what is added to it: `c` of its shape and dtype, None, or `d` itself.

    Raises: ShapeError, DtypeError; where `c` shares some of `d`'s memory only, too.
    """
    to = target(where, "d", d, shape)
    if c is None:
        return to, None
    add = target(where, "c", c, shape)
    if add.kind != to.kind:
        raise DtypeError(
            f"{where}: c is {add.seen.dtype}, wanted d's {to.seen.dtype}; convert one of them"
        )
    if 0 in shape:
        return to, add  # no memory to share: torch's addresses of nothing are all 0
    if add.seen.address != to.seen.address:
        refuse_overlap(where, to.seen, (add.seen,))
    elif any(
        n > 1 and of_c != of_d
        for n, of_c, of_d in zip(shape, add.seen.strides, to.seen.strides, strict=True)
    ):
        raise ShapeError(
            f"{where}: c is d's memory with strides {list(add.seen.strides)}, d's are "
            f"{list(to.seen.strides)}, wanted the same; pass d itself, or a copy"
        )
    return to, add


def refuse_overlap(where: str, d: View, others: tuple[View, ...], name: str = "d") -> None:
    """ShapeError where the result's memory meets an input's."""
    own = " (c may be d itself)" if name == "d" else ""
    result_apart(where, name, d, others, own)


def result_or_new(
    name: str, x: Any, shape: tuple[int, ...], out: Any, given: Any, default: str
) -> Any:
    """`out`, or a new array of dtype `given`; DtypeError where that is none, or not `out`'s."""
    dtype = default if given is None else given
    if not isinstance(dtype, str) or dtype not in OUT_TYPES:
        raise DtypeError(
            f"{name}: out_dtype is {shown(given)}, wanted 'float32' or 'bfloat16'; "
            "cast the result to any other"
        )
    if out is None:
        return empty_like(x, shape, dtype)
    if given is not None and (made := view(out, f"{name}: out").dtype) != dtype:
        raise DtypeError(
            f"{name}: out_dtype is {dtype!r}, wanted out's {made}; leave out_dtype out"
        )
    return out


def value_pair(where: str, name: str, pair: Any) -> tuple[Any, Any]:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise DtypeError(
            f"{where}: {name} is a {type(pair).__name__}, wanted a pair (values, scales); "
            "per_token_cast_to_fp8 makes one"
        )
    return pair[0], pair[1]


def _strides(where: str, name: str, v: View) -> tuple[int, int]:
    """Row and K strides; one of them must be 1 (a length of 0 or 1 has any stride)."""
    rows, k = v.shape[-2:]
    row_stride, k_stride = v.strides[-2:]
    if k <= 1 or 0 in v.shape:
        k_stride = 1
    if k_stride != 1 and rows <= 1:
        row_stride = 1
    if k_stride != 1 and row_stride != 1:
        raise ShapeError(
            f"{where}: {name} has strides {list(v.strides)}, wanted 1 along one of the last two "
            "axes; make it contiguous"
        )
    return row_stride, k_stride


def _scales(
    where: str,
    name: str,
    s: View,
    scales: Any,
    swap: bool,
    groups: int | None,
    rows: int,
    k: int,
    recipe: Pair,
) -> tuple[View, Any]:
    """fp32 scales of the wanted shape: the caller's own, or unpacked from UE8M0 int32."""
    lead = () if groups is None else (groups,)
    if s.dtype == "int32":
        wanted = (*lead, rows, -(-k // (4 * recipe[1])))
        if recipe[0] != 1 or s.shape != wanted:
            raise ShapeError(
                f"{where}: scale of {name} is int32 {list(s.shape)} for {recipe} (rows, k), wanted "
                f"{list(wanted)} = [rows, ceil(K={k} / {4 * recipe[1]})] with one row a scale; "
                "pack_ue8m0_to_int makes it, recipe= names another granularity"
            )
        packed = as_numpy(transposed(scales) if swap else scales)
        unpacked = unpack_ue8m0(packed)
        return view(unpacked), unpacked
    wanted = (*lead, -(-rows // recipe[0]), -(-k // recipe[1]))
    if s.dtype != "float32":
        raise DtypeError(
            f"{where}: scale of {name} is {s.dtype}, wanted float32, or int32 of packed "
            "UE8M0; convert it"
        )
    if s.shape != wanted:
        raise ShapeError(
            f"{where}: scale of {name} is {list(s.shape)}, wanted {list(wanted)} = [ceil(rows="
            f"{rows} / {recipe[0]}), ceil(K={k} / {recipe[1]})]; per_token_cast_to_fp8 or "
            "per_block_cast_to_fp8 makes it, recipe= names another granularity"
        )
    return s, None


def empty_segments(count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Room for `count` segments of `calls.run`."""
    return np.zeros((count, 8), np.int64)
