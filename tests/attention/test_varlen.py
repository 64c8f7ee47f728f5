"""flash_attn_varlen_func and its packed forms, merging, and appending to a cache."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from tests.attention.closeness import assert_close
from tests.attention.problems import BF16
from whalefall.attention import (
    append_latent,
    dequantize_kv_cache,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_mla_sparse_fwd,
    merge_partials,
    varlen,
)
from whalefall.attention.reference import attention
from whalefall.dtypes import NUMPY_DTYPES, as_numpy, empty_like, forget_calls, restore
from whalefall.errors import ShapeError, UnsupportedError


def starts(lengths: list[int]) -> Any:
    return np.cumsum([0, *lengths]).astype(np.int32)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("d", "d_v", "h", "h_kv"), [(128, 128, 4, 4), (192, 128, 8, 2)])
def test_the_originals_tolerances(
    level: str, d: int, d_v: int, h: int, h_kv: int, causal: bool
) -> None:
    rng = np.random.default_rng(d)
    lengths = [150, 33]
    cu, scale = starts(lengths), (d + 100) ** -0.5
    q = rng.standard_normal((183, h, d)).astype(BF16)
    k, v = (rng.standard_normal((183, h_kv, n)).astype(BF16) for n in (d, d_v))
    out, lse = flash_attn_varlen_func(q, k, v, cu, cu, 150, 150, softmax_scale=scale, causal=causal)
    assert out.dtype == BF16 and lse.strides == (4, 4 * 183)
    want, want_lse = np.zeros((183, h, d_v)), np.zeros((183, h))
    for begin, end in itertools.pairwise(cu):
        for t in range(begin, end):
            rows = slice(begin, t + 1 if causal else end)
            for i in range(h):
                kv = i // (h // h_kv)
                (want[t, i],), _, (want_lse[t, i],) = attention(
                    q[t, i : i + 1], k[rows, kv], v[rows, kv], scale
                )
    assert_close(out, want, 1e-3, 8.01 / 128, 7e-6)
    assert_close(lse, want_lse, 1e-6, 2.01 / 65536, 1e-7)


def test_packed_forms_are_slices(level: str) -> None:
    rng = np.random.default_rng(1)
    cu = starts([40, 7])
    qkv = rng.standard_normal((47, 2, 2 * 48 + 32)).astype(BF16)
    q, k, v = qkv[..., :48], qkv[..., 48:96], qkv[..., 96:]
    want = flash_attn_varlen_func(q, k, v, cu, cu, 40, 40, causal=True)
    packed = flash_attn_varlen_qkvpacked_func(qkv, cu, 40, 48, causal=True)
    half = flash_attn_varlen_kvpacked_func(q, qkv[..., 48:], cu, cu, 40, 40, 48, causal=True)
    for got in (packed, half):
        assert (got[0] == want[0]).all() and (got[1] == want[1]).all()


def test_equal_lengths_need_no_starts(level: str) -> None:
    rng = np.random.default_rng(2)
    q = rng.standard_normal((20, 2, 32)).astype(np.float32)
    want = flash_attn_varlen_func(q, q, q, starts([10, 10]), starts([10, 10]), 10, 10)
    got = flash_attn_varlen_func(
        q, q, q, np.zeros(3, np.int32), np.zeros(3, np.int32), 10, 10, is_varlen=False
    )
    assert (got[0] == want[0]).all()


def test_a_sequence_without_keys_is_zero_with_lse_minus_infinity(level: str) -> None:
    q, none = np.ones((3, 1, 16), np.float32), np.ones((0, 1, 16), np.float32)
    out, lse = flash_attn_varlen_func(q, none, none, starts([3]), starts([0]), 3, 0)
    assert (out == 0).all() and (lse == -np.inf).all()


def used_memory(library: str, size: int) -> None:
    """Leaves freed memory of that size behind, in which no byte is 0."""
    held: list[Any] = [np.full(size, 0x55, np.uint8) for _ in range(64)]
    if library == "torch":
        held += [torch.full((size,), 0x55, dtype=torch.uint8) for _ in range(64)]


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("ends", [[0, 4, 9], [0, 0], [0], [0, 10]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_token_behind_the_last_end_is_zero_with_lse_minus_infinity(
    level: str, dtype: str, ends: list[int], library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def given(array: Any) -> Any:
        return array if library == "numpy" else restore(array, torch.empty(0))

    def soiled(like: Any, shape: Any, dtype: str) -> Any:
        made = empty_like(like, shape, dtype)
        made[...] = 7
        return made

    monkeypatch.setattr(varlen, "empty_like", soiled)
    forget_calls()
    rng = np.random.default_rng(7)
    q = given(rng.standard_normal((10, 4, 128)).astype(NUMPY_DTYPES[dtype]))
    cu, end = given(np.array(ends, np.int32)), ends[-1]
    used = flash_attn_varlen_func(q[:end], q[:end], q[:end], cu, cu, 10, 10)
    for _ in range(3):  # by the second, the call is known
        used_memory(library, q.nbytes)
        used_memory(library, 4 * 4 * 10)
        out, lse = (as_numpy(x) for x in flash_attn_varlen_func(q, q, q, cu, cu, 10, 10))
        assert (out[end:] == 0).all() and (lse[end:] == -np.inf).all()
        for whole, part in zip((out, lse), used, strict=True):
            assert whole[:end].tobytes() == as_numpy(part).tobytes()


def values_that_start_with_the_keys(x: Any) -> dict[str, tuple[Any, Any]]:
    """Keys and values of one start in x [64, 1, 48], by how they go on differently."""
    doubled = (2 * x.strides[0], *x.strides[1:])
    return {
        "wider": (x[..., :24], x[..., :40]),
        "narrower": (x[..., :24], x[..., :16]),
        "one row": (x[..., :24], np.broadcast_to(x[:1, :, :24], (64, 1, 24))),
        "other stride": (
            x[:32, :, :24],
            np.lib.stride_tricks.as_strided(x, (32, 1, 24), doubled),
        ),
    }


@pytest.mark.parametrize("how", ["wider", "narrower", "one row", "other stride"])
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_values_may_start_where_the_keys_start(level: str, dtype: Any, how: str) -> None:
    rng = np.random.default_rng(6)
    x, q = (rng.standard_normal(s).astype(dtype) for s in ((64, 1, 48), (5, 1, 24)))
    k, v = values_that_start_with_the_keys(x)[how]
    cu, n = (starts([5]), starts([len(k)])), len(k)
    out, lse = flash_attn_varlen_func(q, k, v, *cu, 5, n)
    want, want_lse = flash_attn_varlen_func(q, k.copy(), v.copy(), *cu, 5, n)
    assert out.tobytes() == want.tobytes() and lse.tobytes() == want_lse.tobytes()


HALVES = [(0, 45), (45, 90)]


@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_parts_merge_to_the_whole(level: str, dtype: Any) -> None:
    rng = np.random.default_rng(3)
    q, kv = (rng.standard_normal((n, 1, 64)).astype(dtype) for n in (5, 90))
    index = np.tile(np.arange(90, dtype=np.int32), (5, 1, 1))
    whole, _, whole_lse = flash_mla_sparse_fwd(q, kv, index, 0.1, 40)
    cuts = [(0, 13), (13, 13), (13, 90)]
    parts = [flash_mla_sparse_fwd(q, kv, index[:, :, a:b].copy(), 0.1, 40) for a, b in cuts]
    lse = np.stack([p[2] for p in parts])
    lse[1] = -np.inf if dtype == BF16 else np.inf  # both habits of saying: no keys
    out, merged = merge_partials(np.stack([p[0] for p in parts]), lse)
    # bf16: half a unit in the last place (2^-8) in the parts, the result and the whole each
    error = 2e-6 if dtype == np.float32 else 1.5 * 2.0**-8
    assert np.abs(out.astype(np.float64) - whole.astype(np.float64)).max() < error
    assert np.abs(merged - whole_lse).max() < 2e-6
    lonely, none = merge_partials(np.ones((2, 3, 4), np.float32), np.full((2, 3), np.inf, "f4"))
    assert (lonely == 0).all() and (none == np.inf).all()


@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize("place", [3, 70])
def test_nan_in_a_part_is_in_the_merged_row(level: str, dtype: Any, place: int) -> None:
    """A NaN key makes its part NaN with lse +inf, which is no part without keys."""
    rng = np.random.default_rng(3)
    q, kv = (rng.standard_normal((n, 1, 64)).astype(dtype) for n in (5, 90))
    kv[place, 0, 7] = np.nan
    index = np.tile(np.arange(90, dtype=np.int32), (5, 1, 1))
    index[1][index[1] == place] = -1  # token 1 does not see it
    parts = [flash_mla_sparse_fwd(q, kv, index[:, :, a:b].copy(), 0.1, 40) for a, b in HALVES]
    out, lse = merge_partials(np.stack([p[0] for p in parts]), np.stack([p[2] for p in parts]))
    poisoned = np.arange(5) != 1
    assert np.isnan(out.astype(np.float32)[poisoned]).all()
    assert (lse[poisoned] == np.inf).all()
    whole, _, whole_lse = flash_mla_sparse_fwd(q, kv, index, 0.1, 40)
    assert np.array_equal(np.isnan(whole.astype("f4")), np.isnan(out.astype("f4")))
    assert np.abs(lse[1] - whole_lse[1]).max() < 2e-6


@pytest.mark.parametrize("width", [1, 40])
@pytest.mark.parametrize("lse", [np.inf, -np.inf, np.nan, 0.5])
def test_one_nan_of_a_part_counts_and_a_lonely_part_does_not(
    level: str, width: int, lse: float
) -> None:
    out, weights = np.ones((3, 2, width), np.float32), np.zeros((3, 2), np.float32)
    out[1, 0, width - 1] = np.nan
    weights[1], weights[2] = lse, -np.inf
    merged, total = merge_partials(out, weights)
    assert np.isnan(merged[0, -1])
    assert np.isnan(merged[0]).all() == (lse != 0.5 or width == 1)
    if np.isnan(lse):
        assert np.isnan(merged).all() and (total == np.inf).all()
    else:
        want = np.float32(np.logaddexp(0, lse) if lse == 0.5 else 0)
        assert (merged[1] == 1).all() and abs(total[1] - want) < 1e-6


def test_nan_and_infinity_follow_one_convention(level: str) -> None:
    """Of a sum of NaN lse is +inf; NaN has no say in max_logits; scores of -inf are no keys."""
    q = np.zeros((1, 1, 32), np.float32)
    kv = np.zeros((20, 1, 32), np.float32)
    q[0, 0, 31] = 1
    index = np.arange(20, dtype=np.int32)[None, None]
    for value in (np.nan, np.inf, 3e38):  # the last is infinite in units of log2
        kv[5, 0, 31] = value
        out, _, lse = flash_mla_sparse_fwd(q, kv, index, 1.0, 16)
        assert np.isnan(out).all() and lse[0, 0] == np.inf
    kv[:, 0, 31] = -np.inf
    out, top, lse = flash_mla_sparse_fwd(q, kv, index, 1.0, 16)
    assert (out == 0).all() and top[0, 0] == -np.inf and lse[0, 0] == np.inf


def test_an_infinity_is_appended_as_nan_with_a_scale_of_one() -> None:
    latent, cache = np.full((1, 512), 2.0, np.float32), np.zeros((1, 1, 1, 656), np.uint8)
    latent[0, 130], latent[0, 260] = np.inf, np.nan
    append_latent(latent, np.zeros((1, 64), np.float32), cache, np.zeros(1, np.int32), True)
    scale = cache[0, 0, 0, 512:528].view(np.float32)
    assert scale.tolist() == [2.0**-7, 1.0, 2.0**-7, 2.0**-7]
    rows = dequantize_kv_cache(cache)[0, 0, 0, :512].astype(np.float32)
    assert np.isnan(rows).nonzero()[0].tolist() == [130, 260]
    assert (rows[~np.isnan(rows)] == 2).all()


def test_append_writes_no_cache_that_is_read_only_or_shares_its_rows() -> None:
    latent, rope = np.ones((1, 512), BF16), np.ones((1, 64), BF16)
    slots, cache = np.zeros(1, np.int32), np.zeros((2, 4, 1, 576), BF16)
    shared = np.lib.stride_tricks.as_strided(cache, cache.shape, (0, 1152, 1152, 2))
    cache.flags.writeable = False
    with pytest.raises(ShapeError, match="append_latent: cache is read-only"):
        append_latent(latent, rope, cache, slots)
    with pytest.raises(ShapeError, match=r"append_latent: cache has shape .*: elements share memo"):
        append_latent(latent, rope, shared, slots)
    assert (cache == 0).all()


def test_append_writes_named_slots_and_skips_minus_one(level: str) -> None:
    rng = np.random.default_rng(4)
    latent = rng.standard_normal((4, 512)).astype(BF16)
    rope = rng.standard_normal((4, 64)).astype(BF16)
    slots = np.array([5, 6, -1, 40], np.int32)
    cache = np.zeros((3, 16, 1, 576), BF16)
    append_latent(latent, rope, cache, slots)
    flat = cache.reshape(48, 576)
    for i, slot in [(0, 5), (1, 6), (3, 40)]:
        assert (flat[slot] == np.concatenate([latent[i], rope[i]])).all()
    assert (flat.astype(np.float32) != 0).any(axis=1).sum() == 3
    quantised = np.zeros((3, 16, 1, 656), np.uint8)
    append_latent(latent, rope, quantised, slots, is_fp8_kvcache=True)
    near = dequantize_kv_cache(quantised).reshape(48, 576).astype(np.float32)
    # e4m3 has 3 mantissa bits, its smallest step is 2^-9 of a tile's scale
    error = np.abs(near[5, :512] - latent[0].astype(np.float32))
    assert (error <= np.abs(latent[0].astype(np.float32)) / 16 + 2.0**-9 * 2.0**-6).all()
    assert (near[5, 512:] == rope[0]).all()


@pytest.mark.parametrize("fp8", [False, True])
def test_of_rows_with_one_slot_the_last_is_kept(level: str, fp8: bool) -> None:
    rng = np.random.default_rng(8)
    slots = rng.integers(-1, 40, 3000).astype(np.int32)
    latent = rng.standard_normal((3000, 512)).astype(np.float32)
    rope = rng.standard_normal((3000, 64)).astype(np.float32)
    cache, want = (
        np.zeros((3, 16, 1, 656), np.uint8) if fp8 else np.zeros((3, 16, 1, 576), BF16)
        for _ in range(2)
    )
    last = {int(slot): i for i, slot in enumerate(slots) if slot >= 0}
    rows = np.array(list(last.values()))
    append_latent(latent[rows], rope[rows], want, np.array(list(last), np.int32), fp8)
    append_latent(latent, rope, cache, slots, fp8)
    assert cache.tobytes() == want.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_an_appended_row_has_the_published_scales_and_codes_bit_for_bit(
    level: str, dtype: Any
) -> None:
    rng = np.random.default_rng(5)
    latent = rng.uniform(-400, 400, (3, 4, 128)).astype(dtype)
    latent[0, 0, 7], latent[0, 1, 9] = 448, -448  # amax / 448 is a power of two: it is the scale
    latent[0, 1] *= dtype(2.0**-3)
    latent[0, 2, 0], latent[0, 3, 0] = 450, -896
    latent[1] *= dtype(1e-7)  # below the scale's floor
    latent[1, 1], latent[1, 2, 3] = 0, 447 * 2.0**-13  # nothing; just below the floor
    latent[2, 0, 5], latent[2, 0, 6] = np.nan, -np.float32(np.nan)
    latent[2, 1] = np.nan
    scales = np.exp2([[0, -3, 1, 1], [-13] * 4, [0, -13, 0, 0]]).astype(np.float32)
    cache = np.full((1, 3, 1, 656), 0x55, np.uint8)
    rope, slots = np.ones((3, 64), dtype), np.arange(3, dtype=np.int32)
    append_latent(latent.reshape(3, 512), rope, cache, slots, is_fp8_kvcache=True)
    rows = cache[0, :, 0]
    assert (np.ascontiguousarray(rows[:, 512:528]).view(np.float32) == scales).all()
    codes = (latent.astype(np.float32) / scales[:, :, None]).astype(ml_dtypes.float8_e4m3fn)
    assert (rows[:, :512].reshape(3, 4, 128) == codes.view(np.uint8)).all()
    assert rows[2, 5] == 0x7F and rows[2, 6] == 0xFF


def test_appended_scales_and_codes_from_1e_6_to_1e4_are_as_defined(level: str) -> None:
    """scale = 2^ceil(log2(max(amax / 448, 1e-4))), code = e4m3(x fp32 / scale)."""
    rng = np.random.default_rng(9)
    most = np.geomspace(1e-6, 1e4, 800).astype(np.float32)
    latent = rng.uniform(-1, 1, (800, 128)).astype(np.float32) * most[:, None]
    latent[np.arange(800), rng.integers(0, 128, 800)] = most
    floored = np.maximum(most / np.float32(448), np.float32(1e-4)).astype(np.float64)
    scale = np.exp2(np.ceil(np.log2(floored))).astype(np.float32)
    codes = (latent / scale[:, None]).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    cache = np.zeros((1, 200, 1, 656), np.uint8)
    slots, rope = np.arange(200, dtype=np.int32), np.zeros((200, 64), np.float32)
    append_latent(latent.reshape(200, 512), rope, cache, slots, is_fp8_kvcache=True)
    rows = np.ascontiguousarray(cache[0, :, 0])
    assert rows[:, 512:528].tobytes() == scale.tobytes()
    assert rows[:, :512].tobytes() == codes.tobytes() and not ((codes & 0x7F) == 0x7F).any()


def test_a_gradient_is_refused_where_torch_records_one() -> None:
    q, k, v = (torch.randn(5, 2, 32, requires_grad=True) for _ in range(3))
    starts = torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(UnsupportedError, match="gradient"):
        flash_attn_varlen_func(q, k, v, starts, starts, 5, 5)
    plain = [x.detach() for x in (q, k, v)]
    with torch.no_grad():
        out, lse = flash_attn_varlen_func(q, k, v, starts, starts, 5, 5)
    want, want_lse = flash_attn_varlen_func(*plain, starts, starts, 5, 5)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
