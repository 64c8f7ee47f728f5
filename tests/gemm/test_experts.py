"""Fused experts: what a row's weight does to it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.gemm.operands import BF16
from whalefall import gemm


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("form", ["few", "many"])
def test_a_row_is_multiplied_by_its_weight_before_it_is_rounded(
    level: str, form: Any, quantize: bool
) -> None:
    rng = np.random.default_rng(0)
    tokens, topk, hidden, width = 5, 3, 128, 64
    experts = []
    for _ in range(4):
        pairs = [
            gemm.per_block_cast_to_fp8(rng.standard_normal(shape).astype(np.float32), False)
            for shape in ((width, hidden), (width, hidden), (hidden, width))
        ]
        values, scales = zip(*pairs, strict=True)
        experts.append(gemm.ExpertWeights(*values, *scales))
    x = rng.standard_normal((tokens, hidden)).astype(np.float32)
    idx = np.stack([rng.permutation(4)[:topk] for _ in range(tokens)])
    weights = rng.standard_normal((tokens, topk)).astype(np.float32)

    def rows(dtype: str, of: Any = None) -> Any:
        return gemm.fused_experts(
            x, experts, idx, form, topk_weights=of, quantize_activations=quantize, out_dtype=dtype
        )

    plain = rows("float32")
    assert np.allclose(rows("float32", weights), plain * weights[..., None], rtol=1e-6, atol=0)
    weighted = rows("float32", weights)
    assert (rows("bfloat16", weights) == weighted.astype(BF16)).all()
    assert (rows("float32", np.zeros_like(weights)) == 0).all()
