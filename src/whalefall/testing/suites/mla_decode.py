"""What a `flash_mla_with_kvcache` must do, dense bf16 pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from whalefall.attention.reference import attention
from whalefall.testing.closeness import assert_close

__all__ = ["MlaDecodeSuite"]

D, D_V, PAGE = 576, 512, 64
BF16 = ml_dtypes.bfloat16
# lengths, query tokens a request, heads
CASES = [([1], 1, 1), ([64, 65, 63], 1, 16), ([200, 1, 129], 2, 9), ([1000], 1, 128)]


class MlaDecodeSuite:
    """Give `decode`: FlashMLA's `flash_mla_with_kvcache` on numpy arrays (adapt yours to them)."""

    @pytest.fixture
    def decode(self) -> Callable[..., Any]:
        """(q, k_cache, block_table, cache_seqlens, head_dim_v, metadata, num_splits, causal=)."""
        raise NotImplementedError("a subclass of MlaDecodeSuite gives the fixture `decode`")

    @pytest.mark.parametrize(("lengths", "s_q", "heads"), CASES)
    @pytest.mark.parametrize("causal", [False, True])
    def test_it_is_attention_over_shuffled_pages(
        self, decode: Callable[..., Any], lengths: list[int], s_q: int, heads: int, causal: bool
    ) -> None:
        if min(lengths) < s_q and causal:
            lengths = [max(n, s_q) for n in lengths]
        rng = np.random.default_rng(heads)
        q, cache, table, rows = problem(rng, lengths, s_q, heads)
        out, lse = decode(
            q, cache, table, np.array(lengths, np.int32), D_V, None, None, causal=causal
        )
        for i, keys in enumerate(rows):
            for t in range(s_q):
                seen = keys[: len(keys) - (s_q - 1 - t) if causal else len(keys)]
                want, _, want_lse = attention(q[i, t], seen, seen[:, :D_V], D**-0.5)
                # bf16 output: 2^-9 relative an element, far below this as a whole
                assert_close(out[i, t], want, 1e-5, f"request {i}, token {t}: out")
                assert_close(np.asarray(lse)[i, :, t], want_lse, 1e-9, f"request {i}: lse")

    def test_what_lies_behind_the_last_key_is_never_read(self, decode: Callable[..., Any]) -> None:
        q, cache, table, _ = problem(np.random.default_rng(0), [70], 1, 4)
        lengths = np.array([70], np.int32)
        out, _ = decode(q, cache, table, lengths, D_V, None, None, causal=False)
        cache[table[0, 1], 70 - PAGE :] = np.nan
        again, _ = decode(q, cache, table, lengths, D_V, None, None, causal=False)
        assert np.array_equal(np.asarray(out, np.float32), np.asarray(again, np.float32))


def problem(
    rng: np.random.Generator, lengths: list[int], s_q: int, heads: int
) -> tuple[Any, Any, Any, list[Any]]:
    """q [b, s_q, h, D], pages in random order, block table, and each request's own rows [n, D]."""
    blocks = [-(-n // PAGE) for n in lengths]
    order = rng.permutation(sum(blocks)).astype(np.int32)
    cache = rng.standard_normal((sum(blocks), PAGE, 1, D)).astype(BF16)
    table = np.zeros((len(lengths), max(blocks)), np.int32)
    rows = []
    for i, own in enumerate(np.split(order, np.cumsum(blocks)[:-1])):
        table[i, : len(own)] = own
        rows.append(cache[own].reshape(-1, D)[: lengths[i]])
    q = rng.standard_normal((len(lengths), s_q, heads, D)).astype(BF16)
    return q, cache, table, rows
