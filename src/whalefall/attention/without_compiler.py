"""The native entries of this room in numpy, for machines without a C++ compiler.

In: the structs that the native units take, by address. Out: the same results, by the float64
definitions of `reference.py`, rounded once. Slow; memory grows with the keys of one request or
head, never with tokens times keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from whalefall.attention.fp8_rows import dequantize_kv_cache, quantize_kv_rows
from whalefall.attention.reference import Doubles, attention, merge, with_sink
from whalefall.attention.structs import (
    FP8_ROW_BYTES,
    TYPES,
    AppendArgs,
    Cache,
    Chosen,
    DecodeArgs,
    MergeArgs,
    PagedArgs,
    SparseArgs,
    VarlenArgs,
    VarlenCall,
)
from whalefall.dtypes import NUMPY_DTYPES, View, over_memory

__all__ = ["entry"]

Array = npt.NDArray[Any]
KEYS = 4096  # that are float64 at a time
ROWS = 512  # of queries that dense attention looks at together
_NAMES = {code: name for name, code in TYPES.items()} | {TYPES["fp8"]: "uint8"}


def _at(address: int | None, shape: tuple[int, ...], strides: tuple[int, ...], name: str) -> Array:
    return over_memory(View(address or 0, shape, strides, name))


def _int32(address: int, count: int) -> Array:
    return _at(address, (count,), (1,), "int32")


def entry(name: str, row: str) -> Callable[[int], int]:
    """The entry of that name in a unit compiled for a row format, which only varlen's needs."""
    if name == "wf_varlen_attention":
        kv_type = {"Fp32Row": "float32", "Bf16Row": "bfloat16", "Fp16Row": "float16"}[row]
        return functools.partial(wf_varlen_attention, kv_type)
    return _ENTRIES[name]


