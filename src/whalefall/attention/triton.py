"""MLA decode on CUDA tensors: BF16 and 656-byte FP8 caches, by block table or by indices.

One program takes up to 64 query heads of a token and one run of its keys; runs are merged by
log-sum-exp in order. A run's length follows from the token's own number of keys, so a request's
bits do not depend on the batch. K is read once a tile for both products: 512 columns as keys and
values, 64 rope columns as keys only. With 64 heads and 8 warps an accumulator of 64 x 512 fp32
takes 128 registers a thread, and both products are wgmma on sm_90a.
Whatever lengths, tables and indices hold, nothing outside the arrays is read: an index that there
is not names no key, a list's length ends with it, and a request whose length or blocks a CPU would
refuse has no keys (nobody looks at them before the kernel does).
Checked in Triton's interpreter and compiled for sm_90a; not run on a GPU.
Source: FlashMLA `flash_mla_with_kvcache`; split-KV decoding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from whalefall.attention.gpu_arguments import checked

__all__ = ["MAX_RUNS", "decode", "decode_call", "mla_decode_kernel"]

MAX_RUNS = 16
_LATENT, _ROPE = 512, 64


@triton.jit
def mla_decode_kernel(
    q, latent, scales, rope, where, lengths, out, lse,
    q_token, q_head, latent_block, latent_row, scales_block, scales_row, rope_block, rope_row,
    where_token, heads, existing, most_keys, per_length, causal_tokens, scale_log2,
    FP8: tl.constexpr, SPARSE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
    LATENT: tl.constexpr, ROPE: tl.constexpr, RUNS: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """One run of one token's keys for BLOCK_H heads.

    existing: blocks of the cache, or with SPARSE its rows; most_keys: what a table's or list's row
    can name.

    out [tokens, heads, RUNS, LATENT] fp32, normalised within the run; lse [tokens, heads, RUNS] in
    units of log2, -inf for a run without keys.
    """
    token, first_head, run = tl.program_id(0), tl.program_id(1) * BLOCK_H, tl.program_id(2)
    keys = tl.load(lengths + token // per_length)
    if SPARSE:
        keys = tl.minimum(tl.maximum(keys, 0), most_keys)
    else:
        table = where + (token // per_length).to(tl.int64) * where_token
        keys = tl.where((keys < 0) | (keys > most_keys), 0, keys)
        wrong = 0
        for first in range(0, tl.cdiv(keys, PAGE), 128):
            entry = first + tl.arange(0, 128)
            used = entry * PAGE < keys
            named = tl.load(table + entry, mask=used, other=0)
            wrong += tl.sum((used & ((named < 0) | (named >= existing))).to(tl.int32))
        keys = tl.where(wrong > 0, 0, keys)
    if causal_tokens > 0:
        keys = tl.maximum(keys - (causal_tokens - 1 - token % causal_tokens), 0)
    run_keys = 512
    while run_keys * RUNS < keys:
        run_keys *= 2
    begin = run * run_keys
    end = tl.minimum(begin + run_keys, keys)

    h = first_head + tl.arange(0, BLOCK_H)
    has_head = h < heads
    c, r = tl.arange(0, LATENT), tl.arange(0, ROPE)
    q_at = q + token.to(tl.int64) * q_token + h[:, None] * q_head
    q_c = tl.load(q_at + c[None, :], mask=has_head[:, None], other=0.0)
    q_r = tl.load(q_at + LATENT + r[None, :], mask=has_head[:, None], other=0.0)

    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, LATENT], tl.float32)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        seen = n < end
        if SPARSE:
            row = tl.load(where + token.to(tl.int64) * where_token + n, mask=seen, other=-1)
            seen = seen & (row >= 0) & (row < existing)
            row = tl.where(seen, row, 0)
            block, offset = (row // PAGE).to(tl.int64), row % PAGE
        else:
            block = tl.load(table + n // PAGE, mask=seen, other=0).to(tl.int64)
            offset = n % PAGE
        at = latent + block * latent_block + offset * latent_row
        k_c = tl.load(at[:, None] + c[None, :], mask=seen[:, None], other=0)
        if FP8:
            s_at = scales + block * scales_block + offset * scales_row
            tile = tl.arange(0, LATENT // 128)  # a scale for each 128 columns
            factor = tl.load(s_at[:, None] + tile[None, :], mask=seen[:, None], other=0.0)
            codes = k_c.to(tl.float8e4nv, bitcast=True).to(tl.float32)
            tiles = tl.reshape(codes, [BLOCK_N, LATENT // 128, 128]) * factor[:, :, None]
            k_c = tl.reshape(tiles, [BLOCK_N, LATENT]).to(q_c.dtype)
        r_at = rope + block * rope_block + offset * rope_row
        k_r = tl.load(r_at[:, None] + r[None, :], mask=seen[:, None], other=0.0)
        if FP8:
            k_r = k_r.to(tl.float32).to(q_c.dtype)
        s = tl.dot(q_c, tl.trans(k_c))
        s = tl.dot(q_r, tl.trans(k_r), s)
        s = tl.where(seen[None, :], s * scale_log2, float("-inf"))
        best = tl.maximum(top, tl.max(s, 1))
        point = tl.where(best == float("-inf"), 0.0, best)
        p = tl.exp2(s - point[:, None])
        before = tl.exp2(top - point)
        total = total * before + tl.sum(p, 1)
        acc = acc * before[:, None]
        acc = tl.dot(p.to(k_c.dtype), k_c, acc)
        top = best

    place = (token.to(tl.int64) * heads + h) * RUNS + run
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    result = tl.where(total == 0, float("-inf"), top + tl.log2(total))  # NaN stays NaN
    tl.store(lse + place, result, mask=has_head)
    tl.store(out + place[:, None] * LATENT + c[None, :], acc, mask=has_head[:, None])


def _merge(out: Any, lse: Any, sink: Any) -> tuple[Any, Any]:
    """Runs put together: out [T, H, D], lse [T, H] (natural log; +inf without keys, or of NaN)."""
    lse = lse * math.log(2.0)
    top = lse.amax(-1, keepdim=True)
    top = torch.where(top == -math.inf, torch.zeros_like(top), top)
    weight = torch.exp(lse - top)
    total = weight.sum(-1)
    merged = torch.zeros_like(out[:, :, 0])
    for run in range(out.shape[2]):  # in order; a run without keys has weight 0 and out 0
        merged += out[:, :, run] * weight[:, :, run, None]
    merged /= torch.where(total > 0, total, torch.ones_like(total))[..., None]
    natural = torch.where(total > 0, top[..., 0] + torch.log(total), math.inf)
    if sink is not None:
        share = 1 / (1 + torch.exp(sink - natural))
        merged *= torch.where(natural == math.inf, torch.ones_like(share), share)[..., None]
    return merged, natural


def decode(
    q: Any,
    k_cache: Any,
    where: Any,
    lengths: Any,
    softmax_scale: float,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    sparse: bool = False,
    attn_sink: Any = None,
) -> tuple[Any, Any]:
    """MLA decode of CUDA tensors (or of CPU tensors in Triton's interpreter).

    Args:
        q: [b, s_q, h, 576] bfloat16 or float16.
        k_cache: [blocks, page, 1, 576] of q's dtype, or [blocks, page, 1, 656] bytes.
        where: block table [b, n] int32, or with `sparse` indices [b, s_q, topk] int32.
        lengths: [b] int32 keys of each request, or how many indices count.
    Returns: out [b, s_q, h, 512] in q's dtype, lse [b, h, s_q] float32.
    Raises: DtypeError, ShapeError, ConfigError, UnsupportedError.
    """
    none = dict.fromkeys(("extra_k_cache", "extra_indices_in_kvcache", "extra_topk_length"))
    named = {
        "block_table": None if sparse else where,
        "cache_seqlens": None if sparse else lengths,
        "indices": where if sparse else None,
        "topk_length": lengths if sparse else None,
    }
    return decode_call(
        {
            "q": q,
            "k_cache": k_cache,
            "head_dim_v": _LATENT,
            "softmax_scale": softmax_scale,
            "causal": causal,
            "is_fp8_kvcache": is_fp8_kvcache,
            "attn_sink": attn_sink,
            **named,
            **none,
        }
    )


def decode_call(arguments: dict[str, Any]) -> tuple[Any, Any]:
    """`flash_mla_with_kvcache` for CUDA tensors: its arguments by name."""
    call = checked(arguments)
    q, k_cache = call.q, call.k_cache
    b, s_q, heads, width = q.shape
    blocks, page = k_cache.shape[:2]
    if call.is_fp8_kvcache:
        raw = k_cache.view(torch.uint8)
        latent, scales = raw, raw.view(torch.float32)[..., 128:132]
        rope = raw.view(torch.bfloat16)[..., 264:]
    else:
        latent, scales, rope = k_cache, k_cache, k_cache[..., _LATENT:]
    q = q.reshape(b * s_q, heads, width).contiguous()
    columns = call.where.shape[-1]
    where = call.where.reshape(b * s_q if call.sparse else b, columns).contiguous()
    out = q.new_empty((b * s_q, heads, MAX_RUNS, _LATENT), dtype=torch.float32)
    lse = q.new_empty((b * s_q, heads, MAX_RUNS), dtype=torch.float32)
    block_h = 64 if heads > 16 else 16
    grid = (b * s_q, triton.cdiv(heads, block_h), MAX_RUNS)
    limits = (blocks * page, columns) if call.sparse else (blocks, columns * page)
    if lse.numel():
        mla_decode_kernel[grid](
            *(q, latent, scales, rope, where, call.lengths.contiguous(), out, lse),
            *(q.stride(0), q.stride(1), latent.stride(0), latent.stride(1)),
            *(scales.stride(0), scales.stride(1), rope.stride(0), rope.stride(1)),
            *(where.stride(0), heads, *limits, s_q),
            *(s_q if call.causal else 0, call.softmax_scale / math.log(2.0)),
            FP8=call.is_fp8_kvcache, SPARSE=call.sparse, BLOCK_H=block_h, BLOCK_N=32,
            LATENT=_LATENT, ROPE=_ROPE, RUNS=MAX_RUNS, PAGE=page,
            num_warps=8 if block_h == 64 else 4, num_stages=2,
        )  # fmt: skip
    merged, natural = _merge(out, lse, call.attn_sink)
    shaped = merged.to(q.dtype).view(b, s_q, heads, _LATENT)
    return shaped, natural.view(b, s_q, heads).transpose(1, 2)
