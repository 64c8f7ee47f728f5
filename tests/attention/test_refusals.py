"""What the public functions refuse: one line that names function, argument, value and remedy."""

from __future__ import annotations

import functools
import inspect
import json
import re
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.attention.problems import BF16
from whalefall import attention
from whalefall.compat import flash_mla
from whalefall.dtypes import NUMPY_DTYPES
from whalefall.errors import ConfigError, DtypeError, ShapeError, UnsupportedError, WhalefallError

SIGNATURES = json.loads((Path(__file__).parent / "signatures.json").read_text(encoding="utf-8"))


def test_the_public_names() -> None:
    assert attention.__all__ == [
        "FlashMLASchedMeta",
        "append_latent",
        "dequantize_kv_cache",
        "flash_attn_varlen_func",
        "flash_attn_varlen_kvpacked_func",
        "flash_attn_varlen_qkvpacked_func",
        "flash_mla_sparse_fwd",
        "flash_mla_with_kvcache",
        "get_mla_metadata",
        "merge_partials",
    ]


@pytest.mark.parametrize("name", [*SIGNATURES["functions"], *SIGNATURES["classes"]])
def test_signatures_are_the_originals(name: str) -> None:
    parameters = inspect.signature(attrgetter(name)(attention)).parameters.values()
    ours = [
        [p.name, p.kind.name.lower(), "required" if p.default is p.empty else p.default]
        for p in parameters
    ]
    for parameter in ours:
        if parameter[1].startswith("var_"):
            parameter[2] = "required"
    assert ours == {**SIGNATURES["functions"], **SIGNATURES["classes"]}[name]


def test_compat_has_the_originals_names() -> None:
    assert flash_mla.__all__ == SIGNATURES["all"]
    assert flash_mla.FlashMLASchedMeta is attention.FlashMLASchedMeta


def decode(**change: Any) -> Any:
    given: dict[str, Any] = {
        "q": np.zeros((2, 1, 4, 96), BF16),
        "k_cache": np.zeros((8, 16, 1, 96), BF16),
        "block_table": np.zeros((2, 3), np.int32),
        "cache_seqlens": np.array([20, 48], np.int32),
        "head_dim_v": 64,
        "tile_scheduler_metadata": None,
    }
    return attention.flash_mla_with_kvcache(**{**given, **change})


def assert_complete(message: str, function: str, *arguments: str) -> None:
    """One line: function, argument, what it is, what was wanted; what to do."""
    form = rf"{function}: \w+(\[.*\])?(:| is| has) .+, wanted .+; .+"
    assert re.fullmatch(form, message), message  # a dot is no new line
    assert any(re.search(rf"\b{name}\b", message) for name in arguments), message
    assert len(message) < 240, message


