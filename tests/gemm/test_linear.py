"""Linears and fused experts against float64, at every ISA level; rows bit for bit in M."""

from __future__ import annotations

import ctypes
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from whalefall import gemm, jit
from whalefall.errors import ConfigError, DtypeError, ShapeError, UnsupportedError
from whalefall.gemm.linear import expert_structs, packed_width, quantize_rows, weight_struct
from whalefall.gemm.native_calls import library
from whalefall.gemm.structs import ACTIVATIONS, KINDS, Input, LinearCall, Output
from whalefall.jit import machine

E4M3, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
SHAPES = [(1, 1), (5, 3), (64, 128), (129, 257), (200, 1200), (300, 512)]
ROWS = [0, 1, 2, 3, 4, 5, 7, 8, 33, 70]


def fp8_weight(rng: np.random.Generator, n: int, k: int) -> tuple[Any, Any, Any]:
    """Every code but NaN, block scales, and the product of both in float64."""
    codes = rng.integers(0, 256, (n, k)).astype(np.uint8)
    codes[(codes & 127) == 127] = 1
    weight = codes.view(E4M3)
    scale = (rng.random((-(-n // 128), -(-k // 128))) + 0.5).astype(np.float32) * 0.01
    spread = np.repeat(np.repeat(scale.astype(np.float64), 128, 0), 128, 1)[:n, :k]
    return weight, scale, weight.astype(np.float64) * spread


def error(y: Any, x: Any, w: Any) -> float:
    """Largest error over the largest sum of magnitudes: what summation order can account for."""
    x64, w64 = np.asarray(x, np.float64), np.asarray(w, np.float64)
    if y.size == 0:
        return 0.0
    return float(
        np.abs(np.asarray(y, np.float64) - x64 @ w64.T).max() / (np.abs(x64) @ np.abs(w64).T).max()
    )


@pytest.mark.parametrize("form", ["few", "many"])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_linears_agree_with_float64_and_rows_do_not_depend_on_m(
    level: str, form: Any, n: int, k: int
) -> None:
    rng = np.random.default_rng(n)
    weight, scale, exact = fp8_weight(rng, n, k)
    for m in ROWS:
        x = rng.standard_normal((m, k)).astype(np.float32)
        y = gemm.fp8_linear(x, weight, scale, form)
        assert error(y, x, exact) < 1e-6  # 24-bit sums of at most 128 and of 10
        for i in range(m):
            assert (gemm.fp8_linear(x[i : i + 1], weight, scale, form) == y[i]).all()
        for dtype in (np.float32, BF16):
            plain = exact.astype(dtype)
            assert error(gemm.linear(x, plain, form), x, plain) < 1e-6
        x16 = x.astype(BF16)
        wide = gemm.fp8_linear(x16, weight, scale, form, out_dtype="float32")
        assert error(wide, x16, exact) < 1e-6  # bf16 times E4M3 is exact, by dot or by FMA
        for i in range(m):
            row = gemm.fp8_linear(x16[i : i + 1], weight, scale, form, out_dtype="float32")
            assert (row == wide[i]).all()
        y16 = gemm.fp8_linear(x16, weight, scale, form)
        assert y16.dtype == BF16
        assert (y16 == wide.astype(BF16)).all()
        half = exact.astype(BF16)
        assert error(gemm.linear(x16, half, form, out_dtype="float32"), x16, half) < 1e-6


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 9, 64])
@pytest.mark.parametrize("form", ["few", "many"])
def test_every_code_counts_as_its_value_in_every_place(level: str, form: Any, m: int) -> None:
    places = np.arange(256)
    codes = ((places + 11 * places[:20, None]) % 256).astype(np.uint8)  # [N, K], turned by row
    codes[(codes & 127) == 127] = 0
    weight, scale = codes.view(E4M3), np.full((1, 2), 0.5, np.float32)
    x = np.eye(256, dtype=np.float32)  # row k picks column k of W: subnormal codes, too, are exact
    for first in range(0, 256, m):
        y = gemm.fp8_linear(x[first : first + m], weight, scale, form)
        assert (y == 0.5 * weight.T[first : first + m].astype(np.float32)).all()


@pytest.mark.parametrize("form", ["few", "many"])
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_nan_weight_reaches_its_column_and_no_other(level: str, form: Any, code: int) -> None:
    rng = np.random.default_rng(1)
    weight, scale, _ = fp8_weight(rng, 70, 300)
    x = rng.standard_normal((5, 300)).astype(np.float32)
    clean = gemm.fp8_linear(x, weight, scale, form)
    for row, column in [(13, 77), (40, 94), (69, 299), (0, 0), (64, 128)]:
        dirty = weight.copy()
        dirty.view(np.uint8)[row, column] = code
        for m in (1, 2, 5):
            y = gemm.fp8_linear(x[:m], dirty, scale, form)
            assert np.isnan(y[:, row]).all()
            others = np.arange(70) != row
            assert (y[:, others] == clean[:m][:, others]).all()


@pytest.mark.parametrize("form", ["few", "many"])
def test_a_part_of_a_weight_uses_the_scales_of_its_own_rows(level: str, form: Any) -> None:
    from whalefall.gemm.linear import weight_struct
    from whalefall.gemm.native_calls import library
    from whalefall.gemm.structs import FORMS, Input, LinearCall, Output

    rng = np.random.default_rng(2)
    weight, scale, _ = fp8_weight(rng, 300, 200)
    x = rng.standard_normal((3, 200)).astype(np.float32)
    whole = gemm.fp8_linear(x, weight, scale, form)
    part = np.ascontiguousarray(weight[100:231])
    y = np.zeros((3, 131), np.float32)
    call = LinearCall(
        weight_struct(part, scale, "part", first_row=100),
        Input(x.ctypes.data, 200, 0, 0),
        Output(y.ctypes.data, 131, None, None, 0, 0),
        3,
        FORMS[form],
        0,
    )
    import ctypes

    library().wf_linear(ctypes.addressof(call))
    assert (y == whole[:, 100:231]).all()


@pytest.mark.parametrize("form", ["few", "many"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_a_bit(level: str, form: Any, threads: int) -> None:
    rng = np.random.default_rng(3)
    weight, scale, _ = fp8_weight(rng, 513, 384)
    x = rng.standard_normal((9, 384)).astype(np.float32)
    expected = gemm.fp8_linear(x, weight, scale, form)
    before = jit.get_num_threads()
    jit.set_num_threads(threads)
    try:
        assert (gemm.fp8_linear(x, weight, scale, form) == expected).all()
    finally:
        jit.set_num_threads(before)


@pytest.mark.parametrize("form", ["few", "many"])
def test_fused_experts_agree_with_float64_in_top_k_order(level: str, form: Any) -> None:
    rng = np.random.default_rng(4)
    hidden, width, num_experts, tokens, topk = 200, 150, 7, 11, 3
    experts, exact = [], []
    for _ in range(num_experts):
        w1, w3 = fp8_weight(rng, width, hidden), fp8_weight(rng, width, hidden)
        w2 = fp8_weight(rng, hidden, width)
        experts.append(gemm.ExpertWeights(w1[0], w3[0], w2[0], w1[1], w3[1], w2[1]))
        exact.append((w1[2], w3[2], w2[2]))
    x = rng.standard_normal((tokens, hidden)).astype(np.float32) * 0.1
    idx = np.stack([rng.permutation(num_experts)[:topk] for _ in range(tokens)])
    idx[3, 1] = -1
    rows = gemm.fused_experts(x, experts, idx, form, out_dtype="float32")
    for t in range(tokens):
        for j, e in enumerate(idx[t]):
            if e < 0:
                assert (rows[t, j] == 0).all()
                continue
            gate, up, down = exact[e]
            g = gate @ x[t]
            wanted = down @ (g / (1 + np.exp(-g)) * (up @ x[t]))
            assert np.abs(rows[t, j] - wanted).max() < 1e-5 * np.abs(wanted).max()
    alone = gemm.fused_experts(x[5:6], experts, idx[5:6], form, out_dtype="float32")
    assert (alone[0] == rows[5]).all()
    assert (gemm.fused_experts(x, experts, idx, form) == rows.astype(BF16)).all()


@pytest.mark.parametrize("form", ["few", "many"])
@pytest.mark.parametrize("hidden", [128, 200, 384])
def test_experts_give_the_same_bits_for_rows_quantised_before(
    level: str, form: Any, hidden: int
) -> None:
    rng = np.random.default_rng(hidden)
    parts = [fp8_weight(rng, *shape) for shape in [(70, hidden)] * 2 + [(hidden, 70)]]
    experts = [gemm.ExpertWeights(*(p[0] for p in parts), *(p[1] for p in parts))] * 3
    x = rng.standard_normal((40, hidden)).astype(np.float32)
    x[1], x[2, :5], x[3] = 0, [1e-9, -1e30, 3e38, -0.0, 1e-40], 1e-6 * x[3]
    x[4] = np.where(rng.random(hidden) < 0.5, 1e-3, 1) * x[4]  # small beside the largest: subnormal
    idx = rng.integers(0, 3, (40, 2))
    assert quantize_rows(x[:0]).shape == (0, packed_width(hidden))
    for rows in (x, x.astype(BF16), x[::2]):
        packed = quantize_rows(rows)
        assert packed.shape == (len(rows), packed_width(hidden))
        plain, quick = (
            gemm.fused_experts(
                given, experts, idx[: len(rows)], form, quantize_activations=True,
                out_dtype="float32",
            )
            for given in (rows, packed)
        )  # fmt: skip
        assert plain.tobytes() == quick.tobytes()
    codes, scales = gemm.per_token_cast_to_fp8(x[5:], use_ue8m0=False)
    packed, padded = quantize_rows(x[5:]), -(-hidden // 128) * 128
    assert (packed[:, :hidden] == codes.view(np.uint8)).all()
    assert (packed[:, padded:].view(np.float32) == scales).all()


def test_a_nan_stays_one_when_its_row_is_packed(level: str) -> None:
    x = np.ones((1, 256), np.float32)
    x[0, 3] = np.nan
    packed = quantize_rows(x)
    assert np.isnan(packed[:, :128].view(E4M3)[0, 3].astype(np.float32))
    scales = packed[0, 256:].view(np.float32)
    assert np.isnan(scales[0]) and scales[1] == np.float32(1) / np.float32(448)


def test_packed_rows_are_refused_where_they_make_no_sense() -> None:
    weight, scale, _ = fp8_weight(np.random.default_rng(5), 128, 128)
    experts = [gemm.ExpertWeights(weight, weight, weight, scale, scale, scale)]
    packed, idx = quantize_rows(np.zeros((2, 128), np.float32)), np.zeros((2, 1), np.int32)
    with pytest.raises(ShapeError, match=r"x has shape \[2, 132\].*wanted \[T, 128\] of H=128"):
        gemm.fused_experts(packed, experts, idx)
    with pytest.raises(ShapeError, match=r"x has shape \[2, 128\].*wanted \[T, 132\] of H=128"):
        gemm.fused_experts(packed[:, :128], experts, idx, quantize_activations=True)
    with pytest.raises(DtypeError, match="quantize_rows: x is float64"):
        quantize_rows(np.zeros((2, 128)))
    with pytest.raises(ShapeError, match=r"quantize_rows: x has shape \[128\]"):
        quantize_rows(np.zeros(128, np.float32))


def plain_experts(rng: np.random.Generator, dtype: Any) -> gemm.ExpertWeights:
    return gemm.ExpertWeights(*(rng.standard_normal((128, 128)).astype(dtype) for _ in range(3)))


@pytest.mark.parametrize("form", ["few", "many"])
def test_any_negative_index_is_none_and_none_wraps_to_an_expert(form: Any) -> None:
    rng = np.random.default_rng(6)
    experts = [plain_experts(rng, BF16) for _ in range(2)]
    x = rng.standard_normal((6, 128)).astype(np.float32)
    idx = np.array([[-(2**32)], [1], [-(2**32) + 1], [-(2**31) - 1], [-(2**63)], [-1]])
    rows = gemm.fused_experts(x, experts, idx, form)
    assert (rows[1] != 0).any()
    assert (rows[[0, 2, 3, 4, 5]] == 0).all()
    for wrong in (2, 2**31, 2**32, 2**63 - 1):
        with pytest.raises(ShapeError, match=f"topk_idx holds {wrong}, wanted less than 2 experts"):
            gemm.fused_experts(x[:1], experts, np.array([[wrong]]), form)


def test_weights_of_mixed_dtypes_are_refused_where_their_rows_are_prepared_together() -> None:
    rng = np.random.default_rng(7)
    x, idx = rng.standard_normal((2, 128)).astype(np.float32), np.array([[0], [1]])
    codes, scale, exact = fp8_weight(rng, 128, 128)
    fp8 = gemm.ExpertWeights(codes, codes, codes, scale, scale, scale)
    bf16 = plain_experts(rng, BF16)
    half = gemm.ExpertWeights(codes, bf16.w3, codes, scale, None, scale)
    down = fp8._replace(w2=bf16.w2, w2_scale=None)
    with pytest.raises(DtypeError, match=r"expert 1: w1, w3, w2 are bfloat16, b.*as of expert 0"):
        gemm.fused_experts(x, [fp8, bf16], idx, "few")
    with pytest.raises(DtypeError, match="expert 0: w1, w3, w2 are float8_e4m3fn, bfloat16, float"):
        gemm.fused_experts(x, [half, half], idx, "few")
    with pytest.raises(DtypeError, match="expert 1: w1, w3, w2 are float8_e4m3fn, float8_e4m3fn"):
        gemm.fused_experts(x, [fp8, down], idx, "few")
    for form in ("few", "many"):  # w2 may be of another dtype than w1 and w3
        rows = gemm.fused_experts(x, [down, down], idx, form, out_dtype="float32")
        middle = x @ exact.T
        wanted = (middle / (1 + np.exp(-middle)) * middle) @ bf16.w2.T.astype(np.float64)
        assert np.abs(rows[:, 0] - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_a_result_is_writeable_and_its_memory_its_own() -> None:
    rng = np.random.default_rng(8)
    w = rng.standard_normal((64, 64)).astype(BF16)
    x, out = np.ones((4, 64), np.float32), np.zeros((4, 64), np.float32)
    gemm.linear(x, w, out=out)
    before = out.copy()
    out.flags.writeable = False
    x[:] = 2
    with pytest.raises(ShapeError, match=r"linear: out is read-only, wanted an array that may be"):
        gemm.linear(x, w, out=out)
    assert (out == before).all()
    strided = np.lib.stride_tricks.as_strided
    for strides in ((0, 4), (252, 4)):
        shared = strided(np.zeros(256, np.float32), (4, 64), strides)
        with pytest.raises(ShapeError, match=r"linear: out has shape \[4, 64\] and strides.*share"):
            gemm.linear(x, w, out=shared)
    square = rng.standard_normal((64, 64)).astype(np.float32)
    for given in ((square, w), (np.ones((64, 64), np.float32), square)):
        with pytest.raises(ShapeError, match=r"linear: out .* overlaps an input"):
            gemm.linear(*given, out=square)
    experts, idx = [gemm.ExpertWeights(w, w, w)], np.zeros((4, 1), np.int32)
    with pytest.raises(ShapeError, match=r"fused_experts: out .* overlaps an input"):
        gemm.fused_experts(x, experts, idx, out=x[:, None])
    whole = np.ones(4 * 64, np.float32)
    with pytest.raises(ShapeError, match=r"fused_experts: out .* overlaps an input"):
        gemm.fused_experts(
            x, experts, idx, topk_weights=whole[:4, None], out=whole.reshape(4, 1, 64)
        )
    with pytest.raises(ShapeError, match=r"fused_experts: out is read-only"):
        gemm.fused_experts(x, experts, idx, out=out[:, None])


@pytest.mark.parametrize("part", ["w1", "w3", "w2"])
@pytest.mark.parametrize("over", ["float32", "bfloat16", "float8_e4m3fn", "scales"])
def test_a_result_over_an_expert_is_refused(part: str, over: str) -> None:
    memory = np.zeros(1 << 16, np.uint8)
    fp8 = over in ("float8_e4m3fn", "scales")
    dtype = np.dtype(E4M3 if fp8 else BF16 if over == "bfloat16" else np.float32)
    begin, size = 4096, 4 if over == "scales" else 64 * 64 * dtype.itemsize
    region = memory[begin : begin + size]
    experts = []
    for number in range(3):
        fields = {name: np.zeros((64, 64), dtype) for name in ("w1", "w3", "w2")}
        if fp8:
            fields |= {f"{name}_scale": np.ones((1, 1), np.float32) for name in list(fields)}
        if number == 1 and over == "scales":
            fields[f"{part}_scale"] = region.view(np.float32).reshape(1, 1)
        elif number == 1:
            fields[part] = region.view(dtype).reshape(64, 64)
        experts.append(gemm.ExpertWeights(**fields))
    x, idx = np.ones((2, 64), np.float32), np.zeros((2, 1), np.int32)
    what = over if over == "scales" else "weights"
    for given in (experts, expert_structs(experts)):
        for at in (begin - 508, begin + size - 4):  # its last element, and its first
            out = memory[at : at + 512].view(np.float32).reshape(2, 1, 64)
            with pytest.raises(ShapeError, match=rf"out .* an input: expert 1's {what}; give it"):
                gemm.fused_experts(x, given, idx, out=out)
        for at in (begin - 512, begin + size):
            out = memory[at : at + 512].view(np.float32).reshape(2, 1, 64)
            gemm.fused_experts(x, given, idx, out=out)


def test_refusals_say_what_is_wrong() -> None:
    weight, scale, _ = fp8_weight(np.random.default_rng(5), 64, 256)
    x = np.zeros((2, 256), np.float32)
    with pytest.raises(ShapeError, match=r"scale is float32 \[1, 1\] with .*wanted .* \[1, 2\]"):
        gemm.fp8_linear(x, weight, scale[:, :1].copy())
    with pytest.raises(ShapeError, match=r"scale is float32 \[1, 2\] with strides \[4, 2\]"):
        gemm.fp8_linear(x, weight, np.ones((1, 4), np.float32)[:, ::2])
    with pytest.raises(ShapeError, match=r"x has shape \[2, 255\].*wanted \[M, K=256\]"):
        gemm.fp8_linear(x[:, :255], weight, scale)
    with pytest.raises(DtypeError, match="x is float64"):
        gemm.fp8_linear(x.astype(np.float64), weight, scale)
    with pytest.raises(DtypeError, match="float8 weights have block scales"):
        gemm.linear(x, weight)
    square, idx = np.ones((256, 256), np.float32), np.zeros((2, 1), np.int32)
    experts = [gemm.ExpertWeights(square, square, square)]
    for dtype in ("nonsense", "float16", 3):
        with pytest.raises(
            DtypeError, match=f"fp8_linear: out_dtype is {dtype!r}, wanted 'float32"
        ):
            gemm.fp8_linear(x, weight, scale, out_dtype=dtype)  # type: ignore[arg-type]
        with pytest.raises(DtypeError, match=f"fused_experts: out_dtype is {dtype!r}, wanted"):
            gemm.fused_experts(x, experts, idx, out_dtype=dtype)  # type: ignore[arg-type]
    for wrong in (None, [(square, square, square)], experts[0], (ctypes.c_int * 2)()):
        with pytest.raises(
            DtypeError, match=r"fused_experts: experts is a .*, wanted a list of Exp"
        ):
            gemm.fused_experts(x, wrong, idx)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"form is \['few'\]"):
        gemm.fp8_linear(x, weight, scale, ["few"])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="form is 'some'"):
        gemm.fp8_linear(x, weight, scale, "some")  # type: ignore[arg-type]


def test_a_gradient_is_refused_where_torch_records_one() -> None:
    torch = pytest.importorskip("torch")
    x, w = torch.ones(2, 128), torch.ones(128, 128)
    weight, scale = w.to(torch.float8_e4m3fn), torch.ones(1, 1)
    idx, wanted = torch.zeros(2, 1, dtype=torch.int32), x.clone().requires_grad_()
    learnt, out = torch.nn.Parameter(w), torch.empty(2, 128)
    calls = [
        lambda: gemm.linear(wanted, w),
        lambda: gemm.linear(x, learnt),
        lambda: gemm.linear(wanted, w, out=out),
        lambda: gemm.fp8_linear(wanted, weight, scale),
        lambda: gemm.fused_experts(wanted, [gemm.ExpertWeights(w, w, w)], idx),
        lambda: gemm.fused_experts(x, [gemm.ExpertWeights(w, w, learnt)], idx),
    ]
    for call in calls:
        with torch.no_grad():
            assert not call().requires_grad
        with pytest.raises(
            UnsupportedError, match=r"gradient; call it under torch\.no_grad\(\), or"
        ):
            call()


@pytest.mark.skipif(
    not machine.halves_are_fast(jit.levels()[-1]), reason="needs fast bf16 dots or tiles"
)
@pytest.mark.parametrize("form", [0, 1])
def test_rounding_activations_gives_what_bf16_activations_give(form: int) -> None:
    rng = np.random.default_rng(3)
    weight, scale, _ = fp8_weight(rng, 70, 300)
    x = rng.standard_normal((6, 300)).astype(np.float32)
    results = []
    for given, activations in ((x, "half"), (x.astype(BF16), "keep"), (x, "keep")):
        y = np.empty((6, 70), np.float32)
        call = LinearCall(
            weight_struct(weight, scale, "test"),
            Input(given.ctypes.data, 300, KINDS[str(given.dtype)], 0),
            Output(y.ctypes.data, 70, None, None, 0, 0),
            6, form, ACTIVATIONS[activations],
        )  # fmt: skip
        library().wf_linear(ctypes.addressof(call))
        results.append(y)
    assert (results[0] == results[1]).all()
    assert (results[0] != results[2]).any()  # the exact product of fp32 activations
