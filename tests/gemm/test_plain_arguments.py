"""Flags, recipes and dtypes of products: what makes no sense is refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from tests.gemm.operands import BF16
from whalefall import gemm
from whalefall.errors import ConfigError, DtypeError


def one_line(call: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as refusal:
        call()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("wrong", [np.ones((2, 2)), np.ones(0), "yes", 1.0, [True]], ids=str)
def test_flags_are_truth_values(wrong: Any) -> None:
    x, w = np.ones((4, 128), np.float32), np.ones((8, 128), np.float32)
    half, groups, d = x.astype(BF16), w.astype(BF16)[None], np.zeros((4, 8), np.float32)
    code = gemm.per_block_cast_to_fp8(w, False)
    experts = [gemm.ExpertWeights(w, w, w.T.copy())]
    idx, none = np.zeros((4, 1), np.int32), np.zeros(4, np.int32)
    by_k = (half, half, np.zeros((1, 128, 128), np.float32), [4], np.array([4], np.int32))
    grouped, experts_of = gemm.m_grouped_bf16_gemm_nt_contiguous, partial(gemm.fused_experts, x)
    for name, call in (
        ("quantize_activations", partial(gemm.fp8_linear, x, *code)),
        ("quantize_activations", partial(experts_of, experts, idx)),
        ("half_activations", partial(experts_of, experts, idx)),
        ("use_psum_layout", partial(grouped, half, groups, d, none)),
        ("use_psum_layout", partial(grouped, half, groups, d, none, expected_m_for_psum_layout=1)),
        ("ensure_zero_padding", partial(grouped, half, groups, d, none)),
        ("use_psum_layout", partial(gemm.k_grouped_bf16_gemm_tn_contiguous, *by_k)),
    ):
        one_line(partial(call, **{name: wrong}), ConfigError, f": {name} is .*, wanted True or")


def test_a_flag_that_changes_nothing_is_one_all_the_same() -> None:
    a = b = gemm.per_token_cast_to_fp8(np.ones((4, 128), np.float32), False)
    d, group = np.zeros((4, 4), np.float32), np.zeros(4, np.int32)
    many = (b[0][None], b[1][None])
    calls = [
        partial(gemm.fp8_gemm_nt, a, b, d, recipe=(1, 1, 128)),
        partial(gemm.fp8_gemm_nt_skip_head_mid, a, b, d, (2, 0, 2), recipe=(1, 1, 128)),
        partial(gemm.m_grouped_fp8_gemm_nt_contiguous, a, many, d, group, recipe=(1, 1, 128)),
    ]
    for call in calls:
        call(disable_ue8m0_cast=True)
        for wrong in ("no", 1.0):  # the second is equal to what was accepted
            refused = partial(call, disable_ue8m0_cast=wrong)
            one_line(refused, ConfigError, ": disable_ue8m0_cast is .*, wanted True or False")


ODD = [np.ones((2, 3)), [np.ones(3)] * 2, (1.0, 128.0, 128.0), (np.ones(2), None), "128", None]


@pytest.mark.parametrize("wrong", ODD, ids=range(len(ODD)))
def test_recipes_and_letters_are_refused_in_one_line(wrong: Any) -> None:
    a = b = gemm.per_token_cast_to_fp8(np.ones((4, 128), np.float32), False)
    d = np.zeros((4, 4), np.float32)
    call = partial(gemm.fp8_gemm_nt, a, b, d)
    for name, rest in (("a", "b"), ("b", "a")):
        pairs = {f"recipe_{name}": wrong, f"recipe_{rest}": (1, 128)}
        one_line(partial(call, **pairs), ConfigError, "^fp8_gemm_nt: .*wanted")
    if wrong is not None:
        one_line(partial(call, recipe=wrong), ConfigError, "^fp8_gemm_nt: .*wanted")
    one_line(partial(call, compiled_dims=wrong), ConfigError, "compiled_dims=.*wanted letters")
    splits = partial(gemm.fp8_gemm_nt_skip_head_mid, a, b, d, recipe=(1, 1, 128))
    one_line(partial(splits, head_splits=wrong), ConfigError, "wanted .left, mid, right")
    values = np.ones((128, 4), np.float32).astype(a[0].dtype), np.ones((1, 4), np.float32)
    by_k = partial(gemm.k_grouped_fp8_gemm_tn_contiguous, values, values, d[None])
    one_line(partial(by_k, wrong, None), ConfigError, "ks_cpu=.*wanted")
    one_line(partial(by_k, [128], None, recipe=wrong), ConfigError, "recipe=.*wanted .1, 1, 32")
    flat = partial(gemm.k_grouped_fp8_gemm_nt_contiguous, values, values, d[None], [128], None)
    one_line(partial(flat, recipe=wrong), ConfigError, "recipe=.*wanted .1, 1, 128.; name")


def test_the_dtype_of_a_result_is_checked_where_one_is_given_too() -> None:
    x, w = np.ones((4, 128), np.float32), np.ones((8, 128), np.float32)
    out, idx = np.zeros((4, 8), np.float32), np.zeros((4, 1), np.int32)
    experts, rows = [gemm.ExpertWeights(w, w, w.T.copy())], np.zeros((4, 1, 128), np.float32)
    code = gemm.per_block_cast_to_fp8(w, False)
    for call, given in (
        (partial(gemm.linear, x, w), out),
        (partial(gemm.fp8_linear, x, *code), out),
        (partial(gemm.fused_experts, x, experts, idx), rows),
    ):
        assert call(out=given, out_dtype="float32") is given
        for wrong in ("float16", 3, np.ones((2, 2)), [None]):
            for to in (None, given):
                one_line(partial(call, out=to, out_dtype=wrong), DtypeError, "out_dtype is .*want")
        words = "out_dtype is 'bfloat16', wanted out's float32; leave"
        one_line(partial(call, out=given, out_dtype="bfloat16"), DtypeError, words)
        one_line(partial(call, form=np.ones((2, 2))), ConfigError, "form is .*, wanted 'few'")


def test_a_difference_is_of_numbers() -> None:
    one_line(partial(gemm.calc_diff, np.array(["a"]), np.ones(1)), DtypeError, "x is .*wanted num")
    one_line(partial(gemm.calc_diff, np.ones(1), np.array([{}])), DtypeError, "y is .*wanted num")
