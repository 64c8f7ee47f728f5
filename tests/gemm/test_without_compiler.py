"""Without a C++ compiler numpy computes: the kernels' own tests hold for it, and some more.

All of them: `python -m pytest -p tests.without_compiler tests/gemm`; here those that take no time.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.gemm.operands import BF16, bf16, error, fp8
from tests.gemm.test_dense import (  # noqa: F401
    test_accumulation_adds_once_in_fp32,
    test_bf16_layouts,
    test_cublaslt_takes_codes_without_scales,
    test_fp4_against_fp8_with_scales_of_their_own,
    test_fp8_layouts_and_recipes,
    test_nan_and_infinity_stay_where_they_are,
    test_nothing_to_do_leaves_or_zeroes,
    test_packed_ue8m0_scales_on_either_side,
    test_partial_overlap_is_refused,
    test_refusals_say_what_is_wrong,
    test_skip_head_mid_leaves_the_gaps,
    test_torch_tensors_give_the_same_bits,
)
from tests.gemm.test_grouped import (  # noqa: F401
    alignment,
    test_contiguous_rows_go_to_their_group_and_padding_is_zero,
    test_k_grouped_adds_each_group_to_c,
    test_k_grouped_flat_and_bf16_forms,
    test_masked_rows_are_left_alone,
    test_no_group_at_all_is_no_work,
    test_psum_groups_end_where_it_says,
    test_psum_groups_of_k_start_at_aligned_ends,
)
from tests.gemm.test_linear import (  # noqa: F401
    test_a_nan_stays_one_when_its_row_is_packed,
    test_a_nan_weight_reaches_its_column_and_no_other,
    test_a_part_of_a_weight_uses_the_scales_of_its_own_rows,
    test_any_negative_index_is_none_and_none_wraps_to_an_expert,
    test_fused_experts_agree_with_float64_in_top_k_order,
)
from tests.gemm.test_nothing import test_a_sum_over_nothing_is_zero  # noqa: F401
from tests.gemm.test_quantised import (  # noqa: F401
    test_quantised_activations_are_the_cast_ones,
    test_values_are_multiplied_by_the_scales_reciprocal_not_divided,
)
from tests.no_compiler import no_compiler
from whalefall import gemm
from whalefall.gemm import without_compiler
from whalefall.gemm.linear import quantize_rows


@pytest.fixture(autouse=True)
def told() -> Iterator[list[str]]:
    """No compiler; what was said of it."""
    with no_compiler() as words:
        yield words


@pytest.fixture
def level() -> str:
    """Numpy knows of none."""
    return "any"


@pytest.fixture(params=[1, 1 << 22], ids=["small tiles", "one tile"])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operands that become float64 128 rows at a time, and whole."""
    monkeypatch.setattr(without_compiler, "_TILE", request.param)


@pytest.mark.parametrize("recipe", [(1, 128, 128), (1, 1, 32), (128, 128, 128)])
@pytest.mark.usefixtures("tile")
def test_products_in_tiles(recipe: Any) -> None:
    rng = np.random.default_rng(0)
    a, exact_a = fp8(rng, (300, 200), (recipe[0], recipe[2]))
    b, exact_b = fp8(rng, (290, 200), (recipe[1], recipe[2]))
    c = rng.standard_normal((300, 290)).astype(np.float32) * 1000
    d = c.copy()
    gemm.fp8_gemm_nt(a, b, d, c=d, recipe=recipe)
    assert error(d, exact_a, exact_b, c) < 1e-6


def test_a_large_result_of_a_small_k_takes_no_memory_of_its_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(without_compiler, "_TILE", 1 << 16)
    a, d = np.ones((4096, 8), BF16), np.empty((4096, 4096), BF16)
    tracemalloc.start()
    try:
        gemm.bf16_gemm_nt(a, a, d)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (d == 8).all()
    assert most < 4 << 20  # 134 MiB where the result is one tile


