"""Random inputs after FlashMLA's own tests, and what the float64 definition makes of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from whalefall.attention import dequantize_kv_cache
from whalefall.attention.reference import attention

BF16 = ml_dtypes.bfloat16
GARBAGE = 2147480000


class Dense(NamedTuple):
    """A dense decode problem; what lies behind a length is NaN or garbage."""

    q: Any
    cache: Any
    table: Any
    lengths: Any


def dense(
    b: int, s_q: int, s_k: int, h_q: int, h_kv: int, varlen: bool, d: int = 576,
    page: int = 64, dtype: Any = BF16, seed: int = 0, empty: bool = False,
) -> Dense:  # fmt: skip
    """q, k = randn / 10 within ±1; lengths normal around s_k, at least s_q; shuffled pages."""
    rng = np.random.default_rng(seed)
    lengths = np.full(b, s_k)
    if varlen:
        lengths = np.maximum(rng.normal(s_k, s_k / 2, b), s_q).astype(np.int64)
    if empty:
        lengths[::2] = 0
    pages = -(-lengths // page)
    q = np.clip(rng.standard_normal((b, s_q, h_q, d), np.float32) / 10, -1, 1).astype(dtype)
    cache = random_rows(rng, ((pages.sum() + b), page, h_kv, d), dtype)  # b pages are nobody's
    table = np.full((b, pages.max() + 1), GARBAGE, np.int32)
    order = rng.permutation(len(cache)).astype(np.int32)
    for i, own in enumerate(np.split(order, np.cumsum(pages))[:b]):
        table[i, : len(own)] = own
        if lengths[i] % page:
            cache[own[-1], lengths[i] % page :] = np.nan
    cache[order[pages.sum() :]] = np.nan
    return Dense(q, cache, table, lengths.astype(np.int32))


def random_rows(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: Any, shift: float = 0.0
) -> Any:
    """randn / 10 + shift within ±1; of many rows, each is one of 8,192 drawn."""
    count = int(np.prod(shape[:-1]))
    drawn = rng.standard_normal((min(count, 1 << 13), shape[-1]), np.float32) / 10 + np.float32(
        shift
    )
    rows = drawn.clip(-1, 1).astype(dtype)
    if count > len(rows):
        rows = rows[rng.integers(0, len(rows), count)]
    return rows.reshape(shape)


def dense_expected(
    p: Dense, d_v: int, scale: float, causal: bool, plain: Any = None
) -> tuple[Any, Any]:
    """out [b, s_q, h_q, d_v] and lse [b, h_q, s_q]; `plain`: what the cache's rows mean."""
    rows = p.cache if plain is None else plain
    b, s_q, h_q, d = p.q.shape
    group = h_q // rows.shape[2]
    out, lse = np.zeros((b, s_q, h_q, d_v)), np.zeros((b, h_q, s_q))
    for i, n in enumerate(p.lengths):
        used = p.table[i, : -(-int(n) // rows.shape[1])]
        keys = rows[used].reshape(-1, rows.shape[2], d)
        for t in range(s_q):
            seen = max(0, int(n) - (s_q - 1 - t if causal else 0))
            for kv in range(rows.shape[2]):
                heads = slice(kv * group, (kv + 1) * group)
                k = keys[:seen, kv]
                out[i, t, heads], _, lse[i, heads, t] = attention(
                    p.q[i, t, heads], k, k[:, :d_v], scale
                )
    return out, lse


def fp8_rows(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """Random 656-byte rows with general fp32 scales; no NaN codes."""
    rows = rng.integers(0, 256, (*shape, 656)).astype(np.uint8)
    codes = rows[..., :512]
    codes[(codes & 127) == 127] = 1
    scale = (rng.random((*shape, 4)) * 1e-3).astype(np.float32)
    rows[..., 512:528] = scale.view(np.uint8)
    rope = (rng.standard_normal((*shape, 64)) / 10).astype(BF16)
    rows[..., 528:] = rope.view(np.uint8)
    return rows


def spoil_unused(rows: Any, used: Any) -> Any:
    """FP8 rows that no index names become NaN; returns what the rows mean, NaN as 0."""
    rest = np.ones(len(rows), bool)
    rest[used] = False
    rows[rest] = 0xFF
    return np.nan_to_num(dequantize_kv_cache(rows).astype(np.float32))


def sparse_expected(
    q: Any, kept: list[Any], d_v: int, scale: float, sink: Any
) -> tuple[Any, Any, Any]:
    """q [T, H, D]; kept[t]: the keys of token t. out, max_logits, lse."""
    results = [attention(q[t], k, k[:, :d_v], scale, sink) for t, k in enumerate(kept)]
    out, top, lse = zip(*results, strict=True)
    return np.stack(out), np.stack(top), np.stack(lse)
