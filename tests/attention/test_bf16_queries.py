"""bf16 queries over bf16 rows: what tiles and dots compute, bit for bit whatever stands beside it.

The engine's calls; `test_serving.py` has those of fp32 queries, which multiply-adds serve.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.attention.calls import paged
from tests.attention.test_serving import expected, problem
from whalefall import jit
from whalefall.attention import flash_mla_with_kvcache

BF16 = ml_dtypes.bfloat16
# blocks of 16 keys, products of 32, tiles of 64, panels of 192, runs of 768, and their borders
KEYS = [1, 15, 16, 17, 33, 63, 191, 192, 193, 767, 768, 769, 1700]


def bf16_problem(heads: int, width: int, keys: list[int], page: int = 64) -> Any:
    q, cache, tables = problem(heads, width, keys, BF16, page)
    return q.astype(BF16).astype(np.float32), cache, tables


def close(out: Any, lse: Any, want: tuple[Any, Any, Any]) -> None:
    # weights are rounded to 8 bits, their sum and the scores are not
    assert np.abs(out - want[0]).max() < 2**-8 * np.abs(want[0]).max()
    assert np.abs(lse - want[2]).max() < 1e-5


@pytest.mark.parametrize("page", [64, 61, 16, 3])
@pytest.mark.parametrize(
    ("heads", "width", "v_width"), [(16, 576, 512), (3, 160, 128), (17, 72, 64), (40, 96, 96)]
)
def test_any_rows_keys_and_pages_agree_with_float64(
    level: str, heads: int, width: int, v_width: int, page: int
) -> None:
    q, cache, tables = bf16_problem(heads, width, KEYS, page)
    out, lse = paged(q, cache, tables, KEYS, v_width, width**-0.5, bf16_q=True)
    for t, n in enumerate(KEYS):
        want = expected(q[t], cache, tables[t], n, v_width, width**-0.5)
        close(out[t], lse[t], want)


@pytest.mark.parametrize("scale", [0.0, -0.05])
def test_scales_that_are_not_positive(level: str, scale: float) -> None:
    q, cache, tables = bf16_problem(16, 96, [300], 64)
    out, lse = paged(q, cache, tables, [300], 64, scale, bf16_q=True)
    close(out[0], lse[0], expected(q[0], cache, tables[0], 300, 64, scale))


@pytest.mark.parametrize("size", [1e9, 3e10, 1e18, 1e30])
@pytest.mark.parametrize("heads", [1, 16])
def test_huge_scores_leave_the_key_that_has_the_highest(
    level: str, heads: int, size: float
) -> None:
    q, cache, tables = bf16_problem(heads, 96, [1, 2])
    for t, keys in enumerate((1, 2)):
        out, lse = paged(
            q[t : t + 1] * size, cache, tables[t : t + 1], [keys], 64, 1.0, bf16_q=True
        )
        rows = cache[tables[t][0], :keys].reshape(keys, 96).astype(np.float64)
        scores = q[t].astype(BF16).astype(np.float64) @ rows.T
        assert np.isfinite(lse).all()
        assert np.abs(out[0] - rows[scores.argmax(1), :64]).max() < 0.02


@pytest.mark.parametrize("heads", [3, 16, 40, 128])
def test_neighbours_threads_and_repeats_change_no_bit(level: str, heads: int) -> None:
    keys = [2500, 3, 700, 5000, 0, 64]
    q, cache, tables = bf16_problem(heads, 96, keys)

    def call(part: slice = slice(None)) -> Any:
        own = np.ascontiguousarray(q[part])
        return paged(own, cache, tables[part], keys[part], 64, 0.1, bf16_q=True)

    before = jit.get_num_threads()
    try:
        whole = call()
        for threads in (1, 2, 5):
            jit.set_num_threads(threads)
            again = call()
            assert (again[0] == whole[0]).all() and (again[1] == whole[1]).all()
            for t in range(len(keys)):
                alone = call(slice(t, t + 1))
                assert (alone[0][0] == whole[0][t]).all() and (alone[1][0] == whole[1][t]).all()
    finally:
        jit.set_num_threads(before)


def test_a_head_has_the_same_bits_in_any_company(level: str) -> None:
    q, cache, tables = bf16_problem(128, 96, [1000])
    whole = paged(q, cache, tables, [1000], 64, 0.1, bf16_q=True)
    for heads in (slice(0, 16), slice(5, 22), slice(90, 128)):
        own = np.ascontiguousarray(q[:, heads])
        part = paged(own, cache, tables, [1000], 64, 0.1, bf16_q=True)
        assert (part[0] == whole[0][:, heads]).all() and (part[1] == whole[1][:, heads]).all()


@pytest.mark.parametrize("spoilt", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("heads", [3, 16])
def test_a_value_that_is_no_number_reaches_only_rows_that_see_it(
    level: str, heads: int, spoilt: float
) -> None:
    """The last two keys of a causal call, which the last two of 16 tokens see; 8 tokens of 16 heads
    are computed together."""
    n = 230
    q, cache, tables = bf16_problem(heads, 96, [n])
    many = np.repeat(q[:, None], 16, axis=1).astype(BF16)
    lengths, scale = np.array([n], np.int32), 0.1

    def call() -> Any:
        return flash_mla_with_kvcache(
            many, cache, tables, lengths, 64, None, softmax_scale=scale, causal=True
        )

    clean = call()
    for key in (n - 2, n - 1):
        cache[tables[0, key // 64], key % 64, 0, 7] = spoilt
    got = call()
    assert (got[0][0, :14] == clean[0][0, :14]).all()
    assert not np.isfinite(got[0][0, 14:, :, 7].astype(np.float32)).any()
    if np.isinf(spoilt):  # the spoilt column of K makes a score of its own
        return
    assert np.isnan(got[0][0, 14:].astype(np.float32)).all()


def test_what_earlier_calls_left_behind_reaches_no_result(level: str) -> None:
    """Rows that are copied leave NaN in the place of the copy; a shorter request comes there."""
    for page in (61, 64):
        q, cache, tables = bf16_problem(16, 96, [200], page)
        want = paged(q, cache, tables, [7], 64, 0.1, bf16_q=True)
        nan = np.full_like(cache, np.nan)
        paged(q, nan, tables, [200], 64, 0.1, bf16_q=True)
        got = paged(q, cache, tables, [7], 64, 0.1, bf16_q=True)
        assert (got[0] == want[0]).all() and (got[1] == want[1]).all()