@pytest.mark.usefixtures("tile")
def test_fp4_pairs_along_rows_in_tiles() -> None:
    rng = np.random.default_rng(1)
    a, exact_a = fp8(rng, (5, 160), (1, 32))
    packed, scale = gemm.per_token_cast_to_fp4(rng.standard_normal((300, 160)), False, 32)
    exact_b = gemm.cast_back_from_fp4(packed, scale, 32).astype(np.float64)
    turned = gemm.transpose_packed_fp4(packed)  # [K, N / 2]
    d = np.empty((5, 300), np.float32)
    gemm.fp8_fp4_gemm_nn(a, (turned, scale.T), d, recipe=(1, 1, 32))
    assert error(d, exact_a, exact_b) < 1e-6


@pytest.mark.parametrize("x_type", [np.float32, BF16])
@pytest.mark.usefixtures("tile")
def test_linears_in_tiles(x_type: Any) -> None:
    rng = np.random.default_rng(2)
    (weight, scale), exact = fp8(rng, (300, 200), (128, 128))
    x = rng.standard_normal((270, 200)).astype(x_type)
    y = gemm.fp8_linear(x, weight, scale, out_dtype="float32")
    assert error(y, x.astype(np.float64), exact) < 1e-6
    plain = bf16(rng, (300, 200))
    y = gemm.linear(x, plain, out=np.empty((270, 300), np.float32))
    assert error(y, x.astype(np.float64), plain.astype(np.float64)) < 1e-6


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.usefixtures("tile")
def test_experts_multiply_by_their_weights(quantize: bool) -> None:
    rng = np.random.default_rng(3)
    made = [[fp8(rng, s, (128, 128))[0] for s in ((140, 260), (140, 260), (260, 140))] * 1] * 2
    experts = [gemm.ExpertWeights(*(p[0] for p in e), *(p[1] for p in e)) for e in made]
    x = (rng.standard_normal((200, 260)) / 1e5).astype(np.float32)
    idx = rng.integers(-1, 2, (200, 2))
    weights = rng.random((200, 2)).astype(np.float32)
    given: dict[str, Any] = {"quantize_activations": quantize, "out_dtype": "float32"}
    plain = gemm.fused_experts(x, experts, idx, **given)
    scaled = gemm.fused_experts(x, experts, idx, topk_weights=weights, **given)
    assert np.allclose(scaled, plain * weights[:, :, None], rtol=1e-6)
    assert (plain[idx < 0] == 0).all() and plain[idx >= 0].any(axis=-1).all()
    one = gemm.fused_experts(x[:1], experts, np.array([[1]]), **given)
    gate, up = (
        gemm.fp8_linear(x[:1], w, s, quantize_activations=quantize)
        for w, s in ((experts[1].w1, experts[1].w1_scale), (experts[1].w3, experts[1].w3_scale))
    )
    middle = (gate / (1 + np.exp(-gate)) * up).astype(np.float32)
    want = gemm.fp8_linear(
        middle, experts[1].w2, experts[1].w2_scale, quantize_activations=quantize
    )
    # a hidden value at a rounding edge of E4M3 may fall on either side
    close = 1e-2 if quantize else 1e-6
    assert np.abs(one[0] - want).max() < close * np.abs(want).max()


def test_packed_rows_have_the_bytes_of_a_kernels() -> None:
    rng = np.random.default_rng(4)
    x = rng.standard_normal((7, 300)).astype(np.float32)
    x[2] = 0
    codes, scales = gemm.per_token_cast_to_fp8(np.pad(x, ((0, 0), (0, 84))), False)
    packed = quantize_rows(x)
    assert (packed[:, :384] == codes.view(np.uint8)).all()
    assert (packed[:, 384:] == scales.view(np.uint8)).all()


def test_it_is_said_that_numpy_computes(told: list[str]) -> None:
    x = np.ones((2, 128), np.float32)
    for _ in range(3):
        gemm.linear(x, x)
        gemm.bf16_gemm_nt(x.astype(BF16), x.astype(BF16), np.empty((2, 2), np.float32))
    assert told == ["no C++ compiler"] * 2  # once a unit; `jit.numpy_instead` warns once of all
