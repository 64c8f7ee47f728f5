"""MLA decode over a paged latent cache, dense or sparse: FlashMLA's main function.

In: queries of a batch, a cache in pages, a block table or indices. Out: values and log-sum-exp.
`reference.py` defines a row's result; work is cut by each row's own number of keys, so that a
request's bits do not depend on the batch.
Source: FlashMLA `flash_mla_with_kvcache`; DeepSeek-V2 paper, 2.1.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

from whalefall.arguments import flag, shown
from whalefall.attention.metadata import FlashMLASchedMeta, check_metadata
from whalefall.attention.native_calls import decode_entry, sparse_entry
from whalefall.attention.operands import (
    cache_operand,
    check_heads,
    check_mixture,
    check_one_head,
    int32_operand,
    query_operand,
    scale_operand,
    sink_operand,
    width_of_values,
)
from whalefall.attention.structs import TYPES, Chosen, DecodeArgs, PagedArgs, SparseArgs
from whalefall.dtypes import (
    KnownCalls,
    Places,
    Result,
    View,
    empty_like,
    refuse_gradient,
    view,
)
from whalefall.errors import ConfigError, ShapeError

__all__ = ["flash_mla_with_kvcache"]

_HERE = "flash_mla_with_kvcache"


def flash_mla_with_kvcache(
    q: Any,
    k_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    head_dim_v: int,
    tile_scheduler_metadata: Any,
    num_splits: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Any = None,
    attn_sink: Any = None,
    extra_k_cache: Any = None,
    extra_indices_in_kvcache: Any = None,
    topk_length: Any = None,
    extra_topk_length: Any = None,
) -> tuple[Any, Any]:
    """Attention of a few query tokens a request over latent rows, K whole, V their first columns.

    Args:
        q: [b, s_q, h_q, d] bfloat16, float16 or float32.
        k_cache: [blocks, page, h_kv, d], any page size; with `is_fp8_kvcache` [blocks, page, 1,
            656] bytes. Query head i reads kv head i // (h_q / h_kv).
        block_table: [b, n] int32, dense only: the blocks of each request; entries that a length
            does not reach may hold anything.
        cache_seqlens: [b] int32, dense only: keys of each request. Rows behind may hold anything.
        head_dim_v: columns of the values.
        tile_scheduler_metadata, num_splits: what `get_mla_metadata` gave; without influence.
        softmax_scale: None: d ** -0.5.
        causal: dense only: token t of s_q sees the keys up to length - s_q + t.
        indices: [b, s_q, topk] int32, makes the call sparse: block * page + offset of each key;
            whatever is out of range is none.
        attn_sink: [h_q] float32: a key without value, its score in natural units; not in lse.
        extra_k_cache, extra_indices_in_kvcache: sparse only: a second set of keys.
        topk_length, extra_topk_length: [b] int32, sparse only: how many indices count.
    Returns: out [b, s_q, h_q, head_dim_v] in q's dtype, lse [b, h_q, s_q] float32 (natural log).
        A row without keys: out 0, lse +inf.
    Raises: ShapeError, DtypeError, ConfigError; UnsupportedError where a gradient would be wanted.
    Source: FlashMLA `flash_mla_with_kvcache`.
    """
    args = (
        *(q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits),
        *(softmax_scale, causal, is_fp8_kvcache, indices, attn_sink, extra_k_cache),
        *(extra_indices_in_kvcache, topk_length, extra_topk_length),
    )
    known = _CALLS.find(*args)
    if known is not None:
        return known  # type: ignore[no-any-return]
    check_metadata(_HERE, tile_scheduler_metadata, num_splits)
    refuse_gradient(_HERE, (q, k_cache, attn_sink, extra_k_cache))
    if getattr(getattr(q, "device", None), "type", "cpu") == "cuda":
        return _on_gpu(locals())
    causal = flag(f"{_HERE}: causal", causal)
    is_fp8_kvcache = flag(f"{_HERE}: is_fp8_kvcache", is_fp8_kvcache)
    seen, kept = query_operand(_HERE, "q", q, "b, s_q, h_q, d")
    head_dim_v = width_of_values(_HERE, "head_dim_v", head_dim_v, seen.shape[3])
    scale = scale_operand(_HERE, "softmax_scale", softmax_scale, seen.shape[3])
    b, s_q, h_q, _ = seen.shape
    call = _Call(q, (b, s_q, h_q, head_dim_v), seen.dtype)
    sink = sink_operand(_HERE, attn_sink, h_q)
    check_mixture(_HERE, locals())
    if indices is None:
        dense = (k_cache, block_table, cache_seqlens)
        _dense(call, seen, dense, head_dim_v, scale, causal, is_fp8_kvcache, sink)
    else:
        for name, unused in (("block_table", block_table), ("cache_seqlens", cache_seqlens)):
            if unused is not None:
                view(unused, f"{_HERE}: {name}")
        _sparse(
            *(call, seen, head_dim_v, scale, is_fp8_kvcache, sink),
            (k_cache, indices, topk_length),
            (extra_k_cache, extra_indices_in_kvcache, extra_topk_length),
        )
    call.keep.append(kept)
    result = call()
    call.take_down(args)
    return result


# Arrays in the order of the call's arguments.
_DENSE = Places(
    DecodeArgs,
    {"paged.q": 0, "paged.cache.data": 1, "block_table": 2, "lengths": 3, "paged.sink": 5},
    {"paged.out": 0, "paged.lse": 1},
    status=True,
)
_SPARSE = Places(
    SparseArgs,
    {
        "q": 0,
        "main.cache.data": 1,
        "main.indices": 4,
        "sink": 5,
        "extra.cache.data": 6,
        "extra.indices": 7,
        "main.lengths": 8,
        "extra.lengths": 9,
    },
    {"out": 0, "lse": 1},
)
_CALLS = KnownCalls("aaaasoosssaaaaaa", classes=(FlashMLASchedMeta,))


class _Call:
    """A checked call: allocates results, and runs its native struct on them.

    Attributes:
        args: the struct, and within it `paged`, which has the addresses of the results.
        keep: what must stay alive while the struct is used: the arrays, or copies of them.
    """

    def __init__(self, q: Any, shape: tuple[int, int, int, int], dtype: str) -> None:
        self.q, self.shape, self.dtype = q, shape, dtype
        self.empty = 0 in shape
        self.args: Any = None
        self.paged: Any = None
        self.entry: Any = None
        self.refuse: Any = None
        self.keep: list[Any] = []

    def set(self, args: Any, paged: Any, entry: Any, refuse: Any = None) -> None:
        self.args, self.paged, self.entry, self.refuse = args, paged, entry, refuse

    def take_down(self, given: tuple[Any, ...]) -> None:
        """Let a call like this one be known, whose arguments were `given`."""
        if self.empty:
            return
        if self.refuse:  # filled in by each call
            self.paged.tables = self.paged.keys = None
        lse = Result(self.q, self.shape[:3], "float32", (1, 2))
        results = (Result(self.q, self.shape, self.dtype), lse)
        _CALLS.keep(given, _DENSE if self.refuse else _SPARSE, self.args, self.entry, results)

    def __call__(self) -> tuple[Any, Any]:
        out = empty_like(self.q, self.shape, self.dtype)
        lse = empty_like(self.q, self.shape[:3], "float32")
        if not self.empty:
            self.paged.out, self.paged.lse = view(out).address, view(lse).address
            refusal = self.entry(ctypes.addressof(self.args))
            if refusal and self.refuse:
                self.refuse(refusal)
        return out, lse.swapaxes(1, 2)


def _on_gpu(arguments: dict[str, Any]) -> tuple[Any, Any]:
    from whalefall.attention.triton import decode_call

    return decode_call(arguments)


def _dense(
    call: _Call,
    q: View,
    arrays: tuple[Any, Any, Any],
    v_width: int,
    scale: float,
    causal: bool,
    fp8: bool,
    sink: int | None,
) -> None:
    b, s_q, h_q, width = q.shape
    cache, kind, kv_heads = cache_operand(_HERE, "k_cache", arrays[0], fp8, width)
    check_heads(_HERE, h_q, "k_cache", kv_heads)
    table, table_kept = int32_operand(_HERE, "block_table", arrays[1], (b, None))
    lengths, lengths_kept = int32_operand(_HERE, "cache_seqlens", arrays[2], (b,))
    heads = (h_q * v_width, v_width)
    args = DecodeArgs(
        PagedArgs(
            *(q.address, q.strides[1], q.strides[2], None, *heads),
            *(None, h_q, 1, sink, None, None, b * s_q, h_q, kv_heads),
            *(width, v_width, cache, scale, math.inf, TYPES[q.dtype], TYPES[q.dtype], kind),
        ),
        *(table.address, table.strides[0], table.shape[1], lengths.address, b, s_q, 0, 0, 0),
        causal,
    )
    limits = (table.shape[1], cache.page, cache.blocks)

    def refuse(refusal: int) -> None:
        columns, page, blocks = limits
        if refusal == 1:
            raise ShapeError(
                f"{_HERE}: cache_seqlens[{args.wrong_request}] is {args.wrong_value}, wanted 0 to "
                f"{columns * page} = {columns} blocks of {page} keys; correct it, or widen "
                "block_table"
            )
        wanted = f"wanted 0 to {blocks - 1}" if blocks else "wanted none: k_cache has no blocks"
        raise ShapeError(
            f"{_HERE}: block_table[{args.wrong_request}, {args.wrong_entry}] is "
            f"{args.wrong_value}, {wanted}; the length reaches this entry, name a block of k_cache"
        )

    call.keep += [table_kept, lengths_kept]
    entry = decode_entry(kind, h_q // kv_heads, q.dtype == "bfloat16") if not call.empty else None
    call.set(args, args.paged, entry, refuse)


def _sparse(
    call: _Call,
    q: View,
    v_width: int,
    scale: float,
    fp8: bool,
    sink: int | None,
    main: tuple[Any, Any, Any],
    extra: tuple[Any, Any, Any],
) -> None:
    b, s_q, h_q, width = q.shape
    first, kind = _chosen(call, main, ("k_cache", "indices", "topk_length"), fp8, q)
    second = Chosen()
    if extra[0] is not None:
        names = ("extra_k_cache", "extra_indices_in_kvcache", "extra_topk_length")
        second, other = _chosen(call, extra, names, fp8, q)
        if other != kind:
            raise ConfigError(
                f"{_HERE}: extra_k_cache is {shown(extra[0])} and k_cache is {shown(main[0])}, "
                "wanted one dtype; convert one"
            )
    args = SparseArgs(
        *(q.address, q.strides[1], q.strides[2], None, h_q * v_width, v_width),
        *(None, None, h_q, 1, sink, b * s_q, h_q, width, v_width, first, second),
        *(scale, math.inf, TYPES[q.dtype], TYPES[q.dtype], kind),
    )
    call.set(args, args, None if call.empty else sparse_entry(kind, h_q, q.dtype == "bfloat16"))


def _chosen(
    call: _Call, given: tuple[Any, Any, Any], names: tuple[str, str, str], fp8: bool, q: View
) -> tuple[Chosen, int]:
    b, s_q, _, width = q.shape
    cache, kind, kv_heads = cache_operand(_HERE, names[0], given[0], fp8, width)
    check_one_head(_HERE, names[0], kv_heads)
    indices, kept = int32_operand(_HERE, names[1], given[1], (b, s_q, None))
    lengths, lengths_kept = None, None
    if given[2] is not None:
        seen, lengths_kept = int32_operand(_HERE, names[2], given[2], (b,))
        lengths = seen.address
    call.keep += [kept, lengths_kept]
    chosen = Chosen(
        *(cache, indices.address, indices.strides[1], indices.shape[2], lengths, max(1, s_q))
    )
    return chosen, kind
