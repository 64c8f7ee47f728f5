"""Products of nothing: a K of 0 is zeros, and results without elements are fine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.gemm.operands import BF16, E4M3
from whalefall import gemm


def plain_or_fp8_experts(weight: Any, width: int, hidden: int) -> gemm.ExpertWeights:
    shapes = [(width, hidden), (width, hidden), (hidden, width)]
    scales = [np.ones((-(-n // 128), -(-k // 128)), np.float32) for n, k in shapes]
    parts = [np.ones(shape, weight) for shape in shapes]
    return gemm.ExpertWeights(*parts, *(scales if weight == E4M3 else ()))


@pytest.mark.parametrize("form", ["few", "many"])
@pytest.mark.parametrize("x_type", [np.float32, BF16])
def test_a_sum_over_nothing_is_zero(level: str, x_type: Any, form: Any) -> None:
    for m, n in [(1, 1), (2, 40), (9, 300), (70, 3)]:
        x, scale = np.ones((m, 0), x_type), np.ones((-(-n // 128), 0), np.float32)
        for quantize in (False, True):
            y = np.full((m, n), 7, x_type)
            gemm.fp8_linear(
                x, np.ones((n, 0), E4M3), scale, form, quantize_activations=quantize, out=y
            )
            assert (y == 0).all()
        for dtype in (np.float32, BF16):
            assert (gemm.linear(x, np.ones((n, 0), dtype), form) == 0).all()
    for width, hidden in [(0, 40), (40, 0), (0, 0)]:
        for weight in (np.float32, BF16, E4M3):
            experts = [plain_or_fp8_experts(weight, width, hidden)] * 2
            x, idx = np.ones((9, hidden), x_type), np.zeros((9, 2), np.int32)
            out = np.full((9, 2, hidden), 7, np.float32)
            gemm.fused_experts(x, experts, idx, form, out=out)
            assert (out == 0).all()


@pytest.mark.parametrize(("shape", "strides"), [((0, 4), (8, 2)), ((3, 0), (5, 1))])
def test_results_without_elements_share_no_memory_with_what_is_added(
    shape: tuple[int, int], strides: tuple[int, int]
) -> None:
    torch = pytest.importorskip("torch")
    a, b = (torch.ones(rows, 8, dtype=torch.bfloat16) for rows in shape)
    d, c = torch.empty(shape), torch.empty_strided(shape, strides)
    assert d.data_ptr() == c.data_ptr() == 0 and d.stride() != c.stride()
    gemm.bf16_gemm_nt(a, b, d, c)
