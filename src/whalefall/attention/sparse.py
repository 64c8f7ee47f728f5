"""Sparse MLA prefill: each token of one sequence attends to the rows that it lists.

Source: FlashMLA `flash_mla_sparse_fwd`; DeepSeek-V3.2's sparse attention.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

from whalefall.attention.native_calls import sparse_entry
from whalefall.attention.operands import (
    int32_operand,
    query_operand,
    scale_operand,
    sink_operand,
    width_of_values,
)
from whalefall.attention.structs import TYPES, Cache, Chosen, SparseArgs
from whalefall.dtypes import KnownCalls, Places, Result, empty_like, refuse_gradient, view
from whalefall.errors import ShapeError

__all__ = ["flash_mla_sparse_fwd"]

_HERE = "flash_mla_sparse_fwd"
_PLACES = Places(
    SparseArgs,
    {"q": 0, "main.cache.data": 1, "main.indices": 2, "sink": 3, "main.lengths": 4},
    {"out": 0, "max_logits": 1, "lse": 2},
)
_CALLS = KnownCalls("aaassaa")


def flash_mla_sparse_fwd(
    q: Any,
    kv: Any,
    indices: Any,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: Any = None,
    topk_length: Any = None,
) -> tuple[Any, Any, Any]:
    """Attention of each token over its own list of rows.

    Args:
        q: [s_q, h_q, d] bfloat16, float16 or float32.
        kv: [s_kv, 1, d] of q's dtype: keys, their first `d_v` columns the values.
        indices: [s_q, 1, topk] int32 rows of kv; whatever is out of range is none.
        sm_scale: of the scores.
        attn_sink: [h_q] float32: a key without value, its score in natural units; not in lse.
        topk_length: [s_q] int32: how many of a token's indices count.
    Returns: out [s_q, h_q, d_v] in q's dtype; max_logits and lse [s_q, h_q] float32, natural units.
        A token without keys: out 0, max_logits -inf, lse +inf.
    Raises: ShapeError, DtypeError, ConfigError; UnsupportedError where a gradient would be wanted.
    Source: FlashMLA `flash_mla_sparse_fwd`.
    """
    given = (q, kv, indices, sm_scale, d_v, attn_sink, topk_length)
    known = _CALLS.find(*given)
    if known is not None:
        return known  # type: ignore[no-any-return]
    refuse_gradient(_HERE, (q, kv, attn_sink))
    seen, kept = query_operand(_HERE, "q", q, "s_q, h_q, d")
    s_q, h_q, width = seen.shape
    d_v = width_of_values(_HERE, "d_v", d_v, width)
    scale = scale_operand(_HERE, "sm_scale", sm_scale)
    rows = view(kv, f"{_HERE}: kv")
    if len(rows.shape) != 3 or rows.shape[1:] != (1, width) or rows.dtype != seen.dtype:
        raise ShapeError(
            f"{_HERE}: kv is {rows.dtype} {list(rows.shape)}, wanted {seen.dtype} [s_kv, 1, "
            f"{width}] like q; convert or reshape it"
        )
    if rows.strides[2] != 1 and width > 1 and rows.shape[0]:  # numpy's strides of nothing are 0
        raise ShapeError(
            f"{_HERE}: kv has stride {rows.strides[2]} in a row, wanted 1; make its rows contiguous"
        )
    index, index_kept = int32_operand(_HERE, "indices", indices, (s_q, 1, None))
    lengths, lengths_kept = None, None
    if topk_length is not None:
        length_view, lengths_kept = int32_operand(_HERE, "topk_length", topk_length, (s_q,))
        lengths = length_view.address
    out = empty_like(q, (s_q, h_q, d_v), seen.dtype)
    max_logits, lse = (empty_like(q, (s_q, h_q), "float32") for _ in range(2))
    row_bytes = rows.strides[0] * (4 if rows.dtype == "float32" else 2)
    cache = Cache(rows.address, row_bytes, row_bytes, 0, rows.shape[0], 1)
    code = TYPES[seen.dtype]
    args = SparseArgs(
        *(seen.address, seen.strides[0], seen.strides[1], view(out).address, h_q * d_v, d_v),
        *(view(lse).address, view(max_logits).address, h_q, 1, sink_operand(_HERE, attn_sink, h_q)),
        *(s_q, h_q, width, d_v),
        Chosen(cache, index.address, index.strides[0], index.shape[2], lengths, 1),
        *(Chosen(), scale, math.inf, code, code, code),
    )
    if s_q * h_q:
        (run := sparse_entry(code, h_q, seen.dtype == "bfloat16"))(ctypes.addressof(args))
        of_rows = Result(q, (s_q, h_q), "float32")
        results = (Result(q, (s_q, h_q, d_v), seen.dtype), of_rows, of_rows)
        _CALLS.keep(given, _PLACES, args, run, results)
    del kept, index_kept, lengths_kept
    return out, max_logits, lse
