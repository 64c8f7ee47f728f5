"""flash_mla_with_kvcache, dense: the original's grid and tolerances, and what it must not read."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.attention.closeness import close_decode
from tests.attention.problems import BF16, Dense, dense, dense_expected, fp8_rows
from whalefall import jit
from whalefall.attention import dequantize_kv_cache, flash_mla_with_kvcache, get_mla_metadata

# b, s_q, s_k, h_q, h_kv, varlen, causal: each value of the original's axes at least once
SAMPLE = [
    (1, 1, 20, 1, 1, False, False),
    (2, 2, 140, 3, 1, True, True),
    (6, 4, 140, 9, 3, True, True),
    (2, 1, 1000, 63, 1, True, False),
    (1, 2, 140, 64, 2, False, True),
    (1, 1, 140, 126, 3, False, False),
    (1, 2, 300, 128, 8, True, True),
    (64, 1, 20, 2, 1, True, False),
]


def call(p: Dense, causal: bool, d_v: int = 512, **more: Any) -> tuple[Any, Any]:
    metadata, splits = get_mla_metadata(p.lengths, 1, 1)
    return flash_mla_with_kvcache(
        p.q, p.cache, p.table, p.lengths, d_v, metadata, splits, causal=causal, **more
    )


@pytest.mark.parametrize(("b", "s_q", "s_k", "h_q", "h_kv", "varlen", "causal"), SAMPLE)
def test_a_sample_of_the_original_grid(
    level: str, b: int, s_q: int, s_k: int, h_q: int, h_kv: int, varlen: bool, causal: bool
) -> None:
    p = dense(b, s_q, s_k, h_q, h_kv, varlen)
    out, lse = call(p, causal)
    assert out.dtype == BF16 and lse.dtype == np.float32
    want, want_lse = dense_expected(p, 512, 576**-0.5, causal)
    close_decode(out, want, lse, want_lse)


def test_half_of_the_requests_may_be_empty(level: str) -> None:
    p = dense(8, 2, 100, 4, 1, True, empty=True)
    out, lse = call(p, True)
    close_decode(out, *dense_expected(p, 512, 576**-0.5, True)[:1], lse,
                 dense_expected(p, 512, 576**-0.5, True)[1])  # fmt: skip
    assert (out[::2].astype(np.float32) == 0).all() and (lse[::2] == np.inf).all()


def test_causal_tokens_before_the_first_key_are_lonely(level: str) -> None:
    p = dense(1, 4, 20, 2, 1, False)
    p.lengths[0] = 2
    out, lse = call(p, True)
    assert (lse[0, :, :2] == np.inf).all() and (out[0, :2].astype(np.float32) == 0).all()
    assert np.isfinite(lse[0, :, 2:]).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(("d", "d_v", "page"), [(576, 512, 64), (288, 256, 16), (40, 24, 256)])
def test_other_dtypes_heads_and_pages(level: str, dtype: Any, d: int, d_v: int, page: int) -> None:
    p = dense(2, 1, 300, 4, 1, True, d, page, dtype)
    out, lse = call(p, False, d_v, softmax_scale=0.1)
    assert out.dtype == dtype
    close_decode(out, *dense_expected(p, d_v, 0.1, False)[:1], lse,
                 dense_expected(p, d_v, 0.1, False)[1])  # fmt: skip


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("s_q", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_a_sink_takes_its_weight_of_dense_rows(
    level: str, causal: bool, s_q: int, library: str
) -> None:
    """Values keep 1 / (1 + e^(sink - lse)); lse and rows without keys know nothing of it."""
    p = dense(4, s_q, 100, 4, 2, True, 288, 16, np.float32, empty=True)
    sink = np.array([4.5, -np.inf, np.inf, -1], np.float32)
    want, want_lse = dense_expected(p, 256, 0.1, causal)
    keys = np.isfinite(want_lse)
    share = 1 / (1 + np.exp(sink[:, None].astype(np.float64) - np.where(keys, want_lse, 0)))
    given, weight = [*p], sink
    if library == "torch":
        torch = pytest.importorskip("torch")
        given, weight = [torch.from_numpy(x) for x in p], torch.from_numpy(sink)
    out, lse = (
        np.asarray(x) for x in call(Dense(*given), causal, 256, softmax_scale=0.1, attn_sink=weight)
    )
    close_decode(out, want * share.swapaxes(1, 2)[..., None], lse, want_lse)
    for i in range(4):  # the batch has no say
        alone = Dense(p.q[i : i + 1], p.cache, p.table[i : i + 1], p.lengths[i : i + 1])
        one, _ = call(alone, causal, 256, softmax_scale=0.1, attn_sink=sink)
        assert one[0].tobytes() == out[i].tobytes()


@pytest.mark.parametrize("as_dtype", ["float8", "uint8"])
def test_dense_over_the_fp8_cache(level: str, as_dtype: str) -> None:
    p = dense(2, 1, 150, 4, 1, False)
    rows = fp8_rows(np.random.default_rng(1), (*p.cache.shape[:3],))
    cache = rows.view(ml_dtypes.float8_e4m3fn) if as_dtype == "float8" else rows
    out, lse = flash_mla_with_kvcache(
        p.q, cache, p.table, p.lengths, 512, *get_mla_metadata(), is_fp8_kvcache=True
    )
    want, want_lse = dense_expected(p, 512, 576**-0.5, False, dequantize_kv_cache(rows))
    close_decode(out, want, lse, want_lse)


def test_results_depend_on_no_metadata_thread_or_neighbour(level: str) -> None:
    p = dense(3, 1, 2000, 4, 1, True)
    out, lse = call(p, False)
    old = np.zeros((4, 8), np.int32), np.zeros(4, np.int32)
    again = flash_mla_with_kvcache(p.q, p.cache, p.table, p.lengths, 512, *old)
    assert (again[0] == out).all() and (again[1] == lse).all()
    before = jit.get_num_threads()
    try:
        jit.set_num_threads(before % 2 + 1)
        assert (call(p, False)[0] == out).all()
    finally:
        jit.set_num_threads(before)
    for i in range(3):
        alone = Dense(p.q[i : i + 1], p.cache, p.table[i : i + 1], p.lengths[i : i + 1])
        assert (call(alone, False)[0][0] == out[i]).all()


def test_strided_queries_and_cache(level: str) -> None:
    p = dense(2, 3, 100, 2, 1, True)
    wide_q = np.zeros((3, 4, 3, 700), BF16)[:2, :3, :2, :576]
    wide_q[:] = p.q
    wide_cache = np.zeros((p.cache.shape[0], 65, 1, 640), BF16)[:, :64, :, :576]
    wide_cache[:] = p.cache
    wide_table = np.zeros((2, p.table.shape[1] * 2), np.int32)[:, ::2]
    wide_table[:] = p.table
    out, lse = call(p, True)
    strided = call(Dense(wide_q, wide_cache, wide_table, p.lengths), True)
    assert (strided[0] == out).all() and (strided[1] == lse).all()


def test_what_was_copied_for_a_call_is_copied_again_for_the_next() -> None:
    p = dense(2, 1, 100, 2, 1, False)
    wide = np.zeros((2, p.table.shape[1] * 2), np.int32)
    spread = Dense(p.q, p.cache, wide[:, ::2], p.lengths)
    spread.table[:] = p.table
    first = call(spread, False)
    spread.table[:] = p.table[::-1]
    again = call(spread, False)
    wanted = call(Dense(p.q, p.cache, p.table[::-1].copy(), p.lengths), False)
    assert (first[0] != wanted[0]).any()
    assert (again[0] == wanted[0]).all() and (again[1] == wanted[1]).all()


def test_torch_tensors_give_the_same_bits() -> None:
    torch = pytest.importorskip("torch")
    p = dense(2, 2, 100, 4, 1, True)
    out, lse = call(p, True)
    as_torch = [torch.from_numpy(a.view(np.int16)).view(torch.bfloat16) for a in p[:2]]
    as_torch += [torch.from_numpy(a) for a in p[2:]]
    got, got_lse = call(Dense(*as_torch), True)
    assert got.dtype == torch.bfloat16 and got.shape == (2, 2, 4, 512)
    assert (got.view(torch.int16).numpy() == out.view(np.int16)).all()
    assert (got_lse.numpy() == lse).all()