# NaN and infinity are results like others: no warnings
@np.errstate(all="ignore")
def wf_decode(address: int) -> int:
    """`DecodeArgs`: checks what lengths and tables hold, then attends.

    Returns: 0, or 1 for a length and 2 for a block that there is not; `wrong_*` say which.
    """
    call = DecodeArgs.from_address(address)
    paged, tokens = call.paged, call.per_request
    table = _at(call.block_table, (call.batch, call.table_width), (call.table_stride, 1), "int32")
    lengths = _int32(call.lengths, call.batch)
    for request, length in enumerate(lengths.tolist()):
        call.wrong_request, call.wrong_value = request, length
        if not 0 <= length <= call.table_width * paged.cache.page:
            return 1
        used = table[request, : -(-length // paged.cache.page)]
        wrong = np.flatnonzero((used < 0) | (used >= paged.cache.blocks))
        if len(wrong):
            call.wrong_entry, call.wrong_value = int(wrong[0]), int(used[wrong[0]])
            return 2
    behind = np.arange(tokens)[::-1] if call.causal else np.zeros(tokens, np.int64)
    seen = np.maximum(0, lengths[:, None].astype(np.int64) - behind)
    for t in range(call.batch * tokens):
        request = t // tokens
        _paged_token(paged, t, table[request], int(seen[request, t % tokens]))
    return 0


@np.errstate(all="ignore")
def wf_paged_attention(address: int) -> int:
    """`PagedArgs`: every token brings the address of its block table, and its number of keys."""
    call = PagedArgs.from_address(address)
    tables = _at(call.tables, (call.tokens,), (1,), "int64").tolist()
    for t, (table, seen) in enumerate(zip(tables, _int32(call.keys, call.tokens), strict=True)):
        blocks = -(-int(seen) // call.cache.page)
        _paged_token(call, t, _int32(table, blocks), int(seen))
    return 0


def _paged_token(call: PagedArgs, token: int, table: Array, seen: int) -> None:
    key = np.arange(seen)
    blocks, offsets = table[key // call.cache.page], key % call.cache.page
    group = call.heads // call.kv_heads
    for kv_head in range(call.kv_heads):
        rows = _stored(call.cache, call.cache_type, call.width, call.kv_heads)
        heads = slice(kv_head * group, (kv_head + 1) * group)
        _latent_token(call, token, heads, rows[blocks, offsets, kv_head])


@np.errstate(all="ignore")
def wf_sparse_attention(address: int) -> int:
    """`SparseArgs`: every token lists the rows that it sees, in one cache or two."""
    call = SparseArgs.from_address(address)
    for t in range(call.tokens):
        rows = [
            _listed(chosen, t, _stored(chosen.cache, call.cache_type, call.width, 1))
            for chosen in (call.main, call.extra)
            if chosen.indices
        ]
        keys = np.concatenate(rows) if rows else np.empty((0, call.width), np.float32)
        top = _latent_token(call, t, slice(0, call.heads), keys)
        if call.max_logits:
            place = call.max_logits + t * call.lse_token * 4
            _at(place, (call.heads,), (call.lse_head,), "float32")[:] = top
    return 0


def _listed(chosen: Chosen, token: int, stored: Array) -> Array:
    """The rows that a token's indices name; those out of range name none."""
    count = chosen.topk
    if chosen.lengths:
        place = chosen.lengths + token // chosen.tokens_per_length * 4
        count = min(max(0, int(_int32(place, 1)[0])), count)
    index = _int32(chosen.indices + token * chosen.index_token * 4, count)
    blocks, page = stored.shape[:2]
    index = index[(index >= 0) & (index < blocks * page)]
    return stored[index // page, index % page, 0]


def _stored(cache: Cache, kind: int, width: int, kv_heads: int) -> Array:
    """A cache [blocks, page, kv heads, width], as it lies in memory."""
    name, width = _NAMES[kind], FP8_ROW_BYTES if kind == TYPES["fp8"] else width
    size = NUMPY_DTYPES[name].itemsize
    strides = (cache.block_stride, cache.row_stride, cache.head_stride)
    shape = (cache.blocks, cache.page, kv_heads, width)
    return _at(cache.data, shape, (*(s // size for s in strides), 1), name)


def _latent_token(call: PagedArgs | SparseArgs, token: int, heads: slice, rows: Array) -> Doubles:
    """Some heads of a token over stored rows, values their first columns. Returns: max_logits."""
    q = _part(call, "q", call.q_type, call.width, slice(token, token + 1), heads)[0]
    out, top, lse = _attend(q, rows, None, call)
    if call.sink:
        out = with_sink(out, lse, _at(call.sink, (call.heads,), (1,), "float32")[heads])
    _write(call, slice(token, token + 1), heads, out, lse)
    return top


def _part(call: Any, name: str, kind: int, width: int, tokens: slice, heads: slice) -> Array:
    """[tokens, heads, width] of an array that a struct has with strides `…_token`, `…_head`."""
    steps = getattr(call, f"{name}_token"), getattr(call, f"{name}_head")
    begin = tokens.start * steps[0] + heads.start * steps[1]
    address = getattr(call, name) + begin * NUMPY_DTYPES[_NAMES[kind]].itemsize
    shape = (tokens.stop - tokens.start, heads.stop - heads.start, width)
    return _at(address, shape, (*steps, 1), _NAMES[kind])


def _write(call: Any, tokens: slice, heads: slice, out: Doubles, lse: Doubles) -> None:
    """Results [tokens · heads, Dv] and [tokens · heads] to where the struct wants them."""
    to = _part(call, "out", call.out_type, call.v_width, tokens, heads)
    to[:] = out.astype(np.float32).reshape(to.shape)
    if call.lse:
        to = _part(call, "lse", TYPES["float32"], 1, tokens, heads)
        to[:] = lse.reshape(to.shape)


def _attend(q: Array, k: Array, v: Array | None, call: Any) -> tuple[Doubles, Doubles, Doubles]:
    """`attention` of q [rows, D] over keys [N, D] as stored, `KEYS` of them at a time.

    Values are v [N, Dv], or without it the keys' first columns.
    """
    parts = []
    for first in range(0, max(1, len(k)), KEYS):
        keys = k[first : first + KEYS]
        keys = dequantize_kv_cache(keys) if keys.dtype == np.uint8 else keys
        keys = keys.astype(np.float64, copy=False)
        values = keys[:, : call.v_width] if v is None else v[first : first + KEYS]
        parts.append(attention(q, keys, values, call.scale, None, call.lonely_lse))
    if len(parts) == 1:
        return parts[0]
    outs, tops, lses = (np.stack(each) for each in zip(*parts, strict=True))
    out, lse = merge(outs, lses, call.lonely_lse)
    return out, tops.max(axis=0), lse


@np.errstate(all="ignore")
def wf_varlen_attention(kv_type: str, address: int) -> int:
    """`VarlenCall`: dense attention over sequences end to end, one kv head after another."""
    checked = VarlenCall.from_address(address)
    call = checked.args
    starts = [_int32(each, call.sequences + 1).tolist() for each in (call.q_starts, call.k_starts)]
    for s in range(call.sequences):
        tokens, keys = (slice(*each[s : s + 2]) for each in starts)
        for head in range(call.kv_heads):
            of_head, kind = slice(head, head + 1), TYPES[kv_type]
            k = _part(call, "k", kind, call.width, keys, of_head)[:, 0].astype(np.float64)
            v = _part(call, "v", kind, call.v_width, keys, of_head)[:, 0].astype(np.float64)
            _sequence(call, tokens, head, k, v)
    nobodys = slice(starts[0][-1], checked.q_tokens)
    rows = (nobodys.stop - nobodys.start) * call.heads
    none = np.zeros((rows, call.v_width)), np.full(rows, call.lonely_lse)
    _write(call, nobodys, slice(0, call.heads), *none)
    return 0


def _sequence(call: VarlenArgs, tokens: slice, kv_head: int, k: Doubles, v: Doubles) -> None:
    """A sequence's query heads of a kv head, a block of tokens at a time.

    Keys that all tokens of a block see are one product, the others are looked at token by token.
    """
    group = call.heads // call.kv_heads
    heads, step = slice(kv_head * group, (kv_head + 1) * group), max(1, ROWS // group)
    for first in range(tokens.start, tokens.stop, step):
        block = slice(first, min(first + step, tokens.stop))
        q = _part(call, "q", call.q_type, call.width, block, heads).astype(np.float64)
        seen = np.full(len(q), len(k))
        if call.causal:  # aligned to the end
            seen = np.maximum(0, len(k) - tokens.stop + 1 + np.arange(block.start, block.stop))
        common = int(seen[0])
        out, _, lse = _attend(q.reshape(-1, call.width), k[:common], v[:common], call)
        if seen[-1] > common:
            own = [_attend(x, k[common:n], v[common:n], call) for x, n in zip(q, seen, strict=True)]
            outs, _, lses = (np.concatenate(each) for each in zip(*own, strict=True))
            out, lse = merge(np.stack([out, outs]), np.stack([lse, lses]), call.lonely_lse)
        _write(call, block, heads, out, lse)


@np.errstate(all="ignore")
def wf_merge(address: int) -> int:
    """`MergeArgs`: partial results put together by log-sum-exp."""
    call = MergeArgs.from_address(address)
    parts, rows, width, name = call.parts, call.rows, call.width, _NAMES[call.type]
    out = _at(call.out, (parts, rows, width), (rows * width, width, 1), name)
    merged = _at(call.merged, (rows, width), (width, 1), name)
    merged_lse = _at(call.merged_lse, (rows,), (1,), "float32")
    lse = _at(call.lse, (parts, rows), (rows, 1), "float32")
    values, merged_lse[:] = merge(out, lse, call.lonely_lse)
    merged[:] = values.astype(np.float32)
    return 0


@np.errstate(all="ignore")
def wf_cache_append(address: int) -> int:
    """`AppendArgs`: new rows, rounded to a cache's format, into their pages."""
    call = AppendArgs.from_address(address)
    latent, rope = (
        _at(at, (call.tokens, width), (stride, 1), _NAMES[call.type])
        for at, width, stride in (
            (call.latent, call.latent_width, call.latent_stride),
            (call.rope, call.rope_width, call.rope_stride),
        )
    )
    stored = _stored(call.cache, call.cache_type, call.latent_width + call.rope_width, 1)
    if call.cache_type == TYPES["fp8"]:
        rows: Array = quantize_kv_rows(latent, rope)
    else:
        rows = np.concatenate([latent, rope], axis=1).astype(np.float32).astype(stored.dtype)
    tables = _at(call.tables, (call.tokens,), (1,), "int64").tolist()
    positions = _int32(call.positions, call.tokens).tolist()
    for row, table, position in zip(rows, tables, positions, strict=True):
        if position < 0:
            continue
        block = int(_int32(table, position // call.cache.page + 1)[-1])
        stored[block, position % call.cache.page, 0] = row
    return 0


_ENTRIES: dict[str, Callable[[int], int]] = {
    "wf_cache_append": wf_cache_append,
    "wf_decode": wf_decode,
    "wf_merge": wf_merge,
    "wf_paged_attention": wf_paged_attention,
    "wf_sparse_attention": wf_sparse_attention,
}