INDEX = np.zeros((2, 1, 4), np.int32)
REFUSALS: list[tuple[dict[str, Any], type[WhalefallError], str]] = [
    ({"q": np.zeros((2, 4, 96), BF16)}, ShapeError, r"q has shape \[2, 4, 96\], wanted \[b, s_q"),
    ({"q": np.zeros((2, 1, 4, 96), np.int32)}, DtypeError, "q is int32, wanted bfloat16"),
    ({"k_cache": np.zeros((8, 16, 1, 95), BF16)}, ShapeError, "rows of 95 and q has 96 columns"),
    (
        {"k_cache": np.zeros((8, 16, 3, 96), BF16)},
        ShapeError,
        "q has 4 query heads, wanted a mul",
    ),
    ({"k_cache": np.zeros((8, 16, 1, 192), BF16)[..., ::2]}, ShapeError, "stride 2 in a row, wan"),
    ({"k_cache": np.zeros((8, 0, 1, 96), BF16)}, ShapeError, r"\[8, 0, 1, 96\], wanted no axis of"),
    ({"k_cache": np.zeros((8, 16, 0, 96), BF16)}, ShapeError, r"16, 0, 96\], wanted no axis of 0"),
    ({"k_cache": np.zeros((8, 16, 96), BF16)}, ShapeError, r"wanted \[blocks, page, kv heads"),
    ({"k_cache": np.zeros((8, 16, 1, 96), np.uint8)}, DtypeError, "uint8 and is_fp8_kvcache is Fa"),
    ({"is_fp8_kvcache": True}, DtypeError, "bfloat16 and is_fp8_kvcache is True, wanted one of"),
    ({"head_dim_v": 97}, ConfigError, "head_dim_v is 97, wanted a whole number from 1 to 96"),
    ({"head_dim_v": 0}, ConfigError, "head_dim_v is 0"),
    ({"head_dim_v": 64.0}, ConfigError, r"head_dim_v is 64\.0, wanted a whole number"),
    ({"head_dim_v": "64"}, ConfigError, "head_dim_v is '64', wanted a whole number"),
    ({"head_dim_v": None}, ConfigError, "head_dim_v is None, wanted a whole number"),
    ({"softmax_scale": "x"}, ConfigError, "softmax_scale is 'x', wanted a finite number or None"),
    (
        {"softmax_scale": 2.4e38},
        ConfigError,
        "softmax_scale is 2.4e.38, wanted at most 2.36e.38 or None",
    ),
    ({"softmax_scale": np.nan}, ConfigError, "softmax_scale is nan, wanted a finite number or No"),
    ({"softmax_scale": True}, ConfigError, "softmax_scale is True, wanted a finite"),
    ({"block_table": np.zeros((2, 3), np.int64)}, DtypeError, "block_table is int64, wanted int32"),
    ({"block_table": np.zeros((3, 3), np.int32)}, ShapeError, r"has shape \[3, 3\], wanted \[2"),
    ({"block_table": np.full((2, 3), 8, np.int32)}, ShapeError, r"block_table\[0, 0\] is 8, wante"),
    ({"block_table": np.full((2, 3), -1, np.int32)}, ShapeError, "is -1, wanted 0 to 7"),
    ({"cache_seqlens": np.array([1, 49], np.int32)}, ShapeError, r"seqlens\[1\] is 49, wanted 0 t"),
    ({"cache_seqlens": np.array([-1, 4], np.int32)}, ShapeError, r"cache_seqlens\[0\] is -1"),
    ({"cache_seqlens": [1, 2]}, DtypeError, "cache_seqlens: a list, wanted a numpy array"),
    ({"attn_sink": np.zeros(3, np.float32)}, ShapeError, r"attn_sink is float32 \[3\], wanted"),
    ({"tile_scheduler_metadata": "x"}, DtypeError, "is 'x' and num_splits is None, wanted an obj"),
    (
        {"topk_length": np.zeros(2, np.int32)},
        ConfigError,
        r"topk_length is a int32 array \[2\] and indices is None",
    ),
    (
        {"tile_scheduler_metadata": np.zeros((4, 8)), "num_splits": np.zeros(4)},
        DtypeError,
        r"metadata is a float64 array \[4, 8\] and num_splits is a float64 array \[4\], wanted an",
    ),
    (
        {"attn_sink": np.zeros(8, np.float32)[::2]},
        ShapeError,
        r"\[4\] of strides \[2\], wanted",
    ),
    (
        {"k_cache": np.zeros((0, 16, 1, 96), BF16)},
        ShapeError,
        r"block_table\[0, 0\] is 0, wanted none: k_cache has no blocks; ",
    ),
    ({"indices": INDEX, "causal": True}, ConfigError, "causal is True with indices, wanted False"),
    ({"indices": INDEX, "block_table": [[0]]}, DtypeError, "block_table: a list, wanted a numpy a"),
    ({"indices": INDEX, "cache_seqlens": (1, 2)}, DtypeError, "cache_seqlens: a tuple, wanted a n"),
    ({"indices": INDEX[:1]}, ShapeError, r"indices has shape \[1, 1, 4\], wanted \[2, 1, 'any'\]"),
    (
        {"indices": INDEX, "extra_k_cache": np.zeros((1, 1, 1, 96), BF16)},
        ConfigError,
        "kvcache is None",
    ),
    (
        {
            "indices": INDEX,
            "extra_k_cache": np.zeros((1, 1, 1, 96), np.float32),
            "extra_indices_in_kvcache": INDEX,
        },
        ConfigError,
        r"extra_k_cache is a float32 array .* and k_cache is a bfloat16 array .*, wanted one dt",
    ),
    ({"causal": np.ones(2)}, ConfigError, r"causal is a float64 array \[2\], wanted True or Fal"),
    ({"is_fp8_kvcache": [1, 0]}, ConfigError, r"is_fp8_kvcache is \[1, 0\], wanted True or Fal"),
]


