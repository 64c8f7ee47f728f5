"""Dense multi-head attention over sequences laid end to end: prompts in the expanded form.

Source: FlashMLA `flash_attn_varlen_func` and its packed forms.
"""

from __future__ import annotations

import ctypes
import math
from numbers import Real
from typing import Any

import numpy as np

from whalefall.arguments import flag, shown, whole
from whalefall.attention.native_calls import varlen_entry
from whalefall.attention.operands import check_heads, query_operand, scale_operand
from whalefall.attention.structs import TYPES, VarlenArgs, VarlenCall
from whalefall.dtypes import (
    KnownCalls,
    Places,
    Result,
    View,
    as_numpy,
    empty_like,
    refuse_gradient,
    view,
)
from whalefall.errors import ConfigError, DtypeError, ShapeError

__all__ = [
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
]

_IN = {"args.q": 0, "args.k": 1, "args.v": 2, "args.q_starts": 3, "args.k_starts": 4}
_PLACES = Places(VarlenCall, _IN, {"args.out": 0, "args.lse": 1}, status=True)
_CALLS = KnownCalls("aaaaassssnns")


def flash_attn_varlen_func(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_qo: Any,
    cu_seqlens_kv: Any,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[Any, Any]:
    """softmax(q kᵀ · scale) v for each sequence; the forward pass only.

    Args:
        q: [Tq, h_q, d]; k: [Tk, h_kv, d]; v: [Tk, h_kv, d_v]; bfloat16, float16 or float32, k and v
            of one dtype. Query head i reads kv head i // (h_q / h_kv).
        cu_seqlens_qo, cu_seqlens_kv: [b + 1] int32: where each sequence starts, and the ends.
            Tokens of q behind the last end belong to no sequence and see no keys.
        max_seqlen_qo, max_seqlen_kv: accepted; no buffer depends on them here.
        dropout_p: must be 0.
        softmax_scale: None: d ** -0.5.
        causal: token t of a sequence sees the keys up to len_kv - len_qo + t.
        deterministic: accepted; results are repeatable bit for bit either way.
        is_varlen: False: b sequences of equal length, cu_seqlens give only b.
    Returns: out [Tq, h_q, d_v] in q's dtype, lse [Tq, h_q] float32 (natural log, strides (1, Tq)).
        A token without keys: out 0, lse -inf.
    Raises: ShapeError, DtypeError, ConfigError; UnsupportedError where a gradient would be wanted:
        q, k or v needs one and torch records.
    Source: FlashMLA `flash_attn_varlen_func`.
    """
    where = "flash_attn_varlen_func"
    lengths = (max_seqlen_qo, max_seqlen_kv, deterministic)
    given = (q, k, v, cu_seqlens_qo, cu_seqlens_kv, dropout_p, softmax_scale, causal, is_varlen)
    known = _CALLS.find(*given, *lengths)
    if known is not None:
        return known  # type: ignore[no-any-return]
    _check_accepted(where, deterministic, qo=max_seqlen_qo, kv=max_seqlen_kv)
    return _attend(where, *given, lengths=lengths)


def flash_attn_varlen_kvpacked_func(
    q: Any,
    kv: Any,
    cu_seqlens_qo: Any,
    cu_seqlens_kv: Any,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    head_dim_qk: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[Any, Any]:
    """`flash_attn_varlen_func` with kv [Tk, h_kv, d + d_v], k in its first `head_dim_qk` columns.

    Source: FlashMLA `flash_attn_varlen_kvpacked_func`.
    """
    where = "flash_attn_varlen_kvpacked_func"
    _check_accepted(where, deterministic, qo=max_seqlen_qo, kv=max_seqlen_kv)
    _check_packed(where, "kv", kv, head_dim_qk)
    return _attend(
        *(where, q, kv[..., :head_dim_qk], kv[..., head_dim_qk:], cu_seqlens_qo, cu_seqlens_kv),
        *(dropout_p, softmax_scale, causal, is_varlen),
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Any,
    cu_seqlens: Any,
    max_seqlen: int,
    head_dim_qk: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[Any, Any]:
    """`flash_attn_varlen_func` with qkv [T, h, 2 d + d_v]: q, then k, of `head_dim_qk` columns.

    Source: FlashMLA `flash_attn_varlen_qkvpacked_func`.
    """
    where, d = "flash_attn_varlen_qkvpacked_func", head_dim_qk
    _check_accepted(where, deterministic, max_seqlen)
    _check_packed(where, "qkv", qkv, d, 2)
    return _attend(
        *(where, qkv[..., :d], qkv[..., d : 2 * d], qkv[..., 2 * d :], cu_seqlens, cu_seqlens),
        *(dropout_p, softmax_scale, causal, is_varlen),
    )


def _check_accepted(where: str, deterministic: Any, both: Any = 0, **lengths: Any) -> None:
    """What changes no result is what it says all the same; lengths may be arrays of one number."""
    flag(f"{where}: deterministic", deterministic)
    for name, given in (("", both), *((f"_{axis}", length) for axis, length in lengths.items())):
        one = getattr(given, "shape", None) == () and hasattr(given, "item")
        whole(f"{where}: max_seqlen{name}", given.item() if one else given, 0)


def _check_packed(where: str, name: str, packed: Any, width: Any, parts: int = 1) -> None:
    shape = view(packed, f"{where}: {name}").shape
    before_v = whole(f"{where}: head_dim_qk", width, 1) * parts
    if len(shape) != 3 or before_v >= shape[2]:
        raise ShapeError(
            f"{where}: {name} has shape {list(shape)} and head_dim_qk is {width}, wanted [tokens, "
            f"heads, more than {before_v}]; reshape it, or pass fewer columns"
        )


def _attend(
    where: str,
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_qo: Any,
    cu_seqlens_kv: Any,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    is_varlen: bool,
    lengths: tuple[Any, ...] | None = None,
) -> tuple[Any, Any]:
    given = (q, k, v, cu_seqlens_qo, cu_seqlens_kv, dropout_p, softmax_scale, causal, is_varlen)
    if not isinstance(dropout_p, Real) or dropout_p != 0.0:
        raise ConfigError(f"{where}: dropout_p is {shown(dropout_p)}, wanted 0; leave it out")
    causal = flag(f"{where}: causal", causal)
    is_varlen = flag(f"{where}: is_varlen", is_varlen)
    refuse_gradient(where, (q, k, v))
    operands = [query_operand(where, n, a, "T, h, d") for n, a in (("q", q), ("k", k), ("v", v))]
    seen_q, seen_k, seen_v = (seen for seen, _ in operands)
    _check_heads(where, seen_q, seen_k, seen_v)
    q_starts = _starts(where, "cu_seqlens_qo", cu_seqlens_qo, seen_q.shape[0], is_varlen)
    k_starts = _starts(where, "cu_seqlens_kv", cu_seqlens_kv, seen_k.shape[0], is_varlen)
    if len(q_starts) != len(k_starts):
        raise ShapeError(
            f"{where}: cu_seqlens_qo has {len(q_starts)} entries and cu_seqlens_kv "
            f"{len(k_starts)}, wanted as many; pass one for each sequence, and the end"
        )
    tokens, heads, width = seen_q.shape
    v_width = seen_v.shape[2]
    scale = scale_operand(where, "softmax_scale", softmax_scale, width)
    out = empty_like(q, (tokens, heads, v_width), seen_q.dtype)
    lse = empty_like(q, (heads, tokens), "float32")
    args = VarlenArgs(
        *(seen_q.address, seen_k.address, seen_v.address, *seen_q.strides[:2]),
        *(*seen_k.strides[:2], *seen_v.strides[:2], view(out).address, heads * v_width, v_width),
        *(view(lse).address, 1, tokens, q_starts.ctypes.data, k_starts.ctypes.data),
        *(len(q_starts) - 1, heads, seen_k.shape[1], width, v_width, scale, -math.inf, causal),
        *(TYPES[seen_q.dtype], TYPES[seen_q.dtype]),
    )
    if tokens * heads:
        call = VarlenCall(args, tokens, seen_k.shape[0])
        (run := varlen_entry(TYPES[seen_k.dtype]))(ctypes.addressof(call))
        if lengths is not None:
            results = (Result(q, out.shape, seen_q.dtype), Result(q, lse.shape, "float32", (0, 1)))
            _CALLS.keep((*given, *lengths), _PLACES, call, run, results)
    return out, lse.swapaxes(0, 1)


def _check_heads(where: str, q: View, k: View, v: View) -> None:
    if k.dtype != v.dtype:
        raise DtypeError(f"{where}: k is {k.dtype} and v {v.dtype}, wanted one dtype; convert one")
    if k.shape[:2] != v.shape[:2] or k.shape[2] != q.shape[2]:
        raise ShapeError(
            f"{where}: k is {list(k.shape)} and v {list(v.shape)}, wanted [Tk, h_kv, "
            f"{q.shape[2]}] and [Tk, h_kv, d_v] for q {list(q.shape)}; reshape them"
        )
    check_heads(where, q.shape[1], "k", k.shape[1])
    if q.shape[2] == 0 or v.shape[2] == 0:
        raise ShapeError(
            f"{where}: q has {q.shape[2]} columns and v {v.shape[2]}, wanted above 0; pass some"
        )


def _starts(where: str, name: str, cu_seqlens: Any, tokens: int, is_varlen: bool) -> Any:
    """Where sequences start, checked: a native call reads by them."""
    starts = as_numpy(cu_seqlens, f"{where}: {name}")
    if starts.ndim != 1 or len(starts) < 1 or starts.dtype != np.int32:
        raise ShapeError(
            f"{where}: {name} is {starts.dtype} {list(starts.shape)}, wanted int32 [b + 1]; "
            "convert it, starts and the end"
        )
    if not is_varlen:
        batch = max(1, len(starts) - 1)
        if tokens % batch:
            raise ShapeError(
                f"{where}: {name} has {batch} sequences of {tokens} tokens, wanted a multiple of "
                "the sequences; pass is_varlen=True, or pad"
            )
        return np.arange(batch + 1, dtype=np.int32) * np.int32(tokens // batch)
    steps_back = (np.diff(starts) < 0).any()
    if starts[0] != 0 or steps_back or starts[-1] > tokens:
        raise ShapeError(
            f"{where}: {name} is {starts.tolist()[:8]}, wanted it to start at 0, never to fall, "
            f"and to end at {tokens} at most; pass the lengths' cumulative sums"
        )
    return np.ascontiguousarray(starts)
