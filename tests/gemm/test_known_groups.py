"""Grouped products that are known: any change of a call is seen as by a first call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from tests.gemm.test_known_calls import scales, values, with_torch
from tests.known_calls import (
    Arguments,
    assert_changes_are_seen,
    assert_the_level_counts,
    sub_array,
)
from whalefall import gemm
from whalefall.dtypes import restore
from whalefall.gemm import grouped

BF16, F8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn


@pytest.fixture(autouse=True)
def alignment() -> Iterator[None]:
    before = gemm.get_mk_alignment_for_contiguous_layout()
    gemm.set_mk_alignment_for_contiguous_layout(4)
    yield
    gemm.set_mk_alignment_for_contiguous_layout(before)


def whole(*numbers: int) -> Any:
    return np.array(numbers, np.int32)


def of_index() -> Arguments:
    a, b = (values(9, 128, dtype=F8), scales(9, 1)), (values(3, 5, 128, dtype=F8), scales(3, 1, 1))
    layout = whole(0, 0, -1, 2, 2, 2, -1, 1, 0)
    return {"a": a, "b": b, "d": np.ones((9, 5), BF16), "grouped_layout": layout}


def of_index_nn() -> Arguments:
    given, b = of_index(), values(3, 128, 5, dtype=F8)
    return {**given, "b": (b, scales(3, 1, 1))}


def of_ends() -> Arguments:
    return {**of_index(), "grouped_layout": whole(3, 4, 9), "use_psum_layout": True}


def of_ends_with_gaps() -> Arguments:
    return {**of_ends(), "ensure_zero_padding": False}


def of_bf16() -> Arguments:
    return {**of_index(), "a": values(9, 64), "b": values(3, 5, 64)}


def of_masked() -> Arguments:
    a = values(3, 4, 128, dtype=F8), scales(3, 4, 1)
    d, counts = np.ones((3, 4, 5), np.float32), whole(4, 0, 2)
    return {"a": a, "b": of_index()["b"], "d": d, "masked_m": counts, "expected_m": 2}


def of_bf16_masked() -> Arguments:
    return {**of_masked(), "a": values(3, 4, 64), "b": values(3, 5, 64)}


CALLS: dict[str, tuple[Any, Any, Callable[[], Arguments]]] = {
    "index": (gemm.m_grouped_fp8_gemm_nt_contiguous, grouped._FP8_CALLS, of_index),
    "index nn": (gemm.m_grouped_fp8_gemm_nn_contiguous, grouped._FP8_CALLS, of_index_nn),
    "ends": (gemm.m_grouped_fp8_gemm_nt_contiguous, grouped._FP8_CALLS, of_ends),
    "ends, gaps": (gemm.m_grouped_fp8_gemm_nt_contiguous, grouped._FP8_CALLS, of_ends_with_gaps),
    "bf16": (gemm.m_grouped_bf16_gemm_nt_contiguous, grouped._BF16_CALLS, of_bf16),
    "masked": (gemm.m_grouped_fp8_gemm_nt_masked, grouped._FP8_MASKED, of_masked),
    "bf16 masked": (gemm.m_grouped_bf16_gemm_nt_masked, grouped._BF16_MASKED, of_bf16_masked),
}
CALLS |= {f"{name}, torch": (f, t, with_torch(m)) for name, (f, t, m) in CALLS.items()}
WHOSE = ("grouped_layout", "masked_m")


def assert_seen(call: str, change: Callable[[Arguments], Any], written: str | None = "d") -> bool:
    function, table, make = CALLS[call]
    return assert_changes_are_seen(function, table, make, change, written)


SOUND = [
    *(("index", held) for held in ([0] * 9, [-1] * 9, [0, 1, 2] * 3, [2, 1, 0, -1] * 2 + [0])),
    *(("index nn", [1] * 9), ("bf16", [1] * 9), ("bf16", [0, -1] * 4 + [2])),
    *(("ends", held) for held in ([0, 0, 0], [9, 9, 9], [2, 6, 9], [1, 5, 8], [-5, 2, 3])),
    *(("ends", held) for held in ([4, 3, 9], [-(2**31)] * 3)),
    *(("masked", held) for held in ([0, 0, 0], [4, 4, 4], [1, 2, 3])),
    ("bf16 masked", [0, 4, 0]),
]
UNSOUND = [
    *(("index", held) for held in ([0] * 8 + [3], [-2] + [0] * 8, [2**31 - 1] + [0] * 8)),
    *(("index nn", [0] * 8 + [3]), ("bf16", [0] * 8 + [3]), ("bf16", [-2] * 9)),
    *(("ends", held) for held in ([10, 9, 9], [3, 4, 10])),
    *(("masked", held) for held in ([5, 0, 0], [0, 0, -1])),
    *(("bf16 masked", held) for held in ([1, 2, 5], [-1, 0, 0])),
]


@pytest.mark.parametrize(("call", "held"), SOUND + UNSOUND)
@pytest.mark.parametrize("library", ["", ", torch"])
def test_whose_rows_are_whose_is_looked_at_each_time(call: str, held: Any, library: str) -> None:
    def change(given: Arguments) -> None:
        array = given[next(name for name in WHOSE if name in given)]
        array[...] = restore(np.array(held, np.int32), array)

    assert assert_seen(call + library, change) == ((call, held) in SOUND)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "float32": lambda a: a.astype(np.float32),
    "one less": lambda a: a[:-1],
    "a column less": lambda a: a[..., :-1],
    "none in it": lambda a: a[:0],
    "backwards": lambda a: a[::-1],
    "columns backwards": lambda a: a[..., ::-1],
    "turned": np.asfortranarray,
    "spaced": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "spaced rows": lambda a: np.repeat(a, 2, axis=0)[::2],
    "a subclass": sub_array,
    "torch": lambda a: restore(a, torch.empty(0)),
    "int64": lambda a: a.astype(np.int64),
    "none": lambda a: None,
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("call", [name for name in CALLS if "torch" not in name])
def test_a_changed_array_is_seen(call: str, what: str) -> None:
    array = CHANGES[what]
    for name, value in CALLS[call][2]().items():
        if isinstance(value, tuple):
            assert_seen(call, lambda g, n=name: g.update({n: (array(g[n][0]), g[n][1])}))
            assert_seen(call, lambda g, n=name: g.update({n: (g[n][0], array(g[n][1]))}))
        elif isinstance(value, np.ndarray):
            left = None if name == "d" else "d"
            assert_seen(call, lambda g, n=name: g.update({n: array(g[n])}), left)


def frozen(given: Arguments) -> None:
    given["d"].flags.writeable = False


VALUES: list[Arguments] = [
    *({"use_psum_layout": value} for value in (True, False, 1, 0, 1.0, np.True_, None)),
    *({"ensure_zero_padding": value} for value in (False, True, 0, 1.0)),
    *({"expected_m_for_psum_layout": value} for value in (3, 0, -1, 1.0, True)),
    *({"expected_m": value} for value in (1, 7, 0, -1, 1.0, True, None, np.int64(3))),
    *({"compiled_dims": value} for value in ("mnk", "x", 3)),
    *({"recipe": value} for value in ((1, 128, 128), (1, 1, 128), (128, 128, 128), [1, 128, 128])),
]


@pytest.mark.parametrize("call", CALLS)
def test_a_changed_value_is_seen(call: str) -> None:
    for change in VALUES:
        assert_seen(call, lambda g, c=change: g.update(c))
    if "torch" not in call:
        assert_seen(call, frozen)
        assert_seen(call, lambda g: g.update(d=np.resize(g["d"], 200)[: g["d"].size][::-1]))


def test_a_result_over_an_input_is_seen() -> None:
    assert_seen("bf16", lambda g: g.update(d=g["a"][:, :5]))
    assert_seen("bf16", lambda g: g.update(d=g["b"].reshape(15, 64)[:9, :5]))
    assert_seen("bf16", lambda g: g.update(d=np.zeros((9, 10), BF16)[:, ::2]))

    def over_layout(given: Arguments) -> None:
        room = np.zeros((9, 5), np.int32)
        given.update(d=room.view(np.float32), grouped_layout=room[:, 2])

    assert_seen("bf16", over_layout)


def test_the_alignment_is_part_of_a_call() -> None:
    function, _, make = CALLS["ends"]
    given = []
    for alignment in (4, 2, 4, 2):
        gemm.set_mk_alignment_for_contiguous_layout(alignment)
        call = {**make(), "grouped_layout": whole(3, 6, 9)}
        function(**call)
        given.append(call["d"].tobytes())
    assert given[:2] == given[2:]
    assert given[0] != given[1]


@pytest.mark.parametrize("call", CALLS)
def test_the_level_is_part_of_a_call(call: str) -> None:
    assert_the_level_counts(*CALLS[call])


@pytest.mark.parametrize("alignment", [2**20, 2**62, 2**63 - 1])
def test_any_alignment_is_as_the_long_way_has_it(alignment: int) -> None:
    gemm.set_mk_alignment_for_contiguous_layout(alignment)
    assert assert_seen("ends", lambda g: g.update(grouped_layout=whole(3, 4, 8)))
