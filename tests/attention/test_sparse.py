"""Sparse attention, decode and prefill: indices, lengths, sinks, a second cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.attention.closeness import assert_close
from tests.attention.problems import BF16, fp8_rows, sparse_expected, spoil_unused
from whalefall.attention import flash_mla_sparse_fwd, flash_mla_with_kvcache, get_mla_metadata

INVALID = np.array([-(2**31), -123456, -1, 2**31 - 1], np.int64)


def sinks(rng: np.random.Generator, heads: int) -> Any:
    """About a third +inf, a third -inf."""
    sink = rng.standard_normal(heads).astype(np.float32)
    sink[rng.random(heads) < 0.31], sink[rng.random(heads) < 0.31] = np.inf, -np.inf
    return sink


def choose(rng: np.random.Generator, tokens: int, topk: int, rows: int) -> Any:
    """Indices with invalid ones among them; the last token has none at all."""
    index = rng.integers(0, rows, (tokens, topk))
    spoil = rng.random((tokens, topk)) < 0.2
    index[spoil] = rng.choice(np.append(INVALID, rows), spoil.sum())
    index[-1] = -1
    return index.astype(np.int32)


def kept(index: Any, length: int, rows: Any) -> Any:
    chosen = index[: max(0, length)]
    return rows[chosen[(chosen >= 0) & (chosen < len(rows))]]


@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize(
    ("s_q", "s_kv", "topk", "heads", "d"),
    [(5, 128, 128, 64, 576), (3, 1840, 256, 16, 512), (62, 95, 128, 3, 576), (4, 592, 700, 1, 40)],
)
def test_sparse_prefill(
    level: str, s_q: int, s_kv: int, topk: int, heads: int, d: int, with_sink: bool
) -> None:
    rng = np.random.default_rng(s_kv)
    d_v = min(512, d - 8)
    q = (rng.standard_normal((s_q, heads, d)) / 10 + 0.03).astype(BF16)
    kv = (rng.standard_normal((s_kv, 1, d)) / 10 - 0.02).astype(BF16)
    index = choose(rng, s_q, topk, s_kv)
    lengths = rng.integers(0, topk + 1, s_q).astype(np.int32)
    sink = sinks(rng, heads) if with_sink else None
    unused = np.ones(s_kv, bool)
    for t in range(s_q):
        chosen = index[t, : lengths[t]]
        unused[chosen[(chosen >= 0) & (chosen < s_kv)]] = False
    kv[unused] = np.nan
    out, top, lse = flash_mla_sparse_fwd(q, kv, index[:, None], 0.5, d_v, sink, lengths)
    keys = [kept(index[t], lengths[t], kv[:, 0]) for t in range(s_q)]
    want, want_top, want_lse = sparse_expected(q, keys, d_v, 0.5, sink)
    assert_close(out, want, 8e-4, 3.01 / 128, 7e-6)
    assert_close(top, want_top, 1e-6, 2.01 / 65536, 1e-7)
    assert_close(lse, want_lse, 1e-6, 2.01 / 65536, 1e-7)


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize(
    ("b", "s_q", "topk", "page", "heads"), [(4, 1, 64, 2, 64), (2, 3, 70, 61, 5), (3, 2, 1, 64, 2)]
)
def test_sparse_decode_over_fp8(
    level: str, b: int, s_q: int, topk: int, page: int, heads: int, extra: bool
) -> None:
    rng = np.random.default_rng(b * topk + extra)
    q = np.clip(rng.standard_normal((b, s_q, heads, 576)), -1, 1).astype(BF16)
    sink = sinks(rng, heads)
    caches, index, lengths, plain = [], [], [], []
    for size in (page, 7) if extra else (page,):
        rows = fp8_rows(rng, (12 * size,))
        chosen = choose(rng, b * s_q, topk, len(rows)).reshape(b, s_q, topk)
        length = rng.integers(0, topk + 1, b).astype(np.int32)
        length[0] = topk
        used = np.concatenate([chosen[i, :, : length[i]].reshape(-1) for i in range(b)])
        plain.append(spoil_unused(rows, used[(used >= 0) & (used < len(rows))]))
        # one row of slack behind each page, as the original's test caches have
        cache = np.full((12, size + 1, 1, 656), 0xFF, np.uint8)[:, :size]
        cache[:] = rows.reshape(12, size, 1, 656)
        caches.append(cache), index.append(chosen), lengths.append(length)
    more = (
        {"extra_k_cache": caches[1], "extra_indices_in_kvcache": index[1],
         "extra_topk_length": lengths[1]} if extra else {}
    )  # fmt: skip
    out, lse = flash_mla_with_kvcache(
        q, caches[0], None, None, 512, *get_mla_metadata(), 576**-0.55, is_fp8_kvcache=True,
        indices=index[0], attn_sink=sink, topk_length=lengths[0], **more,
    )  # fmt: skip
    sets = list(zip(index, lengths, plain, strict=True))
    keys = [
        np.concatenate([kept(chosen[i, t], length[i], rows) for chosen, length, rows in sets])
        for i in range(b) for t in range(s_q)
    ]  # fmt: skip
    flat = q.reshape(b * s_q, heads, 576)
    want, _, want_lse = sparse_expected(flat, keys, 512, 576**-0.55, sink)
    assert_close(out.reshape(want.shape), want, 1e-3, 2.01 / 128, 5e-6)
    got_lse = lse.swapaxes(1, 2).reshape(want_lse.shape)
    assert_close(got_lse, want_lse, 1e-6, 8.01 / 65536, 1e-7)


def test_sparse_over_a_bf16_cache_with_all_indices_is_dense(level: str) -> None:
    rng = np.random.default_rng(3)
    q = rng.standard_normal((2, 1, 4, 96)).astype(BF16)
    cache = rng.standard_normal((6, 16, 1, 96)).astype(BF16)
    table = np.array([[3, 1], [0, 5]], np.int32)
    dense = flash_mla_with_kvcache(q, cache, table, np.array([32, 20], np.int32), 64, None)
    index = (table[:, :, None] * 16 + np.arange(16)).reshape(2, 1, 32).astype(np.int32)
    sparse = flash_mla_with_kvcache(
        q, cache, None, None, 64, None, indices=index, topk_length=np.array([32, 20], np.int32)
    )
    assert (dense[0] == sparse[0]).all() and (dense[1] == sparse[1]).all()


def test_indices_whose_requests_lie_apart_are_read_where_they_are() -> None:
    rng = np.random.default_rng(5)
    q = rng.standard_normal((2, 2, 4, 96)).astype(BF16)
    cache = rng.standard_normal((6, 16, 1, 96)).astype(BF16)
    index = rng.integers(0, 96, (2, 3, 8)).astype(np.int32)[:, :2]
    assert index.strides[0] != 2 * index.strides[1]
    apart, plain = (
        flash_mla_with_kvcache(q, cache, None, None, 64, None, indices=given)
        for given in (index, index.copy())
    )
    assert (apart[0] == plain[0]).all() and (apart[1] == plain[1]).all()


def test_an_axis_of_one_may_have_any_stride() -> None:
    rng = np.random.default_rng(7)
    q, cache = rng.standard_normal((3, 4, 96)).astype(BF16), rng.standard_normal((6, 16, 1, 96))
    cache = cache.astype(BF16)
    index = rng.integers(0, 96, (3, 8)).astype(np.int32)
    assert q[:, None].strides[1] == index[:, None].strides[1] == 0  # as numpy makes them
    want = flash_mla_with_kvcache(
        q.reshape(3, 1, 4, 96), cache, None, None, 64, None, indices=index.reshape(3, 1, 8)
    )
    for given_q, given_index in (
        (q[:, None], index.reshape(3, 1, 8)),
        (q[:, None], index[:, None]),
    ):
        out, lse = flash_mla_with_kvcache(given_q, cache, None, None, 64, None, indices=given_index)
        assert (out == want[0]).all() and (lse == want[1]).all()
    table, lengths = np.arange(6, dtype=np.int32).reshape(3, 2), np.array([20, 3, 32], np.int32)
    want = flash_mla_with_kvcache(q.reshape(3, 1, 4, 96), cache, table, lengths, 64, None)
    out, lse = flash_mla_with_kvcache(q[:, None], cache, table, lengths, 64, None)
    assert (out == want[0]).all() and (lse == want[1]).all()


def test_a_duplicate_counts_twice(level: str) -> None:
    q, kv = np.zeros((1, 1, 32), np.float32), np.zeros((3, 1, 32), np.float32)
    kv[0], kv[1] = 3, 6
    out, top, lse = flash_mla_sparse_fwd(q, kv, np.array([[[0, 0, 1]]], np.int32), 1.0, 16)
    assert np.allclose(out, 4) and top[0, 0] == 0 and np.isclose(lse[0, 0], np.log(3))


def test_a_sink_of_infinity_empties_and_one_of_minus_infinity_does_nothing(level: str) -> None:
    rng = np.random.default_rng(4)
    q, kv = rng.standard_normal((1, 2, 32)).astype(np.float32), np.ones((4, 1, 32), np.float32)
    index = np.arange(4, dtype=np.int32).reshape(1, 1, 4)
    plain = flash_mla_sparse_fwd(q, kv, index, 0.1, 16)
    sunk = flash_mla_sparse_fwd(q, kv, index, 0.1, 16, np.array([np.inf, -np.inf], np.float32))
    assert (sunk[0][0, 0] == 0).all() and (sunk[0][0, 1] == plain[0][0, 1]).all()
    assert (sunk[2] == plain[2]).all()


@pytest.mark.parametrize("length", [6, 9, 2**31 - 1])
def test_a_length_beyond_the_list_ends_with_it(level: str, length: int) -> None:
    rng = np.random.default_rng(6)
    q, kv = rng.standard_normal((3, 2, 40)).astype(BF16), rng.standard_normal((24, 1, 40))
    kv = kv.astype(BF16)
    index = rng.integers(0, 24, (3, 1, 9)).astype(np.int32)[:, :, :5]  # rows of 9: keys lie behind
    lengths = np.array([length, 5, -1], np.int32)
    plain = flash_mla_sparse_fwd(q[:2], kv, index[:2], 0.3, 32)
    out, top, lse = flash_mla_sparse_fwd(q, kv, index, 0.3, 32, None, lengths)
    for got, want in zip((out, top, lse), plain, strict=True):
        assert got[:2].tobytes() == want.tobytes()
    assert (out[2] == 0).all() and (lse[2] == np.inf).all()
    cache = kv.reshape(6, 4, 1, 40)
    sparse: dict[str, Any] = {"topk_length": lengths, "softmax_scale": 0.3}
    decoded, _ = flash_mla_with_kvcache(
        q.reshape(3, 1, 2, 40), cache, None, None, 32, None, indices=index, **sparse
    )
    assert decoded[:2, 0].tobytes() == plain[0].tobytes() and (decoded[2] == 0).all()
