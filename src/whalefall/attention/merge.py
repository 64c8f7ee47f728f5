"""Putting partial results together: attention over parts of the keys, merged by log-sum-exp.

Source: FlashMLA's combine kernel; context parallelism and shared prefixes need the same.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np

from whalefall.attention.native_calls import merge_entry
from whalefall.attention.structs import TYPES, MergeArgs
from whalefall.dtypes import as_numpy, empty_like, refuse_gradient, restore, view
from whalefall.errors import DtypeError, ShapeError

__all__ = ["merge_partials"]


def merge_partials(out: Any, lse: Any) -> tuple[Any, Any]:
    """The attention over all keys, from its results over disjoint parts of them.

    Args:
        out: [parts, rows …, d_v] float32, bfloat16 or float16.
        lse: [parts, rows …] float32, natural log; -inf and +inf both mean: this part has no keys;
            but a row of `out` that holds NaN then counts (a sum of NaN has lse +inf, too).
    Returns: out [rows …, d_v] of the same dtype, lse [rows …]; +inf where no part has keys.
        NaN is never lost: where lse is NaN, or infinite beside NaN in `out`, the merged row is NaN,
        its lse +inf. Parts are added in order, so the bits depend on nothing else.
    Raises: ShapeError, DtypeError; UnsupportedError where a gradient would be wanted.
    """
    refuse_gradient("merge_partials", (out, lse))
    seen, weights = view(out, "merge_partials: out"), view(lse, "merge_partials: lse")
    if seen.dtype not in TYPES or weights.dtype != "float32":
        raise DtypeError(
            f"merge_partials: out is {seen.dtype} and lse {weights.dtype}, wanted bfloat16, "
            "float16 or float32, and float32; convert them"
        )
    if len(seen.shape) < 2 or seen.shape[:-1] != weights.shape:
        raise ShapeError(
            f"merge_partials: out is {list(seen.shape)} and lse {list(weights.shape)}, wanted "
            "[parts, rows …, d_v] and [parts, rows …]; reshape them"
        )
    if not seen.contiguous:
        out = restore(np.ascontiguousarray(as_numpy(out)), out)
    if not weights.contiguous:
        lse = restore(np.ascontiguousarray(as_numpy(lse)), lse)
    merged = empty_like(out, seen.shape[1:], seen.dtype)
    merged_lse = empty_like(lse, seen.shape[1:-1], "float32")
    args = MergeArgs(
        *(view(out).address, view(lse).address, view(merged).address, view(merged_lse).address),
        *(seen.shape[0], math.prod(seen.shape[1:-1]), seen.shape[-1], math.inf, TYPES[seen.dtype]),
    )
    merge_entry()(ctypes.addressof(args))
    return merged, merged_lse
