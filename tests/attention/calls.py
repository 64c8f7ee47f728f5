"""Builds native calls from numpy arrays: what the engine does in C++."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from whalefall.attention import native_calls as native
from whalefall.attention import structs

CODES = {"float32": 0, "bfloat16": 1, "float16": 2, "uint8": 3}


def addresses(tables: Any) -> Any:
    """The address of each token's row of a block table [tokens, blocks]."""
    return np.array([row.ctypes.data for row in tables], np.uint64)


def cache_struct(cache: Any) -> structs.Cache:
    """A cache [blocks, page, kv_heads, width]."""
    s = cache.strides
    return structs.Cache(cache.ctypes.data, s[0], s[1], s[2], cache.shape[0], cache.shape[1])


def paged(
    q: Any,
    cache: Any,
    tables: Any,
    keys: Any,
    v_width: int,
    scale: float,
    sink: Any = None,
    bf16_q: bool = False,
) -> tuple[Any, Any]:
    """out [T, H, v_width] fp32 and lse [T, H] of q [T, H, W] fp32 over a cache [B, P, Hkv, W].

    `bf16_q`: q may be rounded to bf16, so that bf16 dots serve where they are fast.
    """
    tokens, heads, width = q.shape
    tables, keys = np.ascontiguousarray(tables, np.int32), np.asarray(keys, np.int32)
    pointers = addresses(tables)
    out, lse = np.empty((tokens, heads, v_width), np.float32), np.empty((tokens, heads), np.float32)
    code = CODES[str(cache.dtype)]
    args = structs.PagedArgs(
        *(q.ctypes.data, heads * width, width, out.ctypes.data, heads * v_width, v_width),
        *(lse.ctypes.data, heads, 1, None if sink is None else sink.ctypes.data),
        *(pointers.ctypes.data, keys.ctypes.data, tokens, heads, cache.shape[2], width, v_width),
        *(cache_struct(cache), scale, np.inf, 0, 0, code),
    )
    native.paged_entry(code, heads // cache.shape[2], bf16_q)(ctypes.addressof(args))
    return out, lse


def varlen(
    q: Any, k: Any, v: Any, q_starts: Any, k_starts: Any, scale: float, causal: bool
) -> tuple[Any, Any]:
    """out [T, H, Dv] fp32 and lse [T, H] of q fp32 over k, v, sequences end to end."""
    tokens, heads, width = q.shape
    v_width = v.shape[2]
    out, lse = np.empty((tokens, heads, v_width), np.float32), np.empty((tokens, heads), np.float32)
    q_starts, k_starts = np.asarray(q_starts, np.int32), np.asarray(k_starts, np.int32)
    kv_heads = k.shape[1]
    args = structs.VarlenArgs(
        *(q.ctypes.data, k.ctypes.data, v.ctypes.data, heads * width, width),
        *(kv_heads * width, width, kv_heads * v_width, v_width),
        *(out.ctypes.data, heads * v_width, v_width, lse.ctypes.data, heads, 1),
        *(q_starts.ctypes.data, k_starts.ctypes.data, len(q_starts) - 1, heads, kv_heads),
        *(width, v_width, scale, -np.inf, causal, 0, 0),
    )
    call = structs.VarlenCall(args, tokens, len(k))
    assert native.varlen_entry(CODES[str(k.dtype)])(ctypes.addressof(call)) == 0
    return out, lse


def append(latent: Any, rope: Any, tables: Any, positions: Any, cache: Any) -> None:
    """Writes latent [T, L] and rope [T, R] fp32 at `positions` into cache [B, P, 1, W]."""
    tables = np.ascontiguousarray(tables, np.int32)
    positions, pointers = np.asarray(positions, np.int32), addresses(tables)
    args = structs.AppendArgs(
        *(latent.ctypes.data, rope.ctypes.data, latent.shape[1], latent.shape[1]),
        *(rope.shape[1], rope.shape[1], 0, CODES[str(cache.dtype)]),
        *(pointers.ctypes.data, positions.ctypes.data, len(latent), cache_struct(cache)),
    )
    native.append_entry()(ctypes.addressof(args))
