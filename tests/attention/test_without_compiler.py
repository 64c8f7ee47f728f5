"""Without a C++ compiler numpy computes: the kernels' own tests hold for it, and some more.

All of them: `python -m pytest -p tests.without_compiler tests/attention`; here those that take
little time.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest

from tests.attention.closeness import close_decode
from tests.attention.problems import BF16, dense, dense_expected
from tests.attention.test_decode import (  # noqa: F401
    call,
    test_a_sample_of_the_original_grid,
    test_a_sink_takes_its_weight_of_dense_rows,
    test_causal_tokens_before_the_first_key_are_lonely,
    test_dense_over_the_fp8_cache,
    test_half_of_the_requests_may_be_empty,
    test_other_dtypes_heads_and_pages,
    test_strided_queries_and_cache,
    test_torch_tensors_give_the_same_bits,
)
from tests.attention.test_refusals import (  # noqa: F401
    test_decode_refuses,
    test_nothing_to_do_is_fine,
    test_the_others_refuse,
)
from tests.attention.test_serving import (  # noqa: F401
    test_a_nan_key_reaches_no_earlier_token,
    test_any_page_size,
    test_append_quantises_to_the_656_byte_row,
    test_append_rounds_rows_into_their_pages,
    test_fp8_rows_attend_as_their_bf16_expansion,
)
from tests.attention.test_sparse import (  # noqa: F401
    test_a_duplicate_counts_twice,
    test_a_length_beyond_the_list_ends_with_it,
    test_a_sink_of_infinity_empties_and_one_of_minus_infinity_does_nothing,
    test_sparse_decode_over_fp8,
    test_sparse_over_a_bf16_cache_with_all_indices_is_dense,
    test_sparse_prefill,
)
from tests.attention.test_varlen import (  # noqa: F401
    test_a_sequence_without_keys_is_zero_with_lse_minus_infinity,
    test_a_token_behind_the_last_end_is_zero_with_lse_minus_infinity,
    test_an_appended_row_has_the_published_scales_and_codes_bit_for_bit,
    test_an_infinity_is_appended_as_nan_with_a_scale_of_one,
    test_append_writes_named_slots_and_skips_minus_one,
    test_appended_scales_and_codes_from_1e_6_to_1e4_are_as_defined,
    test_equal_lengths_need_no_starts,
    test_nan_and_infinity_follow_one_convention,
    test_nan_in_a_part_is_in_the_merged_row,
    test_of_rows_with_one_slot_the_last_is_kept,
    test_one_nan_of_a_part_counts_and_a_lonely_part_does_not,
    test_packed_forms_are_slices,
    test_parts_merge_to_the_whole,
    test_the_originals_tolerances,
    test_values_may_start_where_the_keys_start,
)
from tests.no_compiler import no_compiler
from whalefall import attention
from whalefall.attention import without_compiler
from whalefall.attention.reference import attention as definition
from whalefall.errors import ShapeError


@pytest.fixture(autouse=True)
def told() -> Iterator[list[str]]:
    """No compiler; what was said of it."""
    with no_compiler() as words:
        yield words


@pytest.fixture
def level() -> str:
    """Numpy knows of none."""
    return "any"


@pytest.fixture
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few keys and tokens at a time, so that parts are merged."""
    monkeypatch.setattr(without_compiler, "KEYS", 7)
    monkeypatch.setattr(without_compiler, "ROWS", 12)


@pytest.mark.usefixtures("_small_parts")
@pytest.mark.parametrize("causal", [False, True])
def test_keys_in_parts(causal: bool) -> None:
    p = dense(3, 2, 50, 4, 2, True, empty=True)
    sink = np.array([0.5, np.inf, -np.inf, -3], np.float32)
    plain, _ = call(p, causal)
    out, lse = call(p, causal, attn_sink=sink)
    want, want_lse = dense_expected(p, 512, 576**-0.5, causal)
    close_decode(plain, want, lse, want_lse)
    with np.errstate(over="ignore"):
        share = 1 / (1 + np.exp(sink[:, None] - np.where(np.isinf(want_lse), 0, want_lse)))
    close_decode(out, want * share.swapaxes(1, 2)[..., None], lse, want_lse)


