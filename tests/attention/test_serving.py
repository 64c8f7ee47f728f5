"""The kernels as the engine calls them: against float64, and bit for bit whatever the batch."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.attention.calls import append, paged, varlen
from whalefall import jit
from whalefall.attention.reference import attention

BF16 = ml_dtypes.bfloat16
# (heads, kv_lora + rope, kv_lora)
HEADS = [(1, 576, 512), (2, 160, 128), (3, 24, 16), (16, 576, 512), (6, 72, 64)]
KEYS = [0, 1, 63, 64, 65, 200, 513, 1300]


def problem(heads: int, width: int, keys: list[int], dtype: Any, page: int = 64) -> Any:
    """q, cache, block tables; rows beyond the keys are NaN, unused table entries garbage."""
    rng = np.random.default_rng(heads * width)
    tokens, blocks = len(keys), -(-max(keys) // page) + 1
    q = rng.standard_normal((tokens, heads, width)).astype(np.float32)
    cache = rng.standard_normal((tokens * blocks, page, 1, width)).astype(dtype)
    tables = rng.permutation(tokens * blocks).reshape(tokens, blocks).astype(np.int32)
    for t, n in enumerate(keys):
        cache[tables[t]].reshape(-1, width)
        for j in range(blocks):
            cache[tables[t, j], max(0, min(page, n - j * page)) :] = np.nan
        tables[t, -(-n // page) :] = 2147480000
    return q, cache, tables


def expected(q: Any, cache: Any, table: Any, n: int, v_width: int, scale: float) -> Any:
    page, width = cache.shape[1], cache.shape[3]
    rows = cache[table[: -(-n // page)]].reshape(-1, width)[:n]
    return attention(q, rows, rows[:, :v_width], scale)


@pytest.mark.parametrize("dtype", [BF16, np.float32, np.float16])
@pytest.mark.parametrize(("heads", "width", "v_width"), HEADS)
def test_paged_mla_agrees_with_float64(
    level: str, heads: int, width: int, v_width: int, dtype: Any
) -> None:
    if dtype != BF16 and heads != 6:
        pytest.skip("another format differs in how a row is loaded: one group size shows it")
    q, cache, tables = problem(heads, width, KEYS, dtype)
    out, lse = paged(q, cache, tables, KEYS, v_width, width**-0.5)
    for t, n in enumerate(KEYS):
        want, _, want_lse = expected(q[t], cache, tables[t], n, v_width, width**-0.5)
        # fp32 sums of 24 bits; values are of order 1
        assert np.abs(out[t] - want).max() < 2e-6
        if n:
            assert np.abs(lse[t] - want_lse).max() < 2e-6
        else:
            assert (lse[t] == np.inf).all() and (out[t] == 0).all()


@pytest.mark.parametrize("bf16_q", [False, True])
@pytest.mark.parametrize("heads", [1, 16])
def test_maxima_that_grow_along_the_keys(level: str, heads: int, bf16_q: bool) -> None:
    n, width, v_width = 700, 576, 512
    q, cache, tables = problem(heads, width, [n], BF16)
    q = q.astype(BF16).astype(np.float32)
    for key in range(n):  # by 2^8 every other tile: the softmax has to move its point
        cache[tables[0, key // 64], key % 64] *= BF16(1 + key / 50)
    out, lse = paged(q, cache, tables, [n], v_width, width**-0.5, bf16_q=bf16_q)
    want, _, want_lse = expected(q[0], cache, tables[0], n, v_width, width**-0.5)
    # scores up to 50 in fp32; weights in bf16 for dots
    assert np.abs(out[0] - want).max() < (2**-8 if bf16_q else 1e-5) * np.abs(want).max()
    assert np.abs(lse[0] - want_lse).max() < 1e-5


@pytest.mark.parametrize("page", [16, 64, 100, 256])
def test_any_page_size(level: str, page: int) -> None:
    q, cache, tables = problem(4, 96, [70, 300], BF16, page)
    out, _ = paged(q, cache, tables, [70, 300], 64, 0.1)
    for t, n in enumerate([70, 300]):
        want, _, _ = expected(q[t], cache, tables[t], n, 64, 0.1)
        assert np.abs(out[t] - want).max() < 2e-6


@pytest.mark.parametrize("heads", [1, 3, 16])
def test_a_prompt_token_has_the_same_bits_however_the_prompt_is_cut(level: str, heads: int) -> None:
    n, width = 1100, 96
    rng = np.random.default_rng(5)
    q = rng.standard_normal((n, heads, width)).astype(np.float32)
    cache = rng.standard_normal((18, 64, 1, width)).astype(BF16)
    table = rng.permutation(18).astype(np.int32)
    keys = np.arange(1, n + 1)
    chosen = [*range(500, 530), *range(1010, 1100)]
    whole = paged_same_table(q, cache, table, keys, chosen)
    for chunk in (1, 7, 120):
        for i in range(0, len(chosen), chunk):
            part = chosen[i : i + chunk]
            out, lse = paged_same_table(q, cache, table, keys, part)
            assert (out == whole[0][i : i + chunk]).all()
            assert (lse == whole[1][i : i + chunk]).all()


def paged_same_table(q: Any, cache: Any, table: Any, keys: Any, chosen: list[int]) -> Any:
    """Paged MLA of some tokens of one sequence, which share one block table."""
    import ctypes

    from tests.attention.calls import cache_struct
    from whalefall.attention import native_calls as native
    from whalefall.attention import structs

    part, n = np.ascontiguousarray(q[chosen]), np.asarray(keys[chosen], np.int32)
    pointers = np.full(len(chosen), table.ctypes.data, np.uint64)
    heads, width = q.shape[1:]
    out, lse = np.empty((len(chosen), heads, 64), np.float32), np.empty((len(chosen), heads), "f4")
    args = structs.PagedArgs(
        *(part.ctypes.data, heads * width, width, out.ctypes.data, heads * 64, 64),
        *(lse.ctypes.data, heads, 1, None, pointers.ctypes.data, n.ctypes.data),
        *(len(chosen), heads, 1, width, 64, cache_struct(cache), 0.1, np.inf, 0, 0, 1),
    )
    native.paged_entry(1, heads)(ctypes.addressof(args))
    return out, lse


@pytest.mark.parametrize("dtype", [BF16, np.float32, np.float16])
@pytest.mark.parametrize(("width", "v_width"), [(576, 512), (96, 80), (40, 16)])
def test_four_heads_have_the_same_bits_alone_and_among_others(
    level: str, width: int, v_width: int, dtype: Any
) -> None:
    """At `avx2` one group of four is computed by two keys at a time, several by three."""
    keys = [1, 2, 3, 4, 5, 6, 61, 62, 63, 64, 65, 130, 700]
    q, cache, tables = problem(16, width, keys, dtype)
    whole = paged(q, cache, tables, keys, v_width, 0.1)
    own = np.ascontiguousarray(q[:, 4:8])
    part = paged(own, cache, tables, keys, v_width, 0.1)
    assert (part[0] == whole[0][:, 4:8]).all() and (part[1] == whole[1][:, 4:8]).all()


@pytest.mark.parametrize("heads", [1, 2, 4, 40])
def test_neighbours_and_threads_change_no_bit(level: str, heads: int) -> None:
    keys = [5000, 3, 700, 9000, 0, 64]
    q, cache, tables = problem(heads, 96, keys, BF16)
    before = jit.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            jit.set_num_threads(threads)
            results.append(paged(q, cache, tables, keys, 64, 0.1))
            for t in range(len(keys)):
                alone = paged(
                    np.ascontiguousarray(q[t : t + 1]),
                    cache,
                    tables[t : t + 1],
                    keys[t : t + 1],
                    64,
                    0.1,
                )
                assert (alone[0][0] == results[0][0][t]).all()
                assert (alone[1][0] == results[0][1][t]).all()
        assert all((r[0] == results[0][0]).all() for r in results)
    finally:
        jit.set_num_threads(before)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [BF16, np.float32])
@pytest.mark.parametrize(("width", "v_width"), [(192, 128), (40, 24)])
def test_varlen_attention_agrees_with_float64(
    level: str, width: int, v_width: int, dtype: Any, causal: bool
) -> None:
    rng = np.random.default_rng(7)
    q_lens, k_lens, heads, kv_heads = [5, 0, 70, 130, 3], [9, 4, 70, 150, 0], 4, 2
    q_starts, k_starts = np.cumsum([0, *q_lens]), np.cumsum([0, *k_lens])
    q = rng.standard_normal((q_starts[-1], heads, width)).astype(np.float32)
    k = rng.standard_normal((k_starts[-1], kv_heads, width)).astype(dtype)
    v = rng.standard_normal((k_starts[-1], kv_heads, v_width)).astype(dtype)
    out, lse = varlen(q, k, v, q_starts, k_starts, width**-0.5, causal)
    for s, (nq, nk) in enumerate(zip(q_lens, k_lens, strict=True)):
        for t in range(nq):
            seen = max(0, t + 1 + nk - nq) if causal else nk
            rows = slice(k_starts[s], k_starts[s] + seen)
            for h in range(heads):
                want, _, want_lse = attention(
                    q[q_starts[s] + t, h : h + 1], k[rows, h // 2], v[rows, h // 2],
                    width**-0.5, lonely_lse=-np.inf,
                )  # fmt: skip
                assert np.abs(out[q_starts[s] + t, h] - want).max() < 2e-6
                got = lse[q_starts[s] + t, h]
                assert got == want_lse[0] or abs(got - want_lse[0]) < 2e-6


def test_a_prompt_cut_anywhere_has_the_bits_of_the_whole(level: str) -> None:
    rng = np.random.default_rng(8)
    n, heads = 200, 2
    q, k = (rng.standard_normal((n, heads, 48)).astype(np.float32) for _ in range(2))
    v = rng.standard_normal((n, heads, 32)).astype(np.float32)
    whole, _ = varlen(q, k, v, [0, n], [0, n], 0.2, True)
    for cut in (1, 63, 130):
        first, _ = varlen(q[:cut], k[:cut], v[:cut], [0, cut], [0, cut], 0.2, True)
        rest, _ = varlen(q[cut:], k, v, [0, n - cut], [0, n], 0.2, True)
        assert (np.concatenate([first, rest]) == whole).all()


def test_a_nan_key_reaches_no_earlier_token(level: str) -> None:
    rng = np.random.default_rng(9)
    q, k = (rng.standard_normal((70, 1, 32)).astype(np.float32) for _ in range(2))
    v = rng.standard_normal((70, 1, 32)).astype(np.float32)
    clean, _ = varlen(q, k, v, [0, 70], [0, 70], 0.2, True)
    k[66], v[66] = np.nan, np.nan
    dirty, _ = varlen(q, k, v, [0, 70], [0, 70], 0.2, True)
    assert (dirty[:66] == clean[:66]).all()
    assert np.isnan(dirty[66:]).all()


@pytest.mark.parametrize("dtype", [BF16, np.float32, np.float16])
def test_append_rounds_rows_into_their_pages(level: str, dtype: Any) -> None:
    rng = np.random.default_rng(10)
    cache = np.zeros((4, 16, 1, 24), dtype)
    latent = rng.standard_normal((40, 16)).astype(np.float32)
    rope = rng.standard_normal((40, 8)).astype(np.float32)
    table = np.array([2, 0, 3], np.int32)
    append(latent, rope, np.tile(table, (40, 1)), np.arange(40), cache)
    rows = np.concatenate([latent, rope], axis=1).astype(dtype)
    assert (cache[table].reshape(48, 24)[:40] == rows).all()
    assert (cache[1] == 0).all() and (cache[3, 8:] == 0).all()


def test_append_quantises_to_the_656_byte_row(level: str) -> None:
    rng = np.random.default_rng(11)
    latent = (rng.standard_normal((5, 512)) * 3).astype(np.float32)
    latent[1, :128], latent[2, 3] = 0, np.nan
    rope = rng.standard_normal((5, 64)).astype(np.float32)
    cache = np.zeros((1, 64, 1, 656), np.uint8)
    append(latent, rope, np.zeros((5, 1)), np.arange(5), cache)
    for t in range(5):
        row = cache[0, t, 0]
        tiles = latent[t].reshape(4, 128)
        amax = np.nanmax(np.abs(tiles), axis=1)
        scale = np.exp2(np.ceil(np.log2(np.maximum(amax / 448, 1e-4)))).astype(np.float32)
        codes = (tiles / scale[:, None]).astype(ml_dtypes.float8_e4m3fn)
        assert (row[512:528].view(np.float32) == scale).all()
        assert (row[:512] == codes.reshape(-1).view(np.uint8)).all()
        assert (row[528:].view(BF16) == rope[t].astype(BF16)).all()


@pytest.mark.parametrize("powers_of_two", [False, True])
@pytest.mark.parametrize("heads", [3, 16])
def test_fp8_rows_attend_as_their_bf16_expansion(
    level: str, heads: int, powers_of_two: bool
) -> None:
    rng = np.random.default_rng(12)
    cache = rng.integers(0, 256, (4, 64, 1, 656)).astype(np.uint8)
    cache[..., :512][(cache[..., :512] & 127) == 127] = 3
    scales = rng.random((4, 64, 1, 4)).astype(np.float32)
    if powers_of_two:
        scales = np.exp2(rng.integers(-14, 3, scales.shape)).astype(np.float32)
        cache[:, ::2, :, :256] = np.arange(256)  # each code, 0 and subnormals too
        cache[..., :512][(cache[..., :512] & 127) == 127] = 3
    cache[..., 512:528] = scales.view(np.uint8)
    rope = rng.standard_normal((4, 64, 1, 64)).astype(BF16)
    cache[..., 528:] = rope.view(np.uint8)
    codes = cache[..., :512].copy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    scale = np.repeat(cache[..., 512:528].copy().view(np.float32), 128, axis=-1)
    plain = np.concatenate([(codes * scale).astype(BF16), rope], axis=-1)
    q = rng.standard_normal((2, heads, 576)).astype(np.float32) * 0.01
    tables, keys = np.array([[2, 0], [1, 3]]), [100, 7]
    for bf16_q in (False, True):
        got = paged(q, cache, tables, keys, 512, 0.05, bf16_q=bf16_q)
        want = paged(q, plain, tables, keys, 512, 0.05, bf16_q=bf16_q)
        assert (got[0] == want[0]).all() and (got[1] == want[1]).all()
    cache[1, 0, 0, 5] = 0x7F  # a code that is NaN
    got = paged(q, cache, tables, keys, 512, 0.05, bf16_q=True)
    assert np.isnan(got[0][1]).all() and np.isfinite(got[0][0]).all()


@pytest.mark.parametrize("name", ["avx512", "avx512bf16", "amx"])
def test_levels_that_this_machine_may_lack_compile(name: str) -> None:
    from whalefall.attention.native_calls import NATIVE
    from whalefall.jit import compile as build_module

    if jit.LEVELS[name].rank <= jit.LEVELS[jit.levels()[-1]].rank:
        pytest.skip("this machine runs it: the other tests do")
    # Compiled as an object and thrown away: loading it would run initialisers of that level.
    import subprocess

    from whalefall.jit import isa
    from whalefall.jit.compiler import OPTIONS, compiler

    row = ["-DWF_ROW=Bf16Row", "-DWF_GROUP=4"]
    if name == "amx":
        row = ["-DWF_ROW=TileRow", "-DWF_GROUP=16", "-DWF_TILE"]
    command = [
        *compiler().command, *OPTIONS, *isa.flags(name), *row, f"-I{build_module.INCLUDE}",
        "-fsyntax-only", str(NATIVE / "mla_paged.cpp"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
