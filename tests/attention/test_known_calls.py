"""Attention that is known: any change of a call is seen as by a first call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from tests.known_calls import (
    Arguments,
    assert_changes_are_seen,
    assert_the_level_counts,
    sub_array,
)
from whalefall import attention
from whalefall.attention import decode, sparse, varlen
from whalefall.dtypes import restore

BF16 = ml_dtypes.bfloat16
DECODE = attention.flash_mla_with_kvcache


def values(*shape: int) -> Any:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(BF16)


def whole(*numbers: int) -> Any:
    return np.array(numbers, np.int32)


def of_dense() -> Arguments:
    metadata, _ = attention.get_mla_metadata()
    return {
        "q": values(2, 2, 2, 64),
        "k_cache": values(4, 4, 1, 64),
        "block_table": np.array([[0, 1], [2, 3]], np.int32),
        "cache_seqlens": whole(5, 8),
        "head_dim_v": 32,
        "tile_scheduler_metadata": metadata,
    }


def of_older_habit() -> Arguments:
    schedule = {"tile_scheduler_metadata": np.zeros((2, 8), np.int32), "num_splits": whole(0, 1, 2)}
    return {**of_dense(), **schedule}


def of_fp8() -> Arguments:
    rows = np.random.default_rng(0).integers(0, 100, (4, 4, 1, 656)).astype(np.uint8)
    return {**of_dense(), "q": values(2, 2, 2, 576), "k_cache": rows, "is_fp8_kvcache": True}


def of_sparse() -> Arguments:
    return {
        **of_dense(),
        "indices": np.arange(12, dtype=np.int32).reshape(2, 2, 3),
        "attn_sink": np.ones(2, np.float32),
        "topk_length": whole(2, 3),
    }


def of_two_caches() -> Arguments:
    more = {"extra_k_cache": values(2, 4, 1, 64), "extra_topk_length": whole(1, 2)}
    index = np.arange(8, dtype=np.int32).reshape(2, 2, 2)
    return {**of_sparse(), **more, "extra_indices_in_kvcache": index}


def of_prefill() -> Arguments:
    return {
        "q": values(3, 2, 64),
        "kv": values(9, 1, 64),
        "indices": np.arange(12, dtype=np.int32).reshape(3, 1, 4),
        "sm_scale": 0.1,
        "d_v": 32,
        "attn_sink": np.ones(2, np.float32),
        "topk_length": whole(1, 2, 3),
    }


def of_varlen() -> Arguments:
    return {
        "q": values(5, 2, 48),
        "k": values(7, 1, 48),
        "v": values(7, 1, 32),
        "cu_seqlens_qo": whole(0, 2, 5),
        "cu_seqlens_kv": whole(0, 3, 7),
        "max_seqlen_qo": 3,
        "max_seqlen_kv": 4,
    }


def with_torch(make: Callable[[], Arguments]) -> Callable[[], Arguments]:
    def made() -> Arguments:
        return {
            name: restore(one, torch.empty(0)).clone() if isinstance(one, np.ndarray) else one
            for name, one in make().items()
        }

    return made


CALLS: dict[str, tuple[Any, Any, Callable[[], Arguments]]] = {
    "dense": (DECODE, decode._CALLS, of_dense),
    "older habit": (DECODE, decode._CALLS, of_older_habit),
    "fp8": (DECODE, decode._CALLS, of_fp8),
    "sparse": (DECODE, decode._CALLS, of_sparse),
    "two caches": (DECODE, decode._CALLS, of_two_caches),
    "prefill": (attention.flash_mla_sparse_fwd, sparse._CALLS, of_prefill),
    "varlen": (attention.flash_attn_varlen_func, varlen._CALLS, of_varlen),
}
CALLS |= {f"{name}, torch": (f, t, with_torch(m)) for name, (f, t, m) in CALLS.items()}


def frozen(array: Any) -> Any:
    array.flags.writeable = False
    return array


def spaced(array: Any) -> Any:
    room = np.zeros((*array.shape[:-1], array.shape[-1] * 2), array.dtype)
    room[..., ::2] = array
    return room[..., ::2]


def wide(array: Any) -> Any:
    room = np.zeros((*array.shape[:-1], array.shape[-1] + 3), array.dtype)
    room[..., : array.shape[-1]] = array
    return room[..., : array.shape[-1]]


def freed(tensor: Any) -> Any:
    tensor.untyped_storage().resize_(0)
    return tensor


def wanting(tensor: Any) -> Any:
    return tensor.requires_grad_() if tensor.is_floating_point() else freed(tensor)


NUMPY: dict[str, Callable[[Any], Any]] = {
    "float32": lambda a: a.astype(np.float32),
    "float16": lambda a: a.astype(np.float16),
    "int64": lambda a: a.astype(np.int64),
    "backwards": lambda a: a[::-1],
    "columns backwards": lambda a: a[..., ::-1],
    "spaced": spaced,
    "wide rows": wide,
    "turned": np.asfortranarray,
    "read-only": frozen,
    "a subclass": sub_array,
    "torch": lambda a: restore(a, torch.empty(0)),
}
BOTH: dict[str, Callable[[Any], Any]] = {
    "one less": lambda a: a[:-1],
    "a column less": lambda a: a[..., :-1],
    "none in it": lambda a: a[:0],
    "no column": lambda a: a[..., :0],
    "one axis": lambda a: a.reshape(-1),
    "an axis more": lambda a: a[None],
    "numbers": lambda a: a.tolist(),
    "none": lambda a: None,
}
TORCH: dict[str, Callable[[Any], Any]] = {
    "freed": freed,
    "wants a gradient": wanting,
    "meta": lambda t: t.to("meta"),
    "negative": lambda t: torch._neg_view(t) if t.is_floating_point() else t,
}


@pytest.mark.parametrize("call", CALLS)
def test_a_changed_array_is_seen(call: str) -> None:
    function, table, make = CALLS[call]
    of_torch = "torch" in call
    for name, value in make().items():
        if not hasattr(value, "shape"):
            continue
        for change in {**BOTH, **(TORCH if of_torch else NUMPY)}.values():
            assert_changes_are_seen(
                function, table, make, lambda g, n=name, c=change: g.update({n: c(g[n])})
            )


VALUES: dict[str, list[Any]] = {
    "head_dim_v": [16, 32.0, True, np.int64(32), 0, 65, None, "32"],
    "d_v": [16, 32.0, True, np.int64(32), 0, 65, None],
    "softmax_scale": [0.5, 1, True, float("nan"), float("inf"), np.float32(0.5), "1", 1e39],
    "sm_scale": [0.5, 1, True, float("nan"), np.float64(0.1), None],
    "causal": [True, 1, 0, 1.0, np.True_, None, "yes"],
    "is_fp8_kvcache": [True, 1, 1.0, np.True_],
    "tile_scheduler_metadata": [None, 3, np.zeros(3, np.int32), attention.FlashMLASchedMeta],
    "num_splits": [3, np.zeros(3, np.int32), "x"],
    "max_seqlen_qo": [0, -1, 1.0, np.int32(3), True, np.array(3), None],
    "dropout_p": [0, 0.1, False, -0.0, None],
    "deterministic": [True, 1.0, 1],
    "is_varlen": [False, 0, 1],
    "attn_sink": [np.zeros(2, np.float32), np.zeros(3, np.float32), np.zeros(2)],
    "topk_length": [whole(0, 9), whole(1), whole(1, 2, 3)],
    "indices": [np.full((2, 2, 3), -1, np.int32), np.full((2, 2, 3), 99, np.int32)],
}


@pytest.mark.parametrize("call", CALLS)
def test_a_changed_value_is_seen(call: str) -> None:
    function, table, make = CALLS[call]
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    for name in set(VALUES) & set(names):
        for value in VALUES[name]:
            assert_changes_are_seen(
                function, table, make, lambda g, n=name, v=value: g.update({n: v})
            )


HELD: list[tuple[str, str, Any]] = [
    *(("dense", "cache_seqlens", one) for one in ([5, 9], [-1, 8], [0, 0], [1, 2])),
    *(("dense", "block_table", one) for one in ([[0, 9], [2, 3]], [[0, -1], [2, 3]], [[1, 1]] * 2)),
    *(("sparse", "indices", one) for one in ([[[0, 99, -5]] * 2] * 2, [[[3, 3, 3]] * 2] * 2)),
    *(("sparse", "topk_length", one) for one in ([-1, 9], [0, 0])),
    *(("prefill", "indices", one) for one in ([[[0, 99, -5, 8]]] * 3,)),
    *(("varlen", "cu_seqlens_qo", one) for one in ([1, 2, 5], [0, 3, 2], [0, 2, 6], [0, 0, 5])),
    *(("varlen", "cu_seqlens_kv", one) for one in ([0, 8, 7], [0, 3, 8], [-1, 3, 7], [0, 0, 0])),
]


@pytest.mark.parametrize(("call", "name", "held"), HELD)
@pytest.mark.parametrize("library", ["", ", torch"])
def test_what_arrays_hold_is_looked_at_each_time(
    call: str, name: str, held: Any, library: str
) -> None:
    function, table, make = CALLS[call + library]

    def change(given: Arguments) -> None:
        given[name][...] = restore(np.array(held, np.int32), given[name])

    assert_changes_are_seen(function, table, make, change)


@pytest.mark.parametrize("call", CALLS)
def test_the_level_is_part_of_a_call(call: str) -> None:
    assert_the_level_counts(*CALLS[call])


@pytest.mark.parametrize("call", CALLS)
def test_results_of_known_calls_are_arrays_of_their_own(call: str) -> None:
    function, _, make = CALLS[call]
    given = [function(**make()) for _ in range(4)]
    first = [bytes(np.asarray(one.tolist(), np.float32)) for one in given[0]]
    for results in given[1:3]:
        for one in results:
            one[...] = 0
    assert [bytes(np.asarray(one.tolist(), np.float32)) for one in given[3]] == first