@pytest.mark.parametrize(("change", "error", "words"), REFUSALS)
def test_decode_refuses(change: dict[str, Any], error: type[WhalefallError], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        decode(**change)
    assert_complete(str(caught.value), "flash_mla_with_kvcache", *change)


def test_a_call_known_with_int32_metadata_still_refuses_floats() -> None:
    whole = {"tile_scheduler_metadata": np.zeros((4, 8), np.int32), "num_splits": INDEX[:, 0, 0]}
    for _ in range(3):
        decode(**whole)
    with pytest.raises(DtypeError, match="wanted an object and None, or two int32 tensors"):
        decode(**{name: array.astype(np.float32) for name, array in whole.items()})


def test_numbers_may_be_numpys() -> None:
    rng = np.random.default_rng(2)
    q = rng.standard_normal((2, 1, 4, 96)).astype(BF16)
    cache = rng.standard_normal((8, 16, 1, 96)).astype(BF16)
    ours = decode(q=q, k_cache=cache, head_dim_v=np.int64(64), softmax_scale=np.float32(0.125))
    plain = decode(q=q.copy(), k_cache=cache, softmax_scale=0.125)
    assert ours[0].tobytes() == plain[0].tobytes() and ours[1].tobytes() == plain[1].tobytes()


def test_what_equals_an_accepted_argument_is_refused_all_the_same() -> None:
    cache, table = np.zeros((2, 16, 1, 96), BF16), np.zeros((2, 1), np.int32)
    given = (np.zeros((2, 1, 4, 96), BF16), cache, table, np.ones(2, np.int32))
    call = functools.partial(attention.flash_mla_with_kvcache, *given)
    call(64, None, causal=False)
    with pytest.raises(ConfigError, match=r"head_dim_v is 64\.0, wanted a whole number"):
        call(64.0, None, causal=False)
    with pytest.raises(ConfigError, match=r"causal is 0\.0, wanted True or False"):
        call(64, None, causal=0.0)


@pytest.mark.parametrize("scale", ["a", True, np.inf, pytest.param(10**400, id="huge"), [1.0]])
def test_scales_that_are_no_finite_number_are_refused(scale: Any) -> None:
    q, cu = np.zeros((4, 2, 32), np.float32), np.array([0, 4], np.int32)
    with pytest.raises(
        ConfigError, match=r"^flash_attn_varlen_func: softmax_scale is .*number or N"
    ):
        attention.flash_attn_varlen_func(q, q, q, cu, cu, 4, 4, softmax_scale=scale)
    for given in (scale, None):
        with pytest.raises(
            ConfigError, match=r"^flash_mla_sparse_fwd: sm_scale is .* finite number; pass"
        ):
            attention.flash_mla_sparse_fwd(q, q[:, :1], np.zeros((4, 1, 1), np.int32), given, 16)
    with pytest.raises(
        ConfigError, match=r"^flash_mla_sparse_fwd: d_v is None, wanted a whole num"
    ):
        attention.flash_mla_sparse_fwd(q, q[:, :1], np.zeros((4, 1, 1), np.int32), 1.0, None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"head_dim_qk is None, wanted a whole number"):
        attention.flash_attn_varlen_qkvpacked_func(q, cu, 4, None)  # type: ignore[arg-type]


def test_the_others_refuse() -> None:
    q = np.zeros((4, 2, 32), np.float32)
    cu = np.array([0, 4], np.int32)
    varlen = attention.flash_attn_varlen_func
    with pytest.raises(ConfigError, match=r"dropout_p is 0\.5, wanted 0"):
        varlen(q, q, q, cu, cu, 4, 4, dropout_p=0.5)
    for starts in ([0, 5], [1, 4], [0, 3, 2]):
        with pytest.raises(ShapeError, match="wanted it to start at 0"):
            varlen(q, q, q, np.array(starts, np.int32), cu, 4, 4)
    with pytest.raises(ShapeError, match=r"wanted \[Tk, h_kv, 32\]"):
        varlen(q, q[..., :16], q, cu, cu, 4, 4)
    with pytest.raises(ShapeError, match=r"kv is float32 \[4, 2, 32\], wanted float32 \[s_kv, 1"):
        attention.flash_mla_sparse_fwd(q, q, np.zeros((4, 1, 1), np.int32), 1.0, 16)
    cache = np.zeros((2, 4, 1, 48), np.float32)
    for slot in (8, 9, -2):  # 8 is the first row behind the cache
        slots = np.array([0, slot, 0, 0], np.int32)
        with pytest.raises(ShapeError, match=rf"slots\[1\] is {slot}, wanted -1 to 7"):
            attention.append_latent(q[:, 0], q[:, 1, :16], cache, slots)
    with pytest.raises(ShapeError, match=r"wanted \[parts, rows …, d_v\]"):
        attention.merge_partials(q, np.zeros((4, 3), np.float32))


def test_a_gradient_is_refused_where_torch_records_one() -> None:
    torch = pytest.importorskip("torch")
    names = ("q", "k_cache", "block_table", "cache_seqlens")
    arrays = (
        np.ones((2, 1, 4, 96), "f4"),
        np.ones((8, 16, 1, 96), "f4"),
        INDEX[:, 0],
        INDEX[:, 0, 0],
    )
    plain = {
        name: torch.from_numpy(array.copy()) for name, array in zip(names, arrays, strict=True)
    }
    index = torch.zeros(2, 1, 4, dtype=torch.int32)
    for name in ("q", "k_cache"):
        given = {**plain, name: plain[name].clone().requires_grad_()}
        calls = [
            lambda given=given: decode(**given),
            lambda given=given: attention.flash_mla_sparse_fwd(
                given["q"][:, 0], given["k_cache"][0], index, 1.0, 16
            ),
        ]
        for call in calls:
            with torch.no_grad():
                assert not call()[0].requires_grad
            with pytest.raises(
                UnsupportedError, match=r"needs a gradient; call it under torch\.no_gr"
            ):
                call()


def test_nothing_to_do_is_fine() -> None:
    out, lse = decode(
        q=np.zeros((0, 1, 4, 96), BF16), block_table=np.zeros((0, 3), np.int32),
        cache_seqlens=np.zeros(0, np.int32),
    )  # fmt: skip
    assert out.shape == (0, 1, 4, 64) and lse.shape == (0, 4, 1)
    assert decode(cache_seqlens=np.zeros(2, np.int32))[1].min() == np.inf
    for kv in (np.zeros((0, 1, 96), BF16), np.zeros((4, 1, 96), BF16)[:0]):
        index = np.array([[[0, -1, 5]]] * 2, np.int32)
        out, top, lse = attention.flash_mla_sparse_fwd(
            np.ones((2, 4, 96), BF16), kv, index, 1.0, 64
        )
        assert (out == 0).all() and (top == -np.inf).all() and (lse == np.inf).all()
    nothing: dict[str, Any] = {"k_cache": np.zeros((0, 16, 1, 96), BF16)}
    for rest in ({"cache_seqlens": np.zeros(2, np.int32)}, {"indices": INDEX}):
        out, lse = decode(**nothing, **rest)
        assert (out == 0).all() and (lse == np.inf).all()


def test_a_cache_that_overlaps_what_is_appended_is_refused() -> None:
    whole = np.zeros((2, 4, 1, 48), np.float32)
    slots, apart = np.array([4, 5, 6, 7], np.int32), np.zeros((4, 48), np.float32)
    own = whole[0, :, 0]  # rows of the cache's first page
    for latent, rope in ((own[:, :32], apart[:, 32:]), (apart[:, :32], own[:, 32:])):
        with pytest.raises(
            ShapeError, match=r"^append_latent: cache \(bytes 0x.* overlaps an input .*its own$"
        ):
            attention.append_latent(latent, rope, whole, slots)
    attention.append_latent(own[:, :32].copy(), own[:, 32:].copy(), whole, slots)


@pytest.mark.parametrize("wants", ["out", "lse", "latent", "rope", "cache"])
def test_merging_and_appending_have_no_gradient(wants: str) -> None:
    torch = pytest.importorskip("torch")
    slots = torch.arange(2, dtype=torch.int32)
    merged = {"out": torch.ones(2, 3, 4), "lse": torch.ones(2, 3)}
    rows = {name: torch.ones(2, 32) for name in ("latent", "rope")}
    appended = {**rows, "cache": torch.zeros(2, 4, 1, 64), "slots": slots}
    call, given = attention.append_latent, appended
    if wants in merged:
        call, given = attention.merge_partials, merged
    given[wants].requires_grad_()
    with pytest.raises(UnsupportedError, match=rf"^{call.__name__}: .*call it under torch\.no_gr"):
        call(**given)
    with torch.no_grad():
        call(**given)


@pytest.mark.parametrize("wrong", [np.ones(2), "no", [1]], ids=str)
def test_flags_are_truth_values(wrong: Any) -> None:
    q, cu = np.zeros((4, 2, 32), np.float32), np.array([0, 4], np.int32)
    rows, cache = np.zeros((4, 32), np.float32), np.zeros((2, 4, 1, 64), np.float32)
    slots = np.arange(4, dtype=np.int32)
    with pytest.raises(ConfigError, match=r"^append_latent: is_fp8_kvcache is .*, wanted True or"):
        attention.append_latent(rows, rows, cache, slots, wrong)
    for name, wanted in (("causal", "True or"), ("is_varlen", "True or"), ("dropout_p", "0")):
        words = f"^flash_attn_varlen_func: {name} is .*, wanted {wanted}"
        with pytest.raises(ConfigError, match=words):
            attention.flash_attn_varlen_func(q, q, q, cu, cu, 4, 4, **{name: wrong})


@pytest.mark.parametrize("dtype", ["uint8", "int8", "float8_e4m3fn"])
def test_rows_of_a_cache_mean_the_same_in_numpy_and_torch(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    rows = (np.arange(3 * 2 * 656) % 100).astype(np.uint8).reshape(3, 2, 656)
    plain = attention.dequantize_kv_cache(rows.view(NUMPY_DTYPES[dtype]))
    assert plain.dtype == BF16 and plain.shape == (3, 2, 576)
    got = attention.dequantize_kv_cache(torch.from_numpy(rows).view(getattr(torch, dtype)))
    assert got.dtype == torch.bfloat16 and got.shape == (3, 2, 576)
    assert got.view(torch.int16).numpy().tobytes() == plain.tobytes()
    turned = torch.from_numpy(rows).transpose(0, 1)
    assert torch.equal(attention.dequantize_kv_cache(turned), got.transpose(0, 1))


def test_rows_of_a_cache_are_an_array_of_656_bytes() -> None:
    torch = pytest.importorskip("torch")
    given = torch.zeros(2, 656, dtype=torch.uint8)
    odd = np.zeros((2, 656), object)
    for wrong in (None, "rows", [1, 2], given.to_sparse(), given.to("meta"), odd):
        with pytest.raises(WhalefallError, match=r"^dequantize_kv_cache: rows: .*, wanted") as no:
            attention.dequantize_kv_cache(wrong)
        assert "\n" not in str(no.value)
    for dtype, width in (("float32", 164), ("int16", 328), ("float32", 656), ("bool", 656)):
        words = (
            rf"^dequantize_kv_cache: rows is {dtype}, wanted one of float8_e4m3fn, uint8, int8; "
        )
        for array in (np.zeros((2, width), dtype), torch.zeros(2, width).to(getattr(torch, dtype))):
            with pytest.raises(DtypeError, match=words):
                attention.dequantize_kv_cache(array)
    for shape in ((656, 2), (), (2, 655)):
        with pytest.raises(ShapeError, match=r"^dequantize_kv_cache: rows has shape .*, wanted \["):
            attention.dequantize_kv_cache(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("wrong", [np.ones(2), "no", 1.5, -1, None], ids=str)
def test_what_changes_no_result_is_what_it_says(wrong: Any) -> None:
    q, cu = np.zeros((4, 2, 32), np.float32), np.array([0, 4], np.int32)
    both = np.concatenate([q, q], -1)
    for name in ("max_seqlen_qo", "max_seqlen_kv"):
        given = {"max_seqlen_qo": np.array(4), "max_seqlen_kv": 4, name: wrong}
        with pytest.raises(ConfigError, match=f"^flash_attn_varlen_func: {name} is .*whole number"):
            attention.flash_attn_varlen_func(q, q, q, cu, cu, **given)
        with pytest.raises(ConfigError, match=f": {name} is .*whole number"):
            attention.flash_attn_varlen_kvpacked_func(q, both, cu, cu, **given, head_dim_qk=32)
    packed = np.concatenate([both, q], -1)
    with pytest.raises(ConfigError, match=r": max_seqlen is .*whole number"):
        attention.flash_attn_varlen_qkvpacked_func(packed, cu, wrong, 32)
    if not isinstance(wrong, int | None):
        with pytest.raises(ConfigError, match=r": deterministic is .*True or False"):
            attention.flash_attn_varlen_func(q, q, q, cu, cu, 4, 4, deterministic=wrong)


@pytest.mark.parametrize("wrong", [np.ones((2, 2)), (np.ones((2, 2)),), "1" * 100], ids=range(3))
def test_a_scale_that_is_none_is_refused_in_one_short_line(wrong: Any) -> None:
    q, cu = np.zeros((4, 2, 32), np.float32), np.array([0, 4], np.int32)
    with pytest.raises(ConfigError, match=r"softmax_scale is .*, wanted a finite") as refusal:
        attention.flash_attn_varlen_func(q, q, q, cu, cu, 4, 4, softmax_scale=wrong)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 150