@pytest.mark.usefixtures("_small_parts")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_prompts_in_parts(causal: bool, kv_heads: int) -> None:
    rng = np.random.default_rng(kv_heads)
    starts = np.array([0, 0, 29, 33], np.int32), np.array([0, 5, 25, 41], np.int32)
    q, k, v = (
        rng.standard_normal(s).astype(BF16)
        for s in ((33, 4, 24), (41, kv_heads, 24), (41, kv_heads, 16))
    )
    out, lse = attention.flash_attn_varlen_func(q, k, v, *starts, 29, 20, causal=causal)
    for t in range(33):
        s = 1 if t < 29 else 2
        (q_end, first, end) = starts[0][s + 1], starts[1][s], starts[1][s + 1]
        seen = slice(first, max(first, end - (q_end - 1 - t)) if causal else end)
        for h in range(4):
            kv = h * kv_heads // 4
            want, _, want_lse = definition(
                q[t, h : h + 1], k[seen, kv], v[seen, kv], 24**-0.5, None, -np.inf
            )
            assert np.abs(out[t, h].astype(np.float64) - want).max() < 2**-8 * np.abs(v).max()
            assert lse[t, h] == want_lse[0] or abs(lse[t, h] - want_lse[0]) < 1e-6


@pytest.mark.usefixtures("_small_parts")
def test_chosen_rows_in_parts() -> None:
    rng = np.random.default_rng(5)
    q = rng.standard_normal((3, 2, 40)).astype(np.float32)
    kv = rng.standard_normal((60, 1, 40)).astype(np.float32)
    index = rng.integers(-5, 70, (3, 1, 50)).astype(np.int32)
    lengths = np.array([50, 20, 0], np.int32)
    out, top, lse = attention.flash_mla_sparse_fwd(q, kv, index, 0.3, 32, None, lengths)
    for t, count in enumerate(lengths):
        rows = index[t, 0, :count]
        keys = kv[rows[(rows >= 0) & (rows < 60)], 0]
        want = definition(q[t], keys, keys[:, :32], 0.3)
        for got, truth in zip((out[t], top[t], lse[t]), want, strict=True):
            assert np.allclose(got, truth, atol=2e-6)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ({"length": -1}, r"cache_seqlens\[1\] is -1, wanted 0 to 256 = 4 blocks of 64 keys; .*"),
        ({"length": 257}, r"cache_seqlens\[1\] is 257, wanted 0 to 256 = 4 blocks of 64 keys; .*"),
        (
            {"block": -1},
            r"block_table\[2, 1\] is -1, wanted 0 to 11; the length .*",
        ),
        (
            {"block": 12},
            r"block_table\[2, 1\] is 12, wanted 0 to 11; the length .*",
        ),
    ],
)
def test_wrong_lengths_and_blocks_are_refused(spoil: dict[str, int], words: str) -> None:
    p = dense(3, 1, 130, 2, 1, False)
    call(p, False)  # what no length reaches is garbage
    if "length" in spoil:
        p.lengths[1] = spoil["length"]
    if "block" in spoil:
        p.table[2, 1] = spoil["block"]
    with pytest.raises(ShapeError, match=f"^flash_mla_with_kvcache: {words}$"):
        call(p, False)


def test_a_long_prompt_takes_no_square_of_memory() -> None:
    n, heads = 4096, 2
    rng = np.random.default_rng(6)
    q, k, v = (rng.standard_normal((n, heads, 16)).astype(BF16) for _ in range(3))
    starts = np.array([0, n], np.int32)
    tracemalloc.start()
    out, _ = attention.flash_attn_varlen_func(q, k, v, starts, starts, n, n)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < n * n * 8 / 2  # of one head's scores in float64
    want, _, _ = definition(q[5], k[:, 0], v[:, 0], 0.25)
    assert np.abs(out[5, 0].astype(np.float64) - want[0]).max() < 1e-3


def test_it_is_said_that_numpy_computes(told: list[str]) -> None:
    p = dense(1, 1, 20, 1, 1, False)
    for _ in range(3):
        call(p, False)
    assert told == ["no C++ compiler"]  # once a unit; `jit.numpy_instead` warns once of all
