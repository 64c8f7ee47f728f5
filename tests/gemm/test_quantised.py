"""What activations become: W8A8 against the cast's own codes in float64, and rounding to bf16."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.gemm.operands import BF16, E4M3, fp8
from whalefall import gemm
from whalefall.gemm.linear import quantize_rows
from whalefall.jit import machine


def rows_of_every_kind(rng: np.random.Generator, m: int, k: int, dtype: Any) -> Any:
    """Normal rows of sizes far apart; the last below the scale's floor, the one before of ties."""
    x = rng.standard_normal((m, k)) * np.exp2(rng.integers(-9, 9, (m, 1)))
    if m > 1:
        x[-2] = rng.choice([17.0, 19.0, -21.0, 34.0, -38.0, 0.0], k)  # ties, the scale being 1
        x[-2, ::50] = 448
    x[-1] = rng.standard_normal(k) * 1e-5
    return x.astype(dtype)


@pytest.mark.parametrize("form", ["few", "many"])
@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize("m", [1, 2, 3, 8, 40])
def test_quantised_activations_are_the_cast_ones(level: str, m: int, dtype: Any, form: Any) -> None:
    rng, n, k = np.random.default_rng(m), 75, 300
    (weight, scale), exact = fp8(rng, (n, k), (128, 128))
    rows = rows_of_every_kind(rng, max(m, 3), k, dtype)
    for x in (rows[:1], rows[1:2], rows[2:]) if m == 1 else (rows[:m], rows[-m:]):
        codes, scales = gemm.per_token_cast_to_fp8(x, False)
        wide = codes.astype(np.float64) * np.repeat(scales, 128, 1)[:, :k].astype(np.float64)
        y = gemm.fp8_linear(x, weight, scale, form, quantize_activations=True, out_dtype="float32")
        # fp32 sums of 128 and of 3, to the last bits of what was added
        wrong = np.abs(y - wide @ exact.T) / (np.abs(wide) @ np.abs(exact).T)
        assert wrong.max() < 1e-6
        assert (quantize_rows(x)[:, :k] == codes.view(np.uint8)).all()


@pytest.mark.parametrize("form", ["few", "many"])
def test_bits_of_quantised_rows_do_not_depend_on_m(level: str, form: Any) -> None:
    rng = np.random.default_rng(7)
    (weight, scale), _ = fp8(rng, (75, 300), (128, 128))
    x = rows_of_every_kind(rng, 40, 300, np.float32)
    whole = gemm.fp8_linear(x, weight, scale, form, quantize_activations=True)
    for m in (1, 2, 3, 8):
        part = gemm.fp8_linear(x[-m:], weight, scale, form, quantize_activations=True)
        assert part.tobytes() == whole[-m:].tobytes()


def test_values_are_multiplied_by_the_scales_reciprocal_not_divided() -> None:
    """Rows [1, 128] whose first value rounds one way as x * (1 / s) and the other as x / s."""
    rng = np.random.default_rng(8)
    most = (rng.random(20000) + 0.5).astype(np.float32)
    scale = most / np.float32(448)
    tie = rng.choice(np.float32([17, 19, 21, 68, 76, 136, 216, 1.0625]), len(most))
    x = tie * scale
    times, over = (x * (np.float32(1) / scale)).astype(E4M3), (x / scale).astype(E4M3)
    told = np.flatnonzero(times != over)
    assert len(told) > 100
    rows = np.zeros((len(told), 128), np.float32)
    rows[:, 0], rows[:, 1] = x[told], most[told]
    codes, scales = gemm.per_token_cast_to_fp8(rows, False)
    assert (scales[:, 0] == scale[told]).all()
    assert (codes[:, 0] == times[told]).all()
    assert (quantize_rows(rows)[:, :128] == codes.view(np.uint8)).all()
    block, channel = gemm.per_block_cast_to_fp8, gemm.per_channel_cast_to_fp8
    for row, code in zip(rows[:20], codes[:20], strict=True):
        assert (block(row[None], False)[0] == code).all()
        assert (channel(row[:, None].copy(), False)[0][:, 0] == code).all()


@pytest.mark.parametrize("form", ["few", "many"])
def test_experts_of_bf16_rows_round_the_hidden_row_as_half_activations_do(
    level: str, form: Any
) -> None:
    rng = np.random.default_rng(9)
    shapes = [(150, 200), (150, 200), (200, 150)]
    parts = [fp8(rng, shape, (128, 128))[0] for shape in shapes]
    experts = [gemm.ExpertWeights(*(p[0] for p in parts), *(p[1] for p in parts))]
    x, idx = rng.standard_normal((5, 200)).astype(BF16), np.zeros((5, 1), np.int32)
    given: dict[str, Any] = {"form": form, "out_dtype": "float32"}
    rows = gemm.fused_experts(x, experts, idx, **given)
    wide = x.astype(np.float32)
    half = gemm.fused_experts(wide, experts, idx, half_activations=True, **given)
    assert rows.tobytes() == half.tobytes()
    kept = gemm.fused_experts(wide, experts, idx, **given)
    assert (rows != kept).any() == machine.halves_are_fast(level)
