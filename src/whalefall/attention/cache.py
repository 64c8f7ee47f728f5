"""The latent cache: appending rows."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from whalefall.arguments import flag
from whalefall.attention.fp8_rows import LATENT
from whalefall.attention.native_calls import append_entry
from whalefall.attention.operands import (
    cache_operand,
    check_one_head,
    int32_operand,
    query_operand,
)
from whalefall.attention.structs import TYPES, AppendArgs
from whalefall.dtypes import refuse_gradient
from whalefall.dtypes.written import refuse_overlap, written
from whalefall.errors import ShapeError

__all__ = ["append_latent"]

_HERE = "append_latent"


def append_latent(
    latent: Any,
    rope: Any,
    cache: Any,
    slots: Any,
    is_fp8_kvcache: bool = False,
) -> None:
    """Write new rows (normalised latent, then rope) into a paged cache, rounding to its format.

    Args:
        latent: [T, kv_lora]; rope: [T, rope]; float32, bfloat16 or float16, of one dtype.
        cache: [blocks, page, 1, kv_lora + rope], or [blocks, page, 1, 656] bytes with
            `is_fp8_kvcache` (kv_lora 512, rope 64): codes, a power of two for each 128 columns.
        slots: [T] int32: block * page + offset of each row; -1 writes nothing. Of rows with one
            slot the last is kept.
    Raises: ShapeError, also where the cache's memory overlaps latent or rope; DtypeError,
        ConfigError; UnsupportedError where a gradient would be wanted.
    """
    refuse_gradient(_HERE, (latent, rope, cache))
    is_fp8_kvcache = flag(f"{_HERE}: is_fp8_kvcache", is_fp8_kvcache)
    parts = [
        query_operand(_HERE, n, a, "T, width") for n, a in (("latent", latent), ("rope", rope))
    ]
    (left, _), (right, _) = parts
    tokens, width = left.shape[0], left.shape[1] + right.shape[1]
    if right.shape[0] != tokens or left.dtype != right.dtype:
        raise ShapeError(
            f"{_HERE}: latent is {left.dtype} {list(left.shape)} and rope {right.dtype} "
            f"{list(right.shape)}, wanted as many rows of one dtype; convert or cut one"
        )
    if is_fp8_kvcache and left.shape[1] != LATENT:
        raise ShapeError(
            f"{_HERE}: latent has {left.shape[1]} columns, wanted {LATENT} for an FP8 row; pad it, "
            "or pass a cache of floats"
        )
    refuse_overlap(_HERE, "cache", written(cache, f"{_HERE}: cache"), (left, right))
    pages, kind, kv_heads = cache_operand(
        _HERE, "cache", cache, is_fp8_kvcache, width, "latent and rope have"
    )
    check_one_head(_HERE, "cache", kv_heads)
    seen, kept = int32_operand(_HERE, "slots", slots, (tokens,))
    slot = np.ctypeslib.as_array((ctypes.c_int32 * tokens).from_address(seen.address)).copy()
    rows = pages.blocks * pages.page
    if tokens and (slot.max() >= rows or slot.min() < -1):
        wrong = int(np.argmax((slot >= rows) | (slot < -1)))
        most = f"-1 to {rows - 1} = blocks * page - 1" if rows else "-1: cache has no blocks"
        raise ShapeError(
            f"{_HERE}: slots[{wrong}] is {slot[wrong]}, wanted {most}; name a slot of the "
            "cache, or -1 for none"
        )
    _only_the_last(slot)
    # One table that names every block: a slot is then a position in it.
    table = np.arange(pages.blocks, dtype=np.int32)
    tables = np.full(1, table.ctypes.data, np.uint64).repeat(tokens)
    args = AppendArgs(
        *(left.address, right.address, left.strides[0], left.shape[1]),
        *(right.strides[0], right.shape[1], TYPES[left.dtype], kind, tables.ctypes.data),
        *(slot.ctypes.data, tokens, pages),
    )
    if tokens:
        append_entry()(ctypes.addressof(args))
    del parts, kept


def _only_the_last(slots: npt.NDArray[np.int32]) -> None:
    """Makes each slot that is named again further on -1: threads write rows in any order."""
    ordered = np.sort(slots)
    if not ((ordered[1:] == ordered[:-1]) & (ordered[1:] >= 0)).any():
        return
    _, from_the_end = np.unique(slots[::-1], return_index=True)
    earlier = np.ones(len(slots), bool)
    earlier[len(slots) - 1 - from_the_end] = False
    slots[earlier] = -1
