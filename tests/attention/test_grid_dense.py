"""The original's dense grids in full, each shape at every ISA level: decode and MHA prefill.

Source: FlashMLA `tests/test_flash_mla_dense_decoding.py` (2,352 cases) and `test_fmha_sm100.py`
(32 cases, forward).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.attention.levels import DENSE_DECODE, MHA_PREFILL, agree_at_every_level
from tests.attention.problems import BF16, Dense, dense, random_rows
from tests.attention.quick import floats, quick
from whalefall import jit
from whalefall.attention import flash_attn_varlen_func, flash_mla_with_kvcache, get_mla_metadata

pytestmark = pytest.mark.slow
HEADS = [(q, kv) for q in (1, 3, 9, 63, 64, 126, 128) for kv in (1, 2, 3, 8) if q % kv == 0]
D_V, SCALE = 512, 576**-0.5


def decode_reference(p: Dense, causal: bool) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """For each request and kv head: out [s_q, heads, 512] and lse [s_q, heads]."""
    s_q, h_q = p.q.shape[1:3]
    group = h_q // p.cache.shape[2]
    for i, n in enumerate(map(int, p.lengths)):
        pages = p.table[i, : -(-n // 64)]
        seen = None
        if causal:
            seen = (n - s_q + 1 + torch.arange(s_q)).repeat_interleave(group)
        for kv in range(p.cache.shape[2]):
            keys = floats(p.cache[pages, :, kv].reshape(-1, p.cache.shape[3])[:n])
            heads = slice(kv * group, (kv + 1) * group)
            q = floats(p.q[i, :, heads].reshape(-1, p.q.shape[3]))
            out, _, lse = quick(q, keys, keys[:, :D_V], SCALE, seen=seen)
            shape = (s_q, group)
            yield (i, slice(None), heads), (out.reshape(*shape, D_V), lse.reshape(shape))


def check_decode(p: Dense, causal: bool) -> None:
    def call() -> tuple[Any, Any]:
        out, lse = flash_mla_with_kvcache(
            p.q, p.cache, p.table, p.lengths, D_V, *get_mla_metadata(), causal=causal
        )
        return out, lse.swapaxes(1, 2)

    agree_at_every_level(call, decode_reference(p, causal), DENSE_DECODE)


@pytest.mark.parametrize(("h_q", "h_kv"), HEADS)
@pytest.mark.parametrize("s_k", [20, 140, 4096])
@pytest.mark.parametrize("s_q", [1, 2, 4])
@pytest.mark.parametrize("b", [1, 2, 6, 64])
def test_decode(b: int, s_q: int, s_k: int, h_q: int, h_kv: int) -> None:
    for varlen, causal in itertools.product((False, True), (False, True)):
        check_decode(dense(b, s_q, s_k, h_q, h_kv, varlen), causal)


@pytest.mark.parametrize(("h_q", "h_kv"), HEADS)
@pytest.mark.parametrize("s_k", [20, 140])
@pytest.mark.parametrize("b", [1, 6])
def test_decode_in_fp16(b: int, s_k: int, h_q: int, h_kv: int) -> None:
    for causal in (False, True):
        check_decode(dense(b, 2, s_k, h_q, h_kv, True, dtype=np.float16), causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("h_q", "h_kv"), HEADS)
def test_decode_where_half_of_128_requests_are_empty(h_q: int, h_kv: int, causal: bool) -> None:
    check_decode(dense(128, 2, 4096, h_q, h_kv, True, empty=True), causal)


@pytest.mark.parametrize("s_k", [4096, 8192, 16384, 32768])
@pytest.mark.parametrize("s_q", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_decode_of_the_timed_shapes(causal: bool, s_q: int, s_k: int) -> None:
    check_decode(dense(128, s_q, s_k, 128, 1, True), causal)


def lengths(rng: np.random.Generator, mean: int, varlen: bool, least: Any = (1, 1)) -> Any:
    drawn = rng.normal(mean, mean / 2, 2).astype(np.int64) if varlen else np.full(2, mean)
    return np.maximum(drawn, least)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("d", "d_v"), [(128, 128), (192, 128)])
@pytest.mark.parametrize(("h", "h_kv"), [(128, 128), (32, 4)])
@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("mean", [4096, 8192])
def test_mha_prefill(
    mean: int, varlen: bool, h: int, h_kv: int, d: int, d_v: int, causal: bool
) -> None:
    """8,192 tokens with 128 heads, which the original does not check, at the native level only,
    every 16th head."""
    rng = np.random.default_rng(mean + varlen)
    nq = lengths(rng, mean, varlen)
    nk = lengths(rng, mean, varlen, nq)
    q_starts, k_starts = (np.cumsum([0, *n]).astype(np.int32) for n in (nq, nk))
    q, k, v = (
        random_rows(rng, shape, BF16)
        for shape in ((q_starts[-1], h, d), (k_starts[-1], h_kv, d), (k_starts[-1], h_kv, d_v))
    )
    scale = (d + 100) ** -0.5

    def call() -> tuple[Any, Any]:
        return flash_attn_varlen_func(
            q, k, v, q_starts, k_starts, int(nq.max()), int(nk.max()),
            softmax_scale=scale, causal=causal, is_varlen=varlen,
        )  # fmt: skip

    timed = mean == 8192 and h == 128

    def reference() -> Iterator[tuple[Any, tuple[Any, ...]]]:
        for s, head in itertools.product(range(2), range(0, h, 16 if timed else 1)):
            begin, end = k_starts[s], k_starts[s + 1]
            keys, values = (floats(x[begin:end, head * h_kv // h]) for x in (k, v))
            for t in range(q_starts[s], q_starts[s + 1], 128):
                rows = slice(t, min(t + 128, q_starts[s + 1]))
                seen, most = None, len(keys)
                if causal:
                    seen = torch.arange(rows.start, rows.stop) - int(q_starts[s + 1] - nk[s] - 1)
                    most = int(seen[-1])
                part = floats(q[rows, head])
                out, _, lse = quick(part, keys[:most], values[:most], scale, seen=seen)
                yield (rows, head), (out, lse)

    agree_at_every_level(call, reference(), MHA_PREFILL, jit.levels()[-1:] if timed else ())
