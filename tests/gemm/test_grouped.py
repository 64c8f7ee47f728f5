"""Grouped products against float64: every layout of groups, what is zeroed and what is left."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.gemm.operands import BF16, E4M3, bf16, error, fp8
from whalefall import gemm
from whalefall.errors import ConfigError, DtypeError, ShapeError

EXACT = 1e-6


@pytest.fixture
def alignment() -> Iterator[int]:
    gemm.set_mk_alignment_for_contiguous_layout(16)
    yield 16
    gemm.set_mk_alignment_for_contiguous_layout(128)


@pytest.mark.parametrize("swap", [False, True])
def test_contiguous_rows_go_to_their_group_and_padding_is_zero(level: str, swap: bool) -> None:
    rng = np.random.default_rng(0)
    groups, n, k = 4, 70, 300
    index = np.array([0] * 5 + [-1] * 3 + [2] * 40 + [3] + [-1] * 2, np.int32)
    a, exact_a = fp8(rng, (len(index), k))
    b, exact_b = fp8(rng, (groups, n, k), (128, 128))
    d = np.full((len(index), n), 7, np.float32)
    if swap:
        b = (b[0].swapaxes(1, 2).copy(), b[1].swapaxes(1, 2))
        gemm.m_grouped_fp8_gemm_nn_contiguous(a, b, d, index)
    else:
        gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, d, index)
    assert (d[index < 0] == 0).all()
    for g in range(groups):
        assert error(d[index == g], exact_a[index == g], exact_b[g]) < EXACT


@pytest.mark.parametrize("zero", [True, False])
def test_psum_groups_end_where_it_says(level: str, alignment: int, zero: bool) -> None:
    rng = np.random.default_rng(1)
    ends = np.array([5, 16, 40, 49], np.int32)  # starts 0, 16 (empty), 16, 48
    a, exact_a = fp8(rng, (60, 256))
    b, exact_b = fp8(rng, (4, 33, 256), (128, 128))
    d = np.full((60, 33), 7, np.float32)
    gemm.m_grouped_fp8_gemm_nt_contiguous(
        a, b, d, ends, use_psum_layout=True, ensure_zero_padding=zero, expected_m_for_psum_layout=9
    )
    for g, (start, end) in enumerate([(0, 5), (16, 16), (16, 40), (48, 49)]):
        assert error(d[start:end], exact_a[start:end], exact_b[g]) < EXACT
    for gap in (slice(5, 16), slice(40, 48), slice(49, 60)):
        assert (d[gap] == (0 if zero else 7)).all()


def test_an_empty_psum_group_with_a_smaller_end_moves_no_start_back(alignment: int) -> None:
    rng = np.random.default_rng(7)
    a, exact_a = fp8(rng, (60, 256))
    b, exact_b = fp8(rng, (4, 33, 256), (128, 128))
    d = np.full((60, 33), 7, np.float32)
    ends = np.array([20, 3, 40, 50], np.int32)  # starts 0, 32 (empty), 32, 48
    gemm.m_grouped_fp8_gemm_nt_contiguous(
        a, b, d, ends, use_psum_layout=True, ensure_zero_padding=True
    )
    for g, (start, end) in {0: (0, 20), 2: (32, 40), 3: (48, 50)}.items():
        assert error(d[start:end], exact_a[start:end], exact_b[g]) < EXACT
    assert (d[20:32] == 0).all() and (d[40:48] == 0).all()


def test_psum_groups_of_k_start_at_aligned_ends(alignment: int) -> None:
    rng = np.random.default_rng(8)
    a, b = bf16(rng, (100, 12)), bf16(rng, (100, 20))
    d = np.full((4, 12, 20), 7, np.float32)
    ends = np.array([20, 3, 40, 99], np.int32)  # starts 0, 32 (empty), 32, 48
    gemm.k_grouped_bf16_gemm_tn_contiguous(a, b, d, None, ends, use_psum_layout=True)
    for g, (start, end) in enumerate([(0, 20), (32, 32), (32, 40), (48, 99)]):
        part = slice(start, end)
        assert error(d[g], *(x[part].T.astype(np.float64) for x in (a, b))) < EXACT


@pytest.mark.parametrize("over", ["a", "b", "masked_m"])
@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_masked_results_over_an_input_are_refused(kind: str, over: str) -> None:
    shapes = {"a": (2, 4, 128), "b": (2, 8, 128), "masked_m": (2,)}
    dtype: Any = BF16 if kind == "bf16" else E4M3
    given: dict[str, Any] = {"a": np.zeros(shapes["a"], dtype), "b": np.zeros(shapes["b"], dtype)}
    given["masked_m"] = np.array([4, 1], np.int32)
    memory = np.zeros(1 << 14, np.uint8)
    d = memory[4096 : 4096 + 256].view(np.float32).reshape(2, 4, 8)
    size = given[over].nbytes
    for begin, refused in ((4096 - size, False), (4100 - size, True), (4348, True), (4352, False)):
        arrays = dict(given)
        arrays[over] = memory[begin : begin + size].view(given[over].dtype).reshape(shapes[over])
        counts = arrays["masked_m"]
        counts[:] = 4, 1
        pair = [arrays["a"], arrays["b"]]
        if kind == "fp8":
            pair = [
                (x, np.ones(s, np.float32))
                for x, s in zip(pair, [(2, 4, 1), (2, 1, 1)], strict=True)
            ]
        call = getattr(gemm, f"m_grouped_{kind}_gemm_nt_masked")
        if not refused:
            call(*pair, d, counts, 4)
            continue
        with pytest.raises(ShapeError, match=rf"m_grouped_{kind}_gemm_nt_masked: d .* overlaps"):
            call(*pair, d, counts, 4)
        assert counts.tolist() == [4, 1]


def test_masked_rows_are_left_alone(level: str) -> None:
    rng = np.random.default_rng(2)
    counts = np.array([0, 1, 9, 5], np.int32)
    a, exact_a = fp8(rng, (4, 9, 384))
    b, exact_b = fp8(rng, (4, 40, 384), (128, 128))
    d = np.full((4, 9, 40), 7, BF16)
    a[0].view(np.uint8)[3, 5:] = 0x7F  # NaN beyond the mask reaches nothing
    gemm.m_grouped_fp8_gemm_nt_masked(a, b, d, counts, 4)
    for g, count in enumerate(counts):
        assert (d[g, count:] == 7).all()
        assert error(d[g, :count], exact_a[g, :count], exact_b[g]) < 4e-3  # bf16
    a16, b16 = bf16(rng, (4, 9, 100)), bf16(rng, (4, 40, 100))
    wide = np.full((4, 9, 40), 7, np.float32)
    gemm.m_grouped_bf16_gemm_nt_masked(a16, b16, wide, counts, 4)
    for g, count in enumerate(counts):
        assert (wide[g, count:] == 7).all()
        wanted = error(
            wide[g, :count], a16[g, :count].astype(np.float64), b16[g].astype(np.float64)
        )
        assert wanted < EXACT


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_groups_of_a_result_may_lie_apart(level: str, kind: str) -> None:
    rng = np.random.default_rng(14)
    groups, m, n, k, counts = 3, 5, 24, 128, np.array([5, 0, 4], np.int32)
    a, exact_a = fp8(rng, (groups, m, k))
    b, exact_b = fp8(rng, (groups, n, k), (128, 128))
    if kind == "bf16":
        a, b = bf16(rng, (groups, m, k)), bf16(rng, (groups, n, k))
        exact_a, exact_b = a.astype(np.float64), b.astype(np.float64)
    buffer = np.full((groups, m + 4, n + 8), 7, np.float32)
    d = buffer[:, :m, 3 : n + 3]
    for _ in range(2):  # the second is a known call
        getattr(gemm, f"m_grouped_{kind}_gemm_nt_masked")(a, b, d, counts, 4)
        for g, count in enumerate(counts):
            assert error(d[g, :count], exact_a[g, :count], exact_b[g]) < EXACT
            d[g, :count] = 7
        assert (buffer == 7).all()


@pytest.mark.parametrize("gran_k", [32, 128])
@pytest.mark.parametrize("packed", [False, True])
def test_k_grouped_adds_each_group_to_c(level: str, gran_k: int, packed: bool) -> None:
    rng = np.random.default_rng(3)
    m, n, sizes = 24, 40, [128, 0, 256, 160]
    blocks = [-(-k // gran_k) for k in sizes]
    operands, exact = [], []
    for rows in (m, n):
        values = fp8(rng, (sum(sizes), rows))[0][0]
        scale = np.exp2(rng.integers(-3, 3, (sum(blocks), rows))).astype(np.float32)
        wide = np.concatenate(
            [
                np.repeat(scale[sum(blocks[:g]) : sum(blocks[: g + 1])], gran_k, 0)[:k]
                for g, k in enumerate(sizes)
            ]
        )
        exact.append(values.astype(np.float64) * wide)
        if packed:
            given = gemm.get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(
                scale, np.array(sizes, np.int32), sizes, gran_k, 128
            )
        else:
            given = scale
        operands.append((values, given))
    c = rng.standard_normal((4, m, n)).astype(np.float32) * 100
    d = c.copy()
    gemm.k_grouped_fp8_gemm_tn_contiguous(
        *operands, d, sizes, np.array(sizes, np.int32), c=d, recipe=(1, 1, gran_k)
    )
    at = 0
    for g, k in enumerate(sizes):
        left, right = exact[0][at : at + k].T, exact[1][at : at + k].T
        assert error(d[g], left, right, c[g]) < EXACT
        at += k
    assert (d[1] == c[1]).all()


def test_k_grouped_flat_and_bf16_forms(level: str) -> None:
    rng = np.random.default_rng(4)
    m, n, sizes = 12, 20, [128, 384]
    parts = {"a": m, "b": n}
    pairs, exact = {}, {}
    for name, rows in parts.items():
        groups = [fp8(rng, (rows, k)) for k in sizes]
        flat = np.concatenate([g[0][0].reshape(-1) for g in groups])
        scale = np.concatenate([g[0][1] for g in groups], axis=1)
        pairs[name], exact[name] = (flat, scale), [g[1] for g in groups]
    for turned in ("", "a", "b", "ab"):  # [M or N, K / 128] with stride 1 along the rows
        given = [
            (flat, scale.T.copy().T if name in turned else scale)
            for name, (flat, scale) in pairs.items()
        ]
        buffer = np.zeros((2, m + 3, n), np.float32)
        d = buffer[:, :m]
        gemm.k_grouped_fp8_gemm_nt_contiguous(*given, d, sizes, None, c=d)
        for g in range(2):
            assert error(d[g], exact["a"][g], exact["b"][g]) < EXACT, turned
        assert (buffer[:, m:] == 0).all()
    a, b = bf16(rng, (512, m)), bf16(rng, (512, n))
    gemm.k_grouped_bf16_gemm_tn_contiguous(a, b, d, sizes, np.array(sizes, np.int32))
    assert error(d[1], a[128:].T.astype(np.float64), b[128:].T.astype(np.float64)) < EXACT


@pytest.mark.parametrize("kind", ["index", "masked", "psum"])
def test_no_group_at_all_is_no_work(kind: str) -> None:
    rng = np.random.default_rng(5)
    b = fp8(rng, (2, 8, 128), (128, 128))[0]
    if kind == "masked":
        d = np.full((2, 4, 8), 3, np.float32)
        a = fp8(rng, (2, 4, 128))[0]
        gemm.m_grouped_fp8_gemm_nt_masked(a, b, d, np.zeros(2, np.int32), 1)
        assert (d == 3).all()
        return
    a, d = fp8(rng, (4, 128))[0], np.full((4, 8), 3, np.float32)
    layout = np.full(4, -1, np.int32) if kind == "index" else np.zeros(2, np.int32)
    gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, d, layout, use_psum_layout=kind == "psum")
    assert (d == (0 if kind == "index" else 3)).all()


def test_refusals_say_what_is_wrong() -> None:
    rng = np.random.default_rng(6)
    a, b = fp8(rng, (4, 128))[0], fp8(rng, (2, 8, 128), (128, 128))[0]
    d = np.zeros((4, 8), np.float32)
    call = gemm.m_grouped_fp8_gemm_nt_contiguous
    for group in (2, -2):
        with pytest.raises(ShapeError, match=f"grouped_layout holds {group}, wanted -1 to 1"):
            call(a, b, d, np.array([0, 1, group, 1], np.int32))
    with pytest.raises(ShapeError, match=r"grouped_layout has shape \[3\], wanted \[M=4\]"):
        call(a, b, d, np.zeros(3, np.int32))
    for ends, words in (([2, 9], "group 1 ends at row 9"), ([5, 5], "group 0 ends at row 5")):
        with pytest.raises(ShapeError, match=f"grouped_layout: {words}, wanted at most a's 4"):
            call(a, b, d, np.array(ends, np.int32), use_psum_layout=True)
    with pytest.raises(ConfigError, match="without use_psum_layout"):
        call(a, b, d, np.zeros(4, np.int32), expected_m_for_psum_layout=2)
    masked = (a[0][None], a[1][None]), (b[0][:1], b[1][:1])
    for count in (5, -1):
        with pytest.raises(ShapeError, match=f"masked_m holds {count}, wanted 0 to M=4"):
            gemm.m_grouped_fp8_gemm_nt_masked(*masked, d[None], np.array([count], np.int32), 1)
    turned = (a[0].T.copy(), np.ones((1, 4), np.float32))
    with pytest.raises(ShapeError, match="ks_cpu sums to 5"):
        gemm.k_grouped_fp8_gemm_tn_contiguous(
            turned, turned, np.zeros((1, 4, 4), np.float32), [5], None
        )
    tn, flat = gemm.k_grouped_fp8_gemm_tn_contiguous, gemm.k_grouped_fp8_gemm_nt_contiguous
    for call, name in ((tn, "k_grouped_fp8_gemm_tn"), (flat, "k_grouped_fp8_gemm_nt")):
        d = np.zeros((1, 4, 4), np.float32)
        with pytest.raises(DtypeError, match=f"{name}_contiguous: a is a NoneType, wanted a pair"):
            call(None, turned, d, [128], None)
        for sizes in (5, None, ["x"], [1.0]):
            with pytest.raises(ConfigError, match=f"{name}_contiguous: ks_cpu="):
                call(turned, turned, d, sizes, None)
        with pytest.raises(ConfigError, match=f"{name}_contiguous: recipe=None"):
            call(turned, turned, d, [128], None, recipe=None)
    for wrong in (None, "x", 0, 1.5):
        with pytest.raises(
            ConfigError, match=f"nt_masked: expected_m is {wrong!r}, wanted a whole"
        ):
            gemm.m_grouped_fp8_gemm_nt_masked(*masked, d[None], np.array([4], np.int32), wrong)


@pytest.mark.parametrize("name", ["bf16_gemm_tn", "fp8_gemm_tn", "fp8_gemm_nt"])
def test_weight_gradients_over_their_layout_are_refused(name: str) -> None:
    rng = np.random.default_rng(13)
    memory = np.zeros(2 * 4 * 4 + 2, np.float32)
    ks, layout = [128, 128], memory.view(np.int32)[-2:]
    layout[:] = ks
    pair: Any = (rng.integers(0, 9, (256, 4), np.uint8).view(E4M3), np.ones((2, 4), np.float32))
    if name == "bf16_gemm_tn":
        pair = bf16(rng, (256, 4))
    elif name == "fp8_gemm_nt":
        pair = (pair[0].reshape(-1), np.ones((4, 2), np.float32))
    call = getattr(gemm, f"k_grouped_{name}_contiguous")
    with pytest.raises(ShapeError, match=rf"{name}_contiguous: d .* overlaps an input"):
        call(pair, pair, memory[1:33].reshape(2, 4, 4), ks, layout)
    assert layout.tolist() == ks
    call(pair, pair, memory[:32].reshape(2, 4, 4), ks, layout)
