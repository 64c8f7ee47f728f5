"""Every refusal of the room has all its parts: function, argument, got, wanted, and a remedy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.attention.problems import BF16
from tests.attention.test_refusals import assert_complete
from whalefall import attention
from whalefall.errors import WhalefallError

CU = np.array([0, 4], np.int32)
HEADS = np.zeros((4, 2, 32), np.float32)
NO_ROWS = np.zeros((4, 0, 32), np.float32)


def whole(*numbers: int) -> Any:
    return np.array(numbers, np.int32)


PREFILL = {
    "q": HEADS,
    "kv": HEADS[:, :1],
    "indices": np.zeros((4, 1, 3), np.int32),
    "sm_scale": 1.0,
    "d_v": 16,
}
VARLEN = {
    "q": HEADS,
    "k": HEADS,
    "v": HEADS,
    "cu_seqlens_qo": CU,
    "cu_seqlens_kv": CU,
    "max_seqlen_qo": 4,
    "max_seqlen_kv": 4,
}
KV_PACKED = {
    "q": HEADS,
    "kv": np.zeros((4, 2, 48), np.float32),
    "cu_seqlens_qo": CU,
    "cu_seqlens_kv": CU,
    "max_seqlen_qo": 4,
    "max_seqlen_kv": 4,
    "head_dim_qk": 32,
}
QKV_PACKED = {
    "qkv": np.zeros((4, 2, 80), np.float32),
    "cu_seqlens": CU,
    "max_seqlen": 4,
    "head_dim_qk": 32,
}
APPEND = {
    "latent": np.zeros((4, 32), np.float32),
    "rope": np.zeros((4, 16), np.float32),
    "cache": np.zeros((2, 4, 1, 48), np.float32),
    "slots": whole(0, 1, 2, 3),
}
FP8 = {
    "latent": np.zeros((4, 512), np.float32),
    "rope": np.zeros((4, 64), np.float32),
    "cache": np.zeros((2, 4, 1, 656), np.uint8),
    "slots": whole(0, 1, 2, 3),
    "is_fp8_kvcache": True,
}
MERGE = {"out": np.zeros((3, 2, 8), np.float32), "lse": np.zeros((3, 2), np.float32)}
ROWS = {"rows": np.zeros((2, 656), np.uint8)}

NOT_ARRAYS: list[Any] = [None, [1.0], "x", np.zeros(3, object)]
NOT_STARTS = [whole(), whole(0, 5), whole(1, 4), whole(0, 2, 4), CU * 1.0]
WRONG: list[tuple[Any, dict[str, Any], str, list[Any]]] = [
    (attention.flash_mla_sparse_fwd, PREFILL, "q", [*NOT_ARRAYS, HEADS.astype(int), HEADS[0]]),
    (
        attention.flash_mla_sparse_fwd,
        PREFILL,
        "kv",
        [*NOT_ARRAYS, HEADS, HEADS[:, :1].astype(BF16), np.zeros((4, 1, 64), np.float32)[..., ::2]],
    ),
    (attention.flash_mla_sparse_fwd, PREFILL, "indices", [*NOT_ARRAYS, CU, np.zeros((4, 1, 3))]),
    (attention.flash_mla_sparse_fwd, PREFILL, "sm_scale", [None, True, "x", np.nan, 3e38]),
    (attention.flash_mla_sparse_fwd, PREFILL, "d_v", [None, 0, 33, 16.0]),
    (
        attention.flash_mla_sparse_fwd,
        PREFILL,
        "attn_sink",
        ["x", np.zeros(2), np.zeros(3, np.float32), np.zeros(4, np.float32)[::2]],
    ),
    (attention.flash_mla_sparse_fwd, PREFILL, "topk_length", ["x", np.zeros(4), CU]),
    (attention.flash_attn_varlen_func, VARLEN, "q", [*NOT_ARRAYS, HEADS.astype(int), HEADS[0]]),
    (attention.flash_attn_varlen_func, VARLEN, "k", [*NOT_ARRAYS, HEADS.astype(BF16), NO_ROWS]),
    (attention.flash_attn_varlen_func, VARLEN, "v", [*NOT_ARRAYS, HEADS[:2], HEADS[..., :0]]),
    *(
        (attention.flash_attn_varlen_func, VARLEN, name, [*NOT_ARRAYS, *NOT_STARTS])
        for name in ("cu_seqlens_qo", "cu_seqlens_kv")
    ),
    *(
        (attention.flash_attn_varlen_func, VARLEN, name, [None, -1, 1.5, "x"])
        for name in ("max_seqlen_qo", "max_seqlen_kv")
    ),
    (attention.flash_attn_varlen_func, VARLEN, "dropout_p", [0.5, None, "x"]),
    (attention.flash_attn_varlen_func, VARLEN, "softmax_scale", [True, "x", np.inf, 3e38]),
    *(
        (attention.flash_attn_varlen_func, VARLEN, name, ["x", 1.5, [1]])
        for name in ("causal", "deterministic", "is_varlen")
    ),
    (
        attention.flash_attn_varlen_func,
        {**VARLEN, "is_varlen": False},
        "cu_seqlens_qo",
        [whole(0, 1, 2, 4)],
    ),
    (attention.flash_attn_varlen_kvpacked_func, KV_PACKED, "kv", [*NOT_ARRAYS, HEADS]),
    (attention.flash_attn_varlen_kvpacked_func, KV_PACKED, "head_dim_qk", [None, 0, 48, 2.0]),
    (attention.flash_attn_varlen_qkvpacked_func, QKV_PACKED, "qkv", [*NOT_ARRAYS, HEADS]),
    (attention.flash_attn_varlen_qkvpacked_func, QKV_PACKED, "head_dim_qk", [None, 0, 40, 2.0]),
    (attention.flash_attn_varlen_qkvpacked_func, QKV_PACKED, "max_seqlen", [None, -1]),
    (
        attention.append_latent,
        APPEND,
        "latent",
        [*NOT_ARRAYS, np.zeros((4, 31), np.float32), np.zeros((3, 32), np.float32)],
    ),
    (attention.append_latent, APPEND, "rope", [*NOT_ARRAYS, np.zeros((4, 16), BF16)]),
    (
        attention.append_latent,
        APPEND,
        "cache",
        [
            *NOT_ARRAYS,
            *(np.zeros(shape, np.float32) for shape in ((2, 4, 48), (2, 4, 2, 48), (0, 4, 1, 48))),
            *(np.zeros((2, 4, 1, 48), dtype) for dtype in (np.uint8, np.int32)),
            np.zeros((2, 0, 1, 48), np.float32),
            np.zeros((2, 4, 1, 96), np.float32)[..., ::2],
            np.broadcast_to(np.float32(0), (2, 4, 1, 48)),
        ],
    ),
    (
        attention.append_latent,
        APPEND,
        "slots",
        [*NOT_ARRAYS, whole(0), whole(0, 1, 2, 8), whole(-2, 0, 0, 0), np.zeros(4)],
    ),
    (attention.append_latent, FP8, "latent", [np.zeros((4, 511), np.float32)]),
    (attention.append_latent, FP8, "rope", [np.zeros((4, 63), np.float32)]),
    (attention.append_latent, FP8, "cache", [np.zeros((2, 4, 1, 576), np.uint8), HEADS]),
    (attention.append_latent, FP8, "is_fp8_kvcache", ["x", 1.5]),
    (attention.merge_partials, MERGE, "out", [*NOT_ARRAYS, np.zeros((3, 2, 8)), CU * 1.0]),
    (attention.merge_partials, MERGE, "lse", [*NOT_ARRAYS, np.zeros((3, 2)), HEADS[0]]),
    (attention.dequantize_kv_cache, ROWS, "rows", [*NOT_ARRAYS, HEADS, np.zeros(655, np.uint8)]),
]


@pytest.mark.parametrize(
    ("function", "given", "argument", "wrong"),
    [pytest.param(*row, id=f"{row[0].__name__}-{row[2]}") for row in WRONG],
)
def test_a_refusal_names_function_argument_value_wish_and_remedy(
    function: Any, given: dict[str, Any], argument: str, wrong: list[Any]
) -> None:
    function(**given)
    for value in wrong:
        with pytest.raises(WhalefallError) as caught:
            function(**{**given, argument: value})
        assert_complete(str(caught.value), function.__name__, argument)
