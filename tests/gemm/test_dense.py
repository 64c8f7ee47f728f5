"""Dense products against float64: layouts, recipes, scale formats, accumulation, bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.gemm.operands import BF16, bf16, error, fp4, fp8
from whalefall import gemm, jit
from whalefall.errors import ConfigError, DtypeError, ShapeError
from whalefall.gemm.reference import calc_diff

EXACT = 1e-6  # of the sum of magnitudes: fp32 sums of 128 products and of a few blocks
SHAPES = [(1, 1, 1), (5, 70, 300), (130, 200, 1100)]
RECIPES = [(1, 128, 128), (1, 1, 128), (1, 1, 32)]


def given_as(pair: Any, swap: bool) -> Any:
    """A pair as [K, rows] where the layout asks for it."""
    return (pair[0].T.copy(), pair[1].T) if swap else pair


@pytest.mark.parametrize("layout", ["nt", "nn", "tn", "tt"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_fp8_layouts_and_recipes(
    level: str, layout: str, recipe: Any, m: int, n: int, k: int
) -> None:
    rng = np.random.default_rng(m)
    a, exact_a = fp8(rng, (m, k), (recipe[0], recipe[2]))
    b, exact_b = fp8(rng, (n, k), (recipe[1], recipe[2]))
    call = getattr(gemm, f"fp8_gemm_{layout}")
    left, right = given_as(a, layout[0] == "t"), given_as(b, layout[1] == "n")
    d = np.empty((m, n), np.float32)
    call(left, right, d, recipe=recipe)
    assert error(d, exact_a, exact_b) < EXACT
    narrow = np.empty((m, n), BF16)
    call(left, right, narrow, recipe=recipe)
    assert (narrow == d.astype(BF16)).all()


@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_accumulation_adds_once_in_fp32(level: str, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    a, _ = fp8(rng, (33, 257))
    b, _ = fp8(rng, (65, 257), (128, 128))
    product = np.empty((33, 65), np.float32)
    gemm.fp8_gemm_nt(a, b, product)
    c = (rng.standard_normal((33, 65)) * np.abs(product).max()).astype(dtype)
    wanted = (c.astype(np.float32) + product).astype(dtype)
    d = np.empty_like(c)
    gemm.fp8_gemm_nt(a, b, d, c=c)
    assert (d == wanted).all()
    gemm.fp8_gemm_nt(a, b, c, c=c)
    assert (c == wanted).all()
    wide = np.zeros((33, 100), dtype)
    gemm.fp8_gemm_nt(a, b, wide[:, 10:75], c=d)
    assert (wide[:, 10:75] == (d.astype(np.float32) + product).astype(dtype)).all()
    assert (wide[:, :10] == 0).all()
    assert (wide[:, 75:] == 0).all()
    apart = np.zeros((33, 90), dtype)[:, 5:70]
    apart[:] = d
    gemm.fp8_gemm_nt(a, b, c, c=apart)
    assert (c == wide[:, 10:75]).all()


@pytest.mark.parametrize("gran_k", [32, 128])
def test_packed_ue8m0_scales_on_either_side(level: str, gran_k: int) -> None:
    rng = np.random.default_rng(1)
    a, exact_a = fp8(rng, (40, 640), (1, gran_k), ue8m0=True)
    b, exact_b = fp8(rng, (50, 640), (1, gran_k), ue8m0=True)
    d = np.empty((40, 50), np.float32)
    gemm.fp8_gemm_nt(a, b, d, recipe=(1, 1, gran_k))
    assert error(d, exact_a, exact_b) < EXACT
    aligned = gemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(gemm.unpack_ue8m0_from_int(b[1]))[
        :, : b[1].shape[1]
    ]
    again = np.empty_like(d)
    gemm.fp8_gemm_nt(a, (b[0], aligned), again, recipe=(1, 1, gran_k))
    assert (again == d).all()


def test_fp4_against_fp8_with_scales_of_their_own(level: str) -> None:
    rng = np.random.default_rng(2)
    a, exact_a = fp8(rng, (20, 384), (1, 128))
    b, exact_b = fp4(rng, 30, 384, 32)
    d = np.empty((20, 30), np.float32)
    gemm.fp8_fp4_gemm_nt(a, b, d, recipe_a=(1, 128), recipe_b=(1, 32))
    assert error(d, exact_a, exact_b) < EXACT
    along_rows = (gemm.transpose_packed_fp4(b[0]).T, b[1])  # [N / 2, K], stride 1 along N
    again = np.empty_like(d)
    gemm.fp8_fp4_gemm_nt(a, along_rows, again, recipe_a=(1, 128), recipe_b=(1, 32))
    assert (again == d).all()


@pytest.mark.parametrize("layout", ["nt", "nn", "tn", "tt"])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_bf16_layouts(level: str, layout: str, m: int, n: int, k: int) -> None:
    rng = np.random.default_rng(3)
    a, b = bf16(rng, (m, k)), bf16(rng, (n, k))
    left = a.T.copy() if layout[0] == "t" else a
    right = b.T.copy() if layout[1] == "n" else b
    for name in (f"bf16_gemm_{layout}", f"cublaslt_gemm_{layout}"):
        d = np.empty((m, n), np.float32)
        getattr(gemm, name)(left, right, d)
        assert error(d, a.astype(np.float64), b.astype(np.float64)) < EXACT


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_and_neighbours_do_not_change_a_bit(level: str, threads: int) -> None:
    rng = np.random.default_rng(4)
    a, _ = fp8(rng, (70, 1300))
    b, _ = fp8(rng, (150, 1300), (128, 128))
    whole = np.empty((70, 150), np.float32)
    gemm.fp8_gemm_nt(a, b, whole)
    before = jit.get_num_threads()
    gemm.set_num_sms(threads)
    try:
        assert gemm.get_num_sms() == threads
        part = np.empty((7, 150), np.float32)
        gemm.fp8_gemm_nt((a[0][3:10], a[1][3:10]), b, part)
        assert (part == whole[3:10]).all()
    finally:
        jit.set_num_threads(before)


def test_nothing_to_do_leaves_or_zeroes(level: str) -> None:
    rng = np.random.default_rng(5)
    for m, n, k in [(0, 5, 7), (5, 0, 7), (3, 4, 0)]:
        a, _ = fp8(rng, (m, k))
        b, _ = fp8(rng, (n, k), (128, 128))
        d = np.full((m, n), 9, np.float32)
        gemm.fp8_gemm_nt(a, b, d)
        assert (d == 0).all()
        c = np.full((m, n), 2, np.float32)
        gemm.fp8_gemm_nt(a, b, d, c=c)
        assert (d == 2).all()


def test_nan_and_infinity_stay_where_they_are(level: str) -> None:
    rng = np.random.default_rng(6)
    a, _ = fp8(rng, (6, 200))
    b, _ = fp8(rng, (8, 200), (128, 128))
    b[0].view(np.uint8)[3, 150] = 0xFF
    a[0].view(np.uint8)[2, 199] = 0x7F
    d = np.empty((6, 8), np.float32)
    gemm.fp8_gemm_nt(a, b, d)
    wanted = np.zeros((6, 8), bool)
    wanted[:, 3] = wanted[2] = True
    assert (np.isnan(d) == wanted).all()


def test_skip_head_mid_leaves_the_gaps(level: str) -> None:
    rng = np.random.default_rng(7)
    a, _ = fp8(rng, (9, 256))
    b, _ = fp8(rng, (2 * 192, 256), (128, 128))
    plain = np.empty((9, 384), np.float32)
    gemm.fp8_gemm_nt(a, b, plain)
    d = np.full((9, 2 * 256), 5, np.float32)
    gemm.fp8_gemm_nt_skip_head_mid(a, b, d, (128, 64, 64))
    heads, wanted = d.reshape(9, 2, 256), plain.reshape(9, 2, 192)
    assert (heads[:, :, :128] == wanted[:, :, :128]).all()
    assert (heads[:, :, 128:192] == 5).all()
    assert (heads[:, :, 192:] == wanted[:, :, 128:]).all()


def test_torch_tensors_give_the_same_bits() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(8)
    a, _ = fp8(rng, (17, 300))
    b, _ = fp8(rng, (33, 300), (128, 128))
    d = np.empty((17, 33), BF16)
    gemm.fp8_gemm_nt(a, b, d)

    def as_torch(pair: Any) -> Any:
        values = torch.from_numpy(pair[0].view(np.uint8)).view(torch.float8_e4m3fn)
        return values, torch.from_numpy(pair[1])

    out = torch.empty(17, 33, dtype=torch.bfloat16)
    gemm.fp8_gemm_nt(as_torch(a), as_torch(b), out)
    assert (out.view(torch.int16).numpy() == d.view(np.int16)).all()
    assert float(calc_diff(out, d)) == 0.0


@pytest.mark.parametrize(
    ("change", "error_type", "words"),
    [
        (lambda v: {"d": v["d"][:, :-1]}, ShapeError, r"d has shape \[4, 4\], wanted \[4, 5\]"),
        (
            lambda v: {"d": np.zeros((4, 10), np.float32)[:, ::2]},
            ShapeError,
            "wanted 1 along the la",
        ),
        (lambda v: {"d": v["d"].astype(np.float64)}, DtypeError, "d is float64"),
        (lambda v: {"a": v["a"][0]}, DtypeError, "wanted a pair"),
        (lambda v: {"a": (v["a"][0], v["a"][1][:, :1])}, ShapeError, r"scale of a is \[4, 1\]"),
        (lambda v: {"a": (v["a"][0][:, ::2], v["a"][1])}, ShapeError, "strides"),
        (
            lambda v: {"b": (v["b"][0][:, :255], v["b"][1])},
            ShapeError,
            "b has K=255, wanted K=256 as",
        ),
        (lambda v: {"c": v["d"].astype(BF16)}, DtypeError, "c is bfloat16, wanted d's float32"),
        (lambda v: {"recipe": (1, 64, 128)}, ConfigError, "wanted rows 1 or 128"),
        (lambda v: {"recipe_a": (1, 128)}, ConfigError, "recipe_a and recipe_b together"),
        (lambda v: {"compiled_dims": "xy"}, ConfigError, "wanted letters of 'mnk'"),
        (lambda v: {"compiled_dims": None}, ConfigError, "compiled_dims=None, wanted letters"),
        (lambda v: {"recipe": 5}, ConfigError, "recipe=5, wanted"),
        (lambda v: {"recipe_a": 5, "recipe_b": 6}, ConfigError, "recipe_a=5, wanted"),
        (lambda v: {"a": (v["a"][0].astype(np.float32), v["a"][1])}, DtypeError, "a is float32"),
    ],
)
def test_refusals_say_what_is_wrong(change: Any, error_type: Any, words: str) -> None:
    rng = np.random.default_rng(9)
    a, b = fp8(rng, (4, 256))[0], fp8(rng, (5, 256), (128, 128))[0]
    values: dict[str, Any] = {"a": a, "b": b, "d": np.zeros((4, 5), np.float32)}
    with pytest.raises(error_type, match=words):
        gemm.fp8_gemm_nt(**(values | change(values)))


def test_turned_operands_are_refused_by_their_axes() -> None:
    one, two = np.zeros(8, BF16).astype("float8_e4m3fn"), np.ones((1, 8), np.float32)
    d = np.zeros((8, 8), np.float32)
    for pair, words in (
        ((one, two), r"a has shape \[8\], wanted 2 axes"),
        ((one[None], two[0]), r"scale of a has shape \[8\], wanted 2 axes"),
    ):
        with pytest.raises(ShapeError, match=rf"fp8_gemm_tn: {words}"):
            gemm.fp8_gemm_tn(pair, pair, d)
    with pytest.raises(DtypeError, match="fp8_gemm_tn: a: a NoneType, wanted a numpy array"):
        gemm.fp8_gemm_tn((None, two), (one, two), d)
    with pytest.raises(ShapeError, match=r"bf16_gemm_tn: a has shape \[8\], wanted 2 axes"):
        gemm.bf16_gemm_tn(np.zeros(8, BF16), np.zeros((1, 8), BF16), d)


@pytest.mark.parametrize("name", ["set_num_sms", "set_tc_util"])
@pytest.mark.parametrize("value", ["x", None, 1.5, 10**6, 2**32, -1])
def test_settings_take_whole_numbers_in_range(name: str, value: Any) -> None:
    before = gemm.get_num_sms()
    with pytest.raises(ConfigError, match=f"{name}: new_.* is {value!r}, wanted a whole number"):
        getattr(gemm, name)(value)
    assert gemm.get_num_sms() == before
    for other in ("set_mk_alignment_for_contiguous_layout", "set_block_size_multiple_of"):
        with pytest.raises(ConfigError, match=f"{other}: new_value is 'x', wanted a whole n"):
            getattr(gemm, other)("x")


@pytest.mark.parametrize("splits", [None, (1, 2), (8, "x", 0), 3])
def test_head_splits_are_three_whole_numbers(splits: Any) -> None:
    rng = np.random.default_rng(9)
    a, b = fp8(rng, (4, 128))[0], fp8(rng, (8, 128), (128, 128))[0]
    with pytest.raises(
        ConfigError, match=r"skip_head_mid: head_splits=.*wanted \(left, mid, right"
    ):
        gemm.fp8_gemm_nt_skip_head_mid(a, b, np.zeros((4, 10), np.float32), splits)


def test_partial_overlap_is_refused() -> None:
    rng = np.random.default_rng(10)
    b = fp8(rng, (8, 128), (128, 128))[0]
    memory = np.zeros(4096, np.float32)
    a_values = memory.view(np.uint8)[:1024].reshape(8, 128)
    a = (a_values.view(b[0].dtype), np.ones((8, 1), np.float32))
    with pytest.raises(ShapeError, match="overlaps an input"):
        gemm.fp8_gemm_nt(a, b, memory[200:264].reshape(8, 8))
    d = memory[1000:1064].reshape(8, 8)
    with pytest.raises(ShapeError, match="overlaps an input"):
        gemm.fp8_gemm_nt(a, b, d, c=memory[1008:1072].reshape(8, 8))
    with pytest.raises(ShapeError, match=r"skip_head_mid: d .* overlaps an input"):
        gemm.fp8_gemm_nt_skip_head_mid(a, b, memory[200:296].reshape(8, 12), (4, 4, 4))
    packed = memory.view(np.int32)[2000:2008].reshape(8, 1)  # of UE8M0 scales, which are unpacked
    packed[:] = 0x7F7F7F7F
    a, b = ((pair[0], scale) for pair, scale in ((a, packed), (fp8(rng, (8, 128))[0], packed + 0)))
    with pytest.raises(ShapeError, match=r"fp8_gemm_nt: d .* overlaps an input"):
        gemm.fp8_gemm_nt(a, b, memory[2004:2068].reshape(8, 8))
    gemm.fp8_gemm_nt(a, b, memory[2008:2072].reshape(8, 8))


def test_columns_of_one_buffer_lie_apart() -> None:
    rng = np.random.default_rng(11)
    b = bf16(rng, (24, 64))
    fused = bf16(rng, (9, 64 + 24 + 24))  # a, then c, then d, in each row
    before = fused.copy()
    a, c, d = fused[:, :64], fused[:, 64:88], fused[:, 88:]
    want = np.empty((9, 24), fused.dtype)
    gemm.bf16_gemm_nt(a.copy(), b, want, c=c.copy())
    gemm.bf16_gemm_nt(a, b, d, c=c)
    assert (d == want).all()
    assert (fused[:, :88] == before[:, :88]).all()
    for wrong in (fused[:, 63:87], fused[:, 87:111]):  # one column of a; all but one of c
        with pytest.raises(ShapeError, match="overlaps an input"):
            gemm.bf16_gemm_nt(a, b, wrong, c=c)
    rows = np.zeros((18, 64), fused.dtype)
    gemm.bf16_gemm_nt(rows[::2], b, rows[1::2, :24])
    with pytest.raises(ShapeError, match="overlaps an input"):
        gemm.bf16_gemm_nt(rows[::2], b, rows[:9, :24])


@pytest.mark.parametrize("name", ["bf16_gemm_nt", "fp8_gemm_nt"])
def test_a_result_is_writeable_and_each_element_its_own(name: str) -> None:
    rng = np.random.default_rng(12)
    a, b = fp8(rng, (8, 128))[0], fp8(rng, (8, 128), (128, 128))[0]
    if name == "bf16_gemm_nt":
        a, b = (pair[0].astype(np.float32).astype(BF16) for pair in (a, b))
    call, d = getattr(gemm, name), np.zeros((8, 8), np.float32)
    call(a, b, d)
    d.flags.writeable = False  # a remembered call is refused, too
    immutable = np.frombuffer(bytes(256), np.float32).reshape(8, 8)
    for wrong in (d, immutable):
        before = wrong.copy()
        with pytest.raises(ShapeError, match=f"{name}: d is read-only"):
            call(a, b, wrong)
        assert (wrong == before).all()
    for strides in ((0, 4), (28, 4)):
        shared = np.lib.stride_tricks.as_strided(np.zeros(64, np.float32), (8, 8), strides)
        with pytest.raises(ShapeError, match=rf"{name}: d has shape .*: elements share memory"):
            call(a, b, shared)
    call(
        a,
        b,
        np.zeros((8, 20), np.float32)[:, 3:11],
        c=np.frombuffer(bytes(800), np.float32)[:160].reshape(8, 20)[:, :8],
    )  # gaps are fine, and what is added may be read-only


def test_an_emulated_single_level_is_five_times_worse() -> None:
    from whalefall.gemm.accumulation import errors_against_k

    (point,) = errors_against_k([16384], rows=8)
    assert point.two_level * 5 <= point.one_level


@pytest.mark.parametrize("layout", ["nt", "nn", "tn", "tt"])
def test_cublaslt_takes_codes_without_scales(level: str, layout: str) -> None:
    rng = np.random.default_rng(3)
    (a, _), _ = fp8(rng, (37, 300), (1, 128))
    (b, _), _ = fp8(rng, (70, 300), (1, 128))
    left = a.T.copy() if layout[0] == "t" else a
    right = b.T.copy() if layout[1] == "n" else b
    d = np.empty((37, 70), np.float32)
    getattr(gemm, f"cublaslt_gemm_{layout}")(left, right, d)
    assert error(d, a.astype(np.float64), b.astype(np.float64)) < 2e-6
    with pytest.raises(DtypeError, match="wanted one dtype"):
        getattr(gemm, f"cublaslt_gemm_{layout}")(left, right.astype("bfloat16"), d)
