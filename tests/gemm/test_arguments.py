"""Casts and layouts: nothing to cast is no error; what makes no sense is refused in one line."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.gemm.operands import E4M3
from whalefall import gemm
from whalefall.errors import WhalefallError

X, SF = np.ones((4, 256), np.float32), np.ones((4, 2), np.float32)
FP4, FP4_SF = gemm.per_token_cast_to_fp4(X, True)
K_GROUPED = "get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor"
KS = np.array([128, 128], np.int32)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize(
    ("cast", "shape", "values", "scales"),
    [
        ("per_token_cast_to_fp8", (0, 256), (0, 256), (0, 2)),
        ("per_token_cast_to_fp8", (3, 0), (3, 0), (3, 0)),
        ("per_token_cast_to_fp4", (0, 256), (0, 128), (0, 2)),
        ("per_token_cast_to_fp4", (3, 0), (3, 0), (3, 0)),
        ("per_channel_cast_to_fp8", (0, 5), (0, 5), (0, 5)),
        ("per_channel_cast_to_fp8", (256, 0), (256, 0), (2, 0)),
        ("per_block_cast_to_fp8", (0, 256), (0, 256), (0, 2)),
        ("per_block_cast_to_fp8", (200, 0), (200, 0), (2, 0)),
    ],
)
def test_nothing_becomes_nothing_of_the_right_shape(
    kind: str, cast: str, shape: tuple[int, int], values: tuple[int, int], scales: tuple[int, int]
) -> None:
    x: Any = np.zeros(shape, np.float32) if kind == "numpy" else torch.zeros(shape)
    found = getattr(gemm, cast)(x, False)
    assert [tuple(each.shape) for each in found] == [values, scales]
    assert all(type(each) is type(x) for each in found)
    if "per_token" in cast:
        packed = getattr(gemm, cast)(x, True, 128, shape[1] == 0)[1]
        assert tuple(packed.shape) == scales


def test_custom_dims_may_be_empty() -> None:
    values, scales = gemm.per_custom_dims_cast_to_fp8(np.zeros((3, 4, 0), np.float32), (0,), False)
    assert (values.shape, scales.tolist()) == ((3, 4, 0), [np.float32(1e-4) / np.float32(448)] * 3)
    assert gemm.per_custom_dims_cast_to_fp8(torch.zeros(0, 4), (0,), True)[1].shape == (0,)


def test_a_step_beyond_the_row_is_one_block() -> None:
    x = np.random.default_rng(0).standard_normal((3, 200)).astype(np.float32)
    for cast in (
        gemm.per_token_cast_to_fp8,
        gemm.per_token_cast_to_fp4,
        gemm.per_block_cast_to_fp8,
    ):
        wide, near = cast(x, True, 1 << 62), cast(x, True, 256)
        assert all(
            (a.view(np.uint8) == b.view(np.uint8)).all() for a, b in zip(wide, near, strict=True)
        )
    fp4 = gemm.per_token_cast_to_fp4(x, True, 256)
    assert (gemm.cast_back_from_fp4(*fp4, 1 << 62) == gemm.cast_back_from_fp4(*fp4, 256)).all()


STEPS = [0, -5, "x", None, 1.5, float("nan"), np.zeros(3), torch.zeros(2), []]
WRONG: list[tuple[str, tuple[Any, ...], str]] = [
    *(("per_token_cast_to_fp8", (X, True, step), "gran_k") for step in STEPS),
    *(("per_token_cast_to_fp4", (X, True, step), "gran_k") for step in STEPS),
    *(("per_channel_cast_to_fp8", (X, True, step), "gran_k") for step in STEPS),
    *(("per_block_cast_to_fp8", (X, True, step), "gran_k") for step in STEPS),
    *(("cast_back_from_fp4", (FP4, FP4_SF, step), "gran_k") for step in STEPS),
    *((K_GROUPED, (SF, KS, [128], step, 128), "gran_k") for step in STEPS),
    *((K_GROUPED, (SF, KS, [128], 128, step), "k_alignment") for step in STEPS),
    *(("transform_sf_into_required_layout", (SF, 4, 256, (1, s)), "recipe[1]") for s in STEPS),
    *(("transform_sf_into_required_layout", (SF, 4, 256, (s, 128)), "recipe[0]") for s in STEPS),
    *(("ceil_div", (5, step), "y") for step in STEPS),
    *(("align", (5, step), "y") for step in STEPS),
    *(("get_tma_aligned_size", (5, step), "element_size") for step in STEPS),
    ("ceil_div", ("x", 2), "x"),
    ("align", ((1, 2), 2), "x"),
    ("get_tma_aligned_size", (5, 3), "element_size"),
    ("get_tma_aligned_size", (-1, 4), "x"),
    ("per_token_cast_to_fp8", (X, np.zeros(2)), "use_ue8m0"),
    ("per_token_cast_to_fp8", (X, True, 128, "x"), "use_packed_ue8m0"),
    ("per_token_cast_to_fp8", (X, True, 128, True), "scales [4, 2]"),
    ("per_custom_dims_cast_to_fp8", (X, 3, True), "dims"),
    ("per_custom_dims_cast_to_fp8", (X, ["a"], True), "dims[0]"),
    ("per_custom_dims_cast_to_fp8", (X, (2,), True), "dims"),
    ("pack_ue8m0_to_int", (np.ones(3, np.float32),), "scales [3]"),
    ("pack_ue8m0_to_int", (np.full(4, 3, np.float32),), "scale 3.0"),
    ("unpack_ue8m0_from_int", (None,), "packed_sf"),
    ("unpack_ue8m0_from_int", (np.ones(4),), "float64"),
    ("cast_back_from_fp4", (FP4, None), "sf"),
    ("cast_back_from_fp4", (FP4, np.float32(1)), "sf"),
    ("cast_back_from_fp4", (FP4, np.ones((), np.float32)), "scales []"),
    ("cast_back_from_fp4", (FP4, FP4_SF[..., None]), "scales [4, 2, 1]"),
    ("get_mn_major_tma_aligned_tensor", (np.ones((), np.float32),), "sf"),
    ("get_mn_major_tma_aligned_packed_ue8m0_tensor", (np.ones((), np.float32),), "sf"),
    ("get_mn_major_tma_aligned_packed_ue8m0_tensor", (SF * 3,), "scale 3.0"),
    (
        "get_mn_major_tma_aligned_packed_ue8m0_tensor",
        (SF, np.ones((2, 2), np.int32)),
        "psum_layout",
    ),
    ("get_mn_major_tma_aligned_packed_ue8m0_tensor", (SF, 3), "psum_layout"),
    (K_GROUPED, (np.ones((), np.float32), KS, [128], 128, 128), "sf"),
    (K_GROUPED, (SF[..., None], KS, [128], 128, 128), "sf"),
    (K_GROUPED, (SF, KS, [128, -128], 128, 128), "ks_cpu[1]"),
    (K_GROUPED, (SF, KS, 3, 128, 128), "ks_cpu"),
    (K_GROUPED, (SF, KS, [1024], 128, 128), "4 rows"),
    (K_GROUPED, (SF, None, None, 128, 128, True), "grouped_layout"),
    (K_GROUPED, (SF, np.ones(2), None, 128, 128, True), "grouped_layout"),
    ("transform_sf_into_required_layout", (SF, "x", 256, (1, 128)), "mn"),
    ("transform_sf_into_required_layout", (SF, 4, -1, (1, 128)), "k is"),
    ("transform_sf_into_required_layout", (SF, 4, 256, 1j), "recipe"),
    ("transform_sf_into_required_layout", (SF, 4, 256, (1, 1, 128)), "recipe"),
    ("transform_sf_into_required_layout", (SF, 4, 256, (1, 1, 128), None, "x"), "is_sfa"),
    ("transform_sf_into_required_layout", (SF, 4, 256, (1, 128), "x"), "num_groups"),
    ("transform_sf_into_required_layout", (SF * 3, 4, 64, (1, 32)), "scale 3.0"),
    ("calc_diff", (None, SF), "x"),
    ("calc_diff", (SF, SF[:, :1].repeat(3, 1)), "y [4, 3]"),
]


CODES, D = X.astype(E4M3), np.zeros((4, 4), np.float32)
PAIR, COMPLEX = (CODES, SF), torch.ones(4, 2, dtype=torch.complex64)
NO_SCALES = (CODES, [1.0])
K_PAIR, K_D = (
    (np.ones((128, 4), E4M3), np.ones((1, 4), np.float32)),
    np.zeros((1, 4, 4), np.float32),
)
FLAT = (np.ones(512, E4M3), np.ones((4, 1), np.float32))
K_TN, K_NT = "k_grouped_fp8_gemm_tn_contiguous", "k_grouped_fp8_gemm_nt_contiguous"
IDX = np.zeros((4, 1), np.int32)
WRONG += [
    ("fp8_gemm_nt", (PAIR, NO_SCALES, D), "scale of b"),
    ("fp8_gemm_nt", (PAIR, (CODES, COMPLEX), D), "scale of b: dtype torch.complex64"),
    ("fp8_gemm_nt_skip_head_mid", (PAIR, NO_SCALES, D, (1, 1, 1)), "scale of b"),
    ("m_grouped_fp8_gemm_nt_contiguous", (PAIR, NO_SCALES, D, KS), "scale of b"),
    (K_TN, ((K_PAIR[0], [1]), K_PAIR, K_D, [128], None), "scale of a"),
    (K_TN, (K_PAIR, (K_PAIR[0], SF[0].astype(complex)), K_D, [128], None), "scale of b: dtype"),
    (K_NT, ((FLAT[0], [1]), FLAT, K_D, [128], None), "scale of a"),
    ("fused_experts", (X, [gemm.ExpertWeights(X, [1], X)], IDX), "expert 0: w3"),
    ("fused_experts", (X, [gemm.ExpertWeights(X, X, X)], IDX), "expert 0: w1, w3, w2"),
    ("linear", (X, COMPLEX), "weight: dtype torch.complex64"),
]


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8"])
@pytest.mark.parametrize("of", [np.array, torch.tensor])
def test_an_element_of_an_array_is_a_whole_number(of: Any, dtype: str) -> None:
    """The original's scripts call `align(psum_m[i], get_mk_alignment_for_contiguous_layout())`."""
    ends = of([130, 3], dtype=getattr(torch if of is torch.tensor else np, dtype))
    bare = ends[0] if of is torch.tensor else ends[0:1].reshape(())
    assert (gemm.align(bare, 128), gemm.ceil_div(bare, 128)) == (256, 2)
    assert (gemm.align(ends[1], bare), gemm.ceil_div(300, bare)) == (130, 3)
    assert gemm.get_tma_aligned_size(bare, ends[1] + 1) == 132
    assert len(ends[gemm.align(ends[1], 1) - 2 : ends[0]]) == 1
    ends[1] = (0 if len(ends) == 1 else gemm.align(ends[0], 4)) + ends[1]
    assert ends.tolist() == [130, 135]


@pytest.mark.parametrize("wrong", [1.5, True, float("nan")])
def test_an_element_that_is_no_whole_number_is_refused(wrong: Any) -> None:
    for value in (np.array(wrong), torch.tensor(wrong), torch.tensor(1, device="meta")):
        for call in (gemm.align, gemm.ceil_div):
            with pytest.raises(WhalefallError, match=r": x is .*, wanted a whole number"):
                call(value, 4)
            with pytest.raises(WhalefallError, match=r": y is .*, wanted a whole number"):
                call(4, value)


@pytest.mark.parametrize(("name", "args", "part"), WRONG)
def test_what_makes_no_sense_is_refused_with_function_and_argument(
    name: str, args: tuple[Any, ...], part: str
) -> None:
    with pytest.raises(WhalefallError) as refusal:
        getattr(gemm, name)(*args)
    text = str(refusal.value)
    assert text.startswith(f"{name}: ")
    assert part in text
    assert "wanted" in text
    assert text.partition("; ")[2], text
    assert "\n" not in text
