"""What an `fp8_gemm_nt` must do: block-scaled FP8 operands, bf16 or fp32 result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from whalefall import gemm
from whalefall.gemm.reference import dequantize
from whalefall.testing.closeness import assert_close

__all__ = ["Fp8GemmSuite"]

SHAPES = [(1, 1, 128), (1, 576, 7168), (33, 130, 256), (64, 128, 384), (127, 512, 1536)]


class Fp8GemmSuite:
    """Give `gemm_nt`: DeepGEMM's `fp8_gemm_nt` on numpy arrays (adapt yours to them)."""

    @pytest.fixture
    def gemm_nt(self) -> Callable[..., Any]:
        """((a [M, K], scales), (b [N, K], scales), d [M, N], c=None): writes d."""
        raise NotImplementedError("a subclass of Fp8GemmSuite gives the fixture `gemm_nt`")

    @pytest.mark.parametrize(("m", "n", "k"), SHAPES)
    def test_it_is_the_product_of_the_dequantised_operands(
        self, gemm_nt: Callable[..., Any], m: int, n: int, k: int
    ) -> None:
        a, b, want = problem(m, n, k)
        d = np.full((m, n), np.nan, ml_dtypes.bfloat16)
        gemm_nt(a, b, d)
        assert_close(d, want, 1e-5, f"{m} x {n} x {k}")  # bf16 rounds by 2^-9 at most

    def test_it_adds_c(self, gemm_nt: Callable[..., Any]) -> None:
        a, b, want = problem(17, 256, 256)
        c = np.random.default_rng(1).standard_normal((17, 256)).astype(np.float32)
        d = np.empty((17, 256), np.float32)
        gemm_nt(a, b, d, c)
        assert_close(d, want + c, 1e-9, "d = a bᵀ + c")

    def test_a_row_does_not_depend_on_its_neighbours(self, gemm_nt: Callable[..., Any]) -> None:
        (a, scale), b, _ = problem(40, 128, 512)
        d = np.empty((40, 128), ml_dtypes.bfloat16)
        gemm_nt((a, scale), b, d)
        again = np.empty((40, 128), ml_dtypes.bfloat16)
        gemm_nt((a[::-1].copy(), scale[::-1].copy()), b, again)
        assert np.array_equal(d.view(np.uint16), again[::-1].view(np.uint16))


def problem(m: int, n: int, k: int) -> tuple[Any, Any, Any]:
    """Quantised a and b, and the float64 product of what they stand for."""
    rng = np.random.default_rng(m * n + k)
    a = gemm.per_token_cast_to_fp8(rng.standard_normal((m, k)).astype(np.float32), False)
    b = gemm.per_block_cast_to_fp8(rng.standard_normal((n, k)).astype(np.float32), False)
    return a, b, dequantize(*a, 1, 128) @ dequantize(*b, 128, 128).T
