"""Products by AMX's tiles: what is particular to them, at level amx where the machine has it."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from tests.gemm.operands import BF16, error, fp8
from whalefall import gemm, jit
from whalefall.gemm import accumulation
from whalefall.gemm.linear import weight_struct
from whalefall.gemm.native_calls import library
from whalefall.gemm.structs import KINDS, Input, LinearCall, Output
from whalefall.jit import machine

pytestmark = pytest.mark.skipif(
    "amx" not in jit.levels() or not machine.tile_is_fast("amx"), reason="needs fast AMX tiles"
)
EXACT = 1e-6  # fp32 sums of 128 exact products and of some ten blocks
FORMS: list[Any] = ["few", "many"]


@pytest.fixture(autouse=True)
def at_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHALEFALL_ISA", "amx")


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (33, 31), (48, 640), (300, 1100)])
def test_bits_depend_on_neither_m_nor_form_nor_threads_nor_the_call(
    n: int, k: int, quantize: bool
) -> None:
    rng = np.random.default_rng(n)
    (weight, scale), exact = fp8(rng, (n, k), (128, 128))
    x = rng.standard_normal((530, k)).astype(BF16)
    options: dict[str, Any] = {"quantize_activations": quantize, "out_dtype": "float32"}
    whole = gemm.fp8_linear(x, weight, scale, "many", **options)
    if not quantize:
        assert error(whole, x.astype(np.float64), exact) < EXACT
    threads = jit.get_num_threads()
    for form in FORMS:
        for m in (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 48, 49, 100):
            y = gemm.fp8_linear(x[-m:], weight, scale, form, **options)
            assert y.tobytes() == whole[-m:].tobytes(), (form, m)
        try:
            for count in (1, 2, 3):
                jit.set_num_threads(count)
                again = gemm.fp8_linear(x[:77], weight, scale, form, **options)
                assert again.tobytes() == whole[:77].tobytes()
        finally:
            jit.set_num_threads(threads)


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_experts_rows_have_the_bits_of_their_own_product(form: Any, quantize: bool) -> None:
    """Selections of 0 to 40 rows an expert, gathered as tiles, against one row a call."""
    rng = np.random.default_rng(1)
    shapes = [(150, 330), (150, 330), (330, 150)]
    experts = []
    for _ in range(6):
        parts = [fp8(rng, shape, (128, 128))[0] for shape in shapes]
        experts.append(gemm.ExpertWeights(*(p[0] for p in parts), *(p[1] for p in parts)))
    x = (rng.standard_normal((60, 330)) * 0.02).astype(BF16)
    idx = rng.choice([-1, 0, 1, 1, 1, 2, 4, 5], (60, 2)).astype(np.int32)
    options: dict[str, Any] = {"quantize_activations": quantize, "out_dtype": "float32"}
    rows = gemm.fused_experts(x, experts, idx, form, **options)
    assert np.isfinite(rows).all() and rows[idx >= 0].any()
    for t in range(0, 60, 7):
        alone = gemm.fused_experts(x[t : t + 1], experts, idx[t : t + 1], form, **options)
        assert alone.tobytes() == rows[t : t + 1].tobytes()


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_w_have_the_scales_of_their_own_block_row(form: Any) -> None:
    """Scales that differ by powers of ten from block to block, in both directions."""
    rng = np.random.default_rng(2)
    (weight, scale), _ = fp8(rng, (300, 400), (128, 128))
    scale = (10.0 ** rng.permutation(scale.size).reshape(scale.shape) / 1e5).astype(np.float32)
    exact = weight.astype(np.float64) * np.repeat(np.repeat(scale, 128, 0)[:300], 128, 1)[:, :400]
    x = rng.standard_normal((5, 400)).astype(BF16)
    y = gemm.fp8_linear(x, weight, scale, form, out_dtype="float32")
    limit = np.abs(x.astype(np.float64)) @ np.abs(exact).T
    assert (np.abs(y - x.astype(np.float64) @ exact.T) / limit).max() < EXACT


@pytest.mark.parametrize("form", FORMS)
def test_a_part_of_a_weight_keeps_its_place_in_the_scales(form: Any) -> None:
    """Rows 100 to 230: the block row changes within a tile."""
    rng = np.random.default_rng(6)
    (weight, scale), _ = fp8(rng, (300, 200), (128, 128))
    scale[1] *= 8
    x = rng.standard_normal((3, 200)).astype(BF16)
    whole = gemm.fp8_linear(x, weight, scale, form, out_dtype="float32")
    y = np.zeros((3, 131), np.float32)
    call = LinearCall(
        weight_struct(np.ascontiguousarray(weight[100:231]), scale, "part", first_row=100),
        Input(x.ctypes.data, 200, KINDS["bfloat16"], 0),
        Output(y.ctypes.data, 131, None, None, 0, 0),
        3, FORMS.index(form), 0,
    )  # fmt: skip
    library().wf_linear(ctypes.addressof(call))
    assert (y == whole[:, 100:231]).all()


@pytest.mark.parametrize("form", FORMS)
def test_nan_and_infinity_stay_in_their_row_and_column(form: Any) -> None:
    rng = np.random.default_rng(3)
    (weight, scale), _ = fp8(rng, (50, 300), (128, 128))
    weight.view(np.uint8)[weight.view(np.uint8) & 127 == 0] = 1  # no zeros: infinity stays one
    weight.view(np.uint8)[40, 299] = 0x7F
    x = rng.standard_normal((37, 300)).astype(BF16)
    x[3, 17], x[20, 299] = np.nan, np.inf
    y = gemm.fp8_linear(x, weight, scale, form, out_dtype="float32")
    wanted = np.zeros(y.shape, bool)
    wanted[:, 40] = wanted[3] = wanted[20] = True
    assert (~np.isfinite(y) == wanted).all()
    assert np.isinf(np.delete(y[20], 40)).all()


@pytest.mark.parametrize("form", FORMS)
def test_subnormal_activations_count_as_zero(form: Any) -> None:
    (weight, scale), _ = fp8(np.random.default_rng(4), (40, 130), (128, 128))
    x = np.full((3, 130), 1e-39).astype(BF16)
    assert not gemm.fp8_linear(x, weight, scale, form, out_dtype="float32").any()


@pytest.mark.parametrize("m", [1, 16, 90])
@pytest.mark.parametrize("layout", ["nt", "nn", "tn", "tt"])
def test_blocks_of_32_have_scales_of_their_own(layout: str, m: int) -> None:
    rng = np.random.default_rng(m)
    (a, sa), exact_a = fp8(rng, (m, 700), (1, 32))
    (b, sb), exact_b = fp8(rng, (70, 700), (1, 32))
    left = (a.T.copy(), sa.T) if layout[0] == "t" else (a, sa)
    right = (b.T.copy(), sb.T) if layout[1] == "n" else (b, sb)
    d = np.empty((m, 70), np.float32)
    getattr(gemm, f"fp8_gemm_{layout}")(left, right, d, recipe=(1, 1, 32))
    assert error(d, exact_a, exact_b) < EXACT


def test_two_levels_lose_a_fifth_of_what_one_does() -> None:
    (point,) = accumulation.errors_against_k([16384])
    assert point.two_level <= point.one_level / 5


def test_a_product_of_many_waves_and_panels_is_exact() -> None:
    rng = np.random.default_rng(5)
    a, exact_a = fp8(rng, (1100, 1300), (1, 128))
    b, exact_b = fp8(rng, (600, 1300), (128, 128))
    d = np.empty((1100, 600), np.float32)
    gemm.fp8_gemm_nt(a, b, d)
    assert error(d, exact_a, exact_b) < EXACT
    part = np.empty((7, 600), np.float32)
    gemm.fp8_gemm_nt((a[0][1000:1007], a[1][1000:1007]), b, part)
    assert part.tobytes() == d[1000:1007].tobytes()
