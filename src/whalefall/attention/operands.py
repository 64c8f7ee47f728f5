"""Checks of the room's arguments: each refusal names the function, the argument and the remedy."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import numpy as np

from whalefall.arguments import shown, whole
from whalefall.attention.structs import FP8_DTYPES, FP8_ROW_BYTES, TYPES, Cache
from whalefall.dtypes import View, as_numpy, restore, view
from whalefall.errors import ConfigError, DtypeError, ShapeError

__all__ = [
    "cache_operand",
    "check_cache",
    "check_heads",
    "check_int32",
    "check_mixture",
    "check_one_head",
    "check_query",
    "check_sink",
    "int32_operand",
    "query_operand",
    "scale_operand",
    "sink_operand",
    "width_of_values",
]

_FLOATS = "bfloat16, float16 or float32"
FLOAT_MAX = float(np.finfo(np.float32).max)
_LARGEST_SCALE = FLOAT_MAX * math.log(2)  # kernels divide it by ln 2, in fp32
FP8_WIDTH = 576  # columns of a 656-byte row


def query_operand(where: str, name: str, q: Any, axes: str) -> tuple[View, Any]:
    """A float array whose last axis has stride 1 and whose leading axes collapse to tokens.

    Returns: its view, and what must stay alive while it is used (a copy where `q` has gaps).
    """
    seen = view(q, f"{where}: {name}")
    check_query(where, name, seen, axes)
    seen = _token_stride(seen)
    collapses = len(seen.shape) < 4 or seen.strides[0] == seen.shape[1] * seen.strides[1]
    if (seen.strides[-1] == 1 or seen.shape[-1] == 1) and (collapses or seen.shape[0] == 1):
        return seen, q
    copy = restore(np.ascontiguousarray(as_numpy(q)), q)
    return view(copy), copy


def check_query(where: str, name: str, seen: View, axes: str) -> None:
    """DtypeError or ShapeError where queries are no floats, or have other axes."""
    if seen.dtype not in TYPES:
        raise DtypeError(f"{where}: {name} is {seen.dtype}, wanted {_FLOATS}; convert it")
    if len(seen.shape) != len(axes.split(",")):
        raise ShapeError(
            f"{where}: {name} has shape {list(seen.shape)}, wanted [{axes}]; reshape it"
        )


def _token_stride(seen: View) -> View:
    """[b, s, …] with a stride of s that steps over requests where s is 1: numpy gives such an axis
    any stride, 0 where it was made by None, and copies nothing to repair it."""
    if len(seen.shape) < 3 or seen.shape[1] != 1:
        return seen
    return seen._replace(strides=(seen.strides[0], seen.strides[0], *seen.strides[2:]))


def int32_operand(
    where: str, name: str, array: Any, shape: tuple[int | None, ...]
) -> tuple[View, Any]:
    """An int32 array [shape] with its last axis contiguous and rows evenly spaced."""
    seen = view(array, f"{where}: {name}")
    check_int32(where, name, seen, shape)
    seen = _token_stride(seen)
    rows = (
        len(shape) < 3 or seen.shape[0] == 1 or seen.strides[0] == seen.shape[1] * seen.strides[1]
    )
    if rows and (seen.strides[-1] == 1 or seen.shape[-1] <= 1):
        return seen, array
    copy = np.ascontiguousarray(as_numpy(array))
    return view(copy), copy


def check_int32(where: str, name: str, seen: View, shape: tuple[int | None, ...]) -> None:
    """DtypeError or ShapeError for anything but int32 [shape]; None fits any length."""
    if seen.dtype != "int32":
        raise DtypeError(f"{where}: {name} is {seen.dtype}, wanted int32; convert it")
    fits = len(seen.shape) == len(shape) and all(
        want is None or got == want for got, want in zip(seen.shape, shape, strict=True)
    )
    if not fits:
        wanted = ["any" if want is None else want for want in shape]
        raise ShapeError(
            f"{where}: {name} has shape {list(seen.shape)}, wanted {wanted}; reshape it, or give "
            "each token or request its own"
        )


def sink_operand(where: str, sink: Any, heads: int) -> int | None:
    """The address of a contiguous float32 [heads], or None."""
    if sink is None:
        return None
    seen = view(sink, f"{where}: attn_sink")
    check_sink(where, seen, heads)
    return seen.address


def check_sink(where: str, seen: View, heads: int) -> None:
    """ShapeError for anything but contiguous float32 [heads]."""
    wrong = (
        (seen.dtype != "float32", "", "convert it"),
        (seen.shape != (heads,), "", "pass a number for each query head"),
        (not seen.contiguous, f" of strides {list(seen.strides)}", "make it contiguous"),
    )
    for there, strides, remedy in wrong:
        if there:
            raise ShapeError(
                f"{where}: attn_sink is {seen.dtype} {list(seen.shape)}{strides}, wanted "
                f"contiguous float32 [{heads}]; {remedy}"
            )


def cache_operand(
    where: str, name: str, cache: Any, fp8: bool, width: int, of: str = "q has"
) -> tuple[Cache, int, int]:
    """A paged cache [blocks, page, kv heads, width].

    Args:
        fp8: whether its rows are of 656 bytes.
        width: of what `of` names, which the rows must have.
    Returns: the native struct, the format's code, the number of kv heads.
    """
    seen = view(cache, f"{where}: {name}")
    check_cache(where, name, seen, fp8, width, of)
    blocks, page, kv_heads, _ = seen.shape
    size = 1 if fp8 else {"float32": 4}.get(seen.dtype, 2)
    strides = [s * size for s in seen.strides[:3]]
    code = TYPES["fp8"] if fp8 else TYPES[seen.dtype]
    return Cache(seen.address, *strides, blocks, page), code, kv_heads


def check_cache(
    where: str, name: str, seen: View, fp8: bool, width: int, of: str = "q has"
) -> None:
    """ShapeError or DtypeError for what is no cache; arguments as of `cache_operand`."""
    if len(seen.shape) != 4:
        raise ShapeError(
            f"{where}: {name} has shape {list(seen.shape)}, wanted [blocks, page, kv heads, "
            "width]; reshape it"
        )
    blocks, page, kv_heads, last = seen.shape
    if fp8 != (seen.dtype in FP8_DTYPES):
        dtypes = f"one of {', '.join(FP8_DTYPES)}" if fp8 else _FLOATS
        raise DtypeError(
            f"{where}: {name} is {seen.dtype} and is_fp8_kvcache is {fp8}, wanted {dtypes}; "
            f"convert it, or pass is_fp8_kvcache={not fp8}"
        )
    if not fp8 and seen.dtype not in TYPES:
        raise DtypeError(f"{where}: {name} is {seen.dtype}, wanted {_FLOATS}; convert it")
    wanted, columns = (FP8_ROW_BYTES, FP8_WIDTH) if fp8 else (width, width)
    if last != wanted or width != columns:
        raise ShapeError(
            f"{where}: {name} has rows of {last} and {of} {width} columns, wanted rows of {wanted} "
            f"{'bytes ' if fp8 else ''}for {columns} columns; pass arrays that fit"
        )
    if page < 1 or kv_heads < 1:
        raise ShapeError(
            f"{where}: {name} has shape {list(seen.shape)}, wanted no axis of 0; pass pages with "
            "tokens and heads"
        )
    if seen.strides[-1] != 1 and last > 1 and blocks:  # numpy's strides of nothing are 0
        raise ShapeError(
            f"{where}: {name} has stride {seen.strides[-1]} in a row, wanted 1; make its rows "
            "contiguous"
        )


def check_heads(where: str, heads: int, name: str, kv_heads: int) -> None:
    """ShapeError where query heads are not shared out evenly over the kv heads of `name`."""
    if kv_heads == 0 or heads % kv_heads:
        raise ShapeError(
            f"{where}: q has {heads} query heads, wanted a multiple of the {kv_heads} kv heads of "
            f"{name}; pad q, or repeat heads of {name}"
        )


def check_one_head(where: str, name: str, kv_heads: int) -> None:
    """ShapeError where a cache has more heads than the one whose rows are listed by number."""
    if kv_heads != 1:
        raise ShapeError(
            f"{where}: {name} has {kv_heads} kv heads, wanted 1; pass one head at a time"
        )


def check_mixture(where: str, given: dict[str, Any]) -> None:
    """ConfigError where arguments of dense and of sparse attention come together.

    Args:
        given: arguments of `flash_mla_with_kvcache` by name.
    """
    extra = given["extra_k_cache"], given["extra_indices_in_kvcache"]
    if given["indices"] is None:
        names = "extra_k_cache", "extra_indices_in_kvcache", "topk_length", "extra_topk_length"
        for name in names:
            if given[name] is not None:
                raise ConfigError(
                    f"{where}: {name} is {shown(given[name])} and indices is None, wanted both or "
                    "neither; leave it out, it belongs to sparse attention"
                )
    elif given["causal"]:
        raise ConfigError(
            f"{where}: causal is True with indices, wanted False; leave it out, indices choose the "
            "keys"
        )
    elif (extra[0] is None) != (extra[1] is None):
        raise ConfigError(
            f"{where}: extra_k_cache is {shown(extra[0])} and extra_indices_in_kvcache is "
            f"{shown(extra[1])}, wanted both or neither; pass the other, too"
        )
    elif extra[0] is None and given["extra_topk_length"] is not None:
        raise ConfigError(
            f"{where}: extra_topk_length is {shown(given['extra_topk_length'])} and extra_k_cache "
            "is None, wanted both or neither; leave it out"
        )


def width_of_values(where: str, name: str, head_dim_v: Any, width: int) -> int:
    """`head_dim_v`, checked: values are a row's first columns."""
    return whole(f"{where}: {name}", head_dim_v, 1, width)


def scale_operand(where: str, name: str, given: Any, width: int | None = None) -> float:
    """The scale of the scores as a float; None means width ** -0.5 where `width` is given."""
    if given is None and width is not None:
        return float(width**-0.5)
    number: Any = given if isinstance(given, Real) and not isinstance(given, bool) else math.nan
    if not abs(number) <= _LARGEST_SCALE:  # NaN is refused, too
        large = _LARGEST_SCALE < abs(number) <= FLOAT_MAX
        kind = f"at most {_LARGEST_SCALE:.3g}" if large else "a finite number"
        raise ConfigError(
            f"{where}: {name} is {shown(given)}, wanted {kind}"
            + (" or None; leave it out" if width is not None else "; pass one")
        )
    return float(number)
