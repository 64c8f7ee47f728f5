"""Casts against their definition, computed another way: with ml_dtypes, or element by element."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whalefall import dtypes, gemm
from whalefall.errors import DtypeError, ShapeError

E4M3, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16


def by_hand(block: Any, use_ue8m0: bool) -> tuple[Any, np.float32]:
    """One block the slow way: the page's words, one value at a time."""
    largest = np.float32(max([1e-4, *np.abs(block).ravel().tolist()]))
    scale = np.float32(largest / np.float32(448))
    if use_ue8m0:
        mantissa, exponent = np.frexp(scale)
        scale = np.float32(2.0 ** (exponent - (mantissa == 0.5)))
    inverse = np.float32(1) / scale
    values = np.array([np.float32(v * inverse) for v in block.ravel()], np.float32).astype(E4M3)
    return values.reshape(block.shape), scale


@pytest.mark.parametrize("use_ue8m0", [False, True])
@pytest.mark.parametrize("gran_k", [32, 128])
@pytest.mark.parametrize("shape", [(1, 1), (3, 130), (5, 512)])
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_per_token_casts_are_the_definition_bit_for_bit(
    use_ue8m0: bool, gran_k: int, shape: tuple[int, int], dtype: Any
) -> None:
    x = (np.random.default_rng(0).standard_normal(shape) * 10).astype(dtype)
    x[0, 0] = 0
    values, scales = gemm.per_token_cast_to_fp8(x, use_ue8m0, gran_k)
    assert scales.shape == (shape[0], -(-shape[1] // gran_k))
    for i in range(shape[0]):
        for j in range(scales.shape[1]):
            part = slice(j * gran_k, (j + 1) * gran_k)
            wanted, scale = by_hand(x[i, part].astype(np.float32), use_ue8m0)
            assert scales[i, j] == scale
            assert (values[i, part].view(np.uint8) == wanted.view(np.uint8)).all()


def test_block_channel_and_custom_casts_agree_with_per_token_ones() -> None:
    x = np.random.default_rng(1).standard_normal((256, 200)).astype(np.float32)
    values, scales = gemm.per_block_cast_to_fp8(x, False)
    assert scales.shape == (2, 2)
    wanted, scale = by_hand(x[128:, 128:], False)
    assert scales[1, 1] == scale
    assert (values[128:, 128:].view(np.uint8) == wanted.view(np.uint8)).all()
    values, scales = gemm.per_channel_cast_to_fp8(x, True)
    turned, turned_scales = gemm.per_token_cast_to_fp8(x.T.copy(), True)
    assert (values.view(np.uint8) == turned.T.view(np.uint8)).all()
    assert (scales == turned_scales.T).all()
    cube = x.reshape(4, 64, 200)
    values, scales = gemm.per_custom_dims_cast_to_fp8(cube, (0,), False)
    assert scales.shape == (4,)
    assert scales[2] == by_hand(cube[2], False)[1]


def test_packed_scales_hold_four_exponents_lowest_first() -> None:
    scales = np.array([[2.0**-126, 1.0, 2.0, 2.0**127]], np.float32)
    packed = gemm.pack_ue8m0_to_int(scales)
    assert packed.view(np.uint8).tolist() == [[1, 127, 128, 254]]
    assert (gemm.unpack_ue8m0_from_int(packed) == scales).all()
    with pytest.raises(ShapeError, match=r"scale 3\.0 is no power of two"):
        gemm.pack_ue8m0_to_int(np.array([[1, 1, 1, 3.0]], np.float32))
    with pytest.raises(ShapeError, match="multiple of 4"):
        gemm.pack_ue8m0_to_int(np.ones((2, 3), np.float32))


@given(st.floats(width=32, allow_nan=False))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_ceil_to_ue8m0_is_the_next_power_of_two(value: float) -> None:
    power = float(gemm.ceil_to_ue8m0(np.array([value], np.float32))[0])
    size = abs(value)
    assert np.frexp(power)[0] == 0.5
    if np.isinf(size) or size > 2.0**127:
        assert power == 2.0**127
    else:
        assert power >= size
        assert power / 2 < size or power == 2.0**-126


def test_fp4_rounds_ties_to_zero_and_comes_back() -> None:
    ties = np.array([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]], np.float32)
    both = np.concatenate([ties, -ties], axis=1)
    packed, scales = gemm.per_token_cast_to_fp4(both, False, 32)
    assert scales[0, 0] == 1
    back = gemm.cast_back_from_fp4(packed, scales, 32)
    wanted = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert back[0].tolist() == wanted + [-v for v in wanted]
    assert (packed.view(np.uint8)[0, 4] & 15) == 0  # no negative zero
    x = np.random.default_rng(2).standard_normal((4, 96)).astype(np.float32)
    packed, packed_scales = gemm.per_token_cast_to_fp4(x, True, 32, use_packed_ue8m0=True)
    plain, plain_scales = gemm.per_token_cast_to_fp4(x, True, 32)
    assert (gemm.unpack_ue8m0_from_int(packed_scales)[:, 3] == 1).all()
    assert (
        gemm.cast_back_from_fp4(packed, packed_scales, 32, True)
        == gemm.cast_back_from_fp4(plain, plain_scales, 32)
    ).all()
    assert (gemm.transpose_packed_fp4(gemm.transpose_packed_fp4(plain)) == plain).all()


@pytest.mark.parametrize("use_ue8m0", [False, True])
def test_nan_stays_nan_in_its_block_only(use_ue8m0: bool) -> None:
    x = np.ones((2, 256), np.float32)
    x[1, 130] = np.nan
    values, scales = gemm.per_token_cast_to_fp8(x, use_ue8m0)
    assert np.isnan(scales).tolist() == [[False, False], [False, True]]
    back = values.astype(np.float32) * np.repeat(scales, 128, 1)
    assert np.isnan(back[1, 130])
    assert (back[0] == 1).all()
    packed, scales = gemm.per_token_cast_to_fp4(x, use_ue8m0)
    assert np.isnan(gemm.cast_back_from_fp4(packed, scales)[1, 130])


def test_e4m3_and_e2m1_tables_are_the_formats() -> None:
    codes = np.arange(256, dtype=np.uint8)
    wanted = codes.view(E4M3).astype(np.float32)
    assert np.array_equal(dtypes.e4m3_to_float(codes), wanted, equal_nan=True)
    assert dtypes.e2m1_to_float(np.arange(8, dtype=np.uint8)).tolist() == [
        0, 0.5, 1, 1.5, 2, 3, 4, 6
    ]  # fmt: skip


@pytest.mark.parametrize(("mn", "k"), [(1, 1), (5, 7), (4096, 56), (4097, 57)])
def test_scale_layouts_have_the_original_shapes_and_strides(mn: int, k: int) -> None:
    sf = np.exp2(np.random.default_rng(3).integers(-5, 5, (mn, k))).astype(np.float32)
    pitch = -(-mn // 4) * 4
    major = gemm.get_mn_major_tma_aligned_tensor(sf)
    assert (major == sf).all()
    assert major.strides == (4, 4 * pitch)
    assert gemm.get_mn_major_tma_aligned_tensor(major) is major or mn == 1
    packed = gemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(sf)
    assert packed.shape == (mn, -(-k // 4))
    assert packed.strides == (4, 4 * pitch)
    assert (gemm.unpack_ue8m0_from_int(packed)[:, :k] == sf).all()
    assert gemm.transform_sf_into_required_layout(
        sf, mn, k * 128, (1, 128, 128), is_sfa=True
    ).strides == (4, 4 * pitch)
    with pytest.raises(ShapeError, match=r"wanted float32 \[\d+, \d+\]"):
        gemm.transform_sf_into_required_layout(sf, mn + 1, k * 128, (1, 128))


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("use_ue8m0", [False, True])
def test_values_and_scales_are_row_major_whatever_the_strides_of_x(
    kind: str, use_ue8m0: bool
) -> None:
    plain = np.random.default_rng(4).standard_normal((512, 1024)).astype(np.float32)
    turned: Any = np.asfortranarray(plain)
    if kind == "torch":
        torch = pytest.importorskip("torch")
        plain, turned = torch.from_numpy(plain), torch.from_numpy(plain.T.copy()).t()
    for name, rest in (
        ("per_token_cast_to_fp8", (use_ue8m0,)),
        ("per_token_cast_to_fp8", (use_ue8m0, 128, use_ue8m0)),
        ("per_channel_cast_to_fp8", (use_ue8m0,)),
        ("per_block_cast_to_fp8", (use_ue8m0,)),
        ("per_token_cast_to_fp4", (use_ue8m0,)),
        ("per_token_cast_to_fp4", (use_ue8m0, 128, use_ue8m0)),
    ):
        wanted, found = (getattr(gemm, name)(x, *rest) for x in (plain, turned))
        for of_plain, of_turned in zip(wanted, found, strict=True):
            assert dtypes.view(of_turned).contiguous, (name, dtypes.view(of_turned))
            assert dtypes.as_numpy(of_turned).tobytes() == dtypes.as_numpy(of_plain).tobytes()
    cubes = [x.reshape(8, 64, 1024) for x in (plain, turned)]
    for dims in ((0,), (1, 2), (0, 2), (0, 1, 2)):
        found = gemm.per_custom_dims_cast_to_fp8(cubes[1], dims, use_ue8m0)
        wanted = gemm.per_custom_dims_cast_to_fp8(cubes[0], dims, use_ue8m0)
        assert dtypes.view(found[1]).contiguous, dims
        assert dtypes.as_numpy(found[1]).tobytes() == dtypes.as_numpy(wanted[1]).tobytes()
    assert gemm.per_custom_dims_cast_to_fp8(plain, (), use_ue8m0)[1].shape == ()


def test_a_cast_of_a_turned_weight_is_a_weight() -> None:
    torch = pytest.importorskip("torch")
    plain = torch.randn(256, 512).t()
    x = torch.randn(3, 256)
    y = gemm.fp8_linear(x, *gemm.per_block_cast_to_fp8(plain, False))
    wanted = gemm.fp8_linear(x, *gemm.per_block_cast_to_fp8(plain.contiguous(), False))
    assert torch.equal(y, wanted)


def test_a_recipe_of_three_gives_b_its_own_rows() -> None:
    call, recipe = gemm.transform_sf_into_required_layout, (1, 128, 128)
    of_a, of_b = np.ones((256, 3), np.float32), np.ones((2, 3), np.float32)
    assert call(of_b, 256, 384, recipe, is_sfa=False) is of_b
    assert call(of_a, 256, 384, recipe, is_sfa=True).strides == (4, 1024)
    for scales, is_sfa in ((of_a, False), (of_b, True)):
        with pytest.raises(ShapeError, match=r"sf is float32 \[\d+, 3\], wanted float32"):
            call(scales, 256, 384, recipe, is_sfa=is_sfa)


def test_torch_tensors_get_torch_results() -> None:
    torch = pytest.importorskip("torch")
    x = torch.randn(7, 300, dtype=torch.bfloat16)
    values, scales = gemm.per_token_cast_to_fp8(x, False)
    assert values.dtype == torch.float8_e4m3fn
    wanted, wanted_scales = gemm.per_token_cast_to_fp8(x.float().numpy(), False)
    assert (values.view(torch.uint8).numpy() == wanted.view(np.uint8)).all()
    assert (scales.numpy() == wanted_scales).all()
    packed = gemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(torch.ones(5, 6))
    assert packed.stride() == (1, 8)
    assert packed.dtype == torch.int32


def test_bad_input_is_named() -> None:
    with pytest.raises(ShapeError, match=r"x has shape \[3\], wanted 2 axes"):
        gemm.per_token_cast_to_fp8(np.zeros(3, np.float32), False)
    with pytest.raises(DtypeError, match="x is int32"):
        gemm.per_token_cast_to_fp8(np.zeros((3, 3), np.int32), False)
    with pytest.raises(ShapeError, match="130 rows, wanted a multiple of 128"):
        gemm.per_channel_cast_to_fp8(np.zeros((130, 3), np.float32), False)
    with pytest.raises(ShapeError, match="3 columns, wanted an even number"):
        gemm.per_token_cast_to_fp4(np.zeros((2, 3), np.float32), False)
    with pytest.raises(ShapeError, match="dims=\\(2,\\), wanted axes 0 to 1"):
        gemm.per_custom_dims_cast_to_fp8(np.zeros((2, 3), np.float32), (2,), False)
