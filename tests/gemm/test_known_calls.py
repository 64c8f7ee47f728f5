"""Products and linear layers that are known: any change of a call is seen as by a first call."""

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
    in_threads,
    sub_array,
)
from whalefall import gemm
from whalefall.dtypes import forget_calls, restore
from whalefall.gemm.dense import _BF16_CALLS, _FP8_CALLS
from whalefall.gemm.linear import _CALLS

BF16, F8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
Change = Callable[[Arguments], Any]


def values(*shape: int, dtype: Any = BF16) -> Any:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(dtype)


def scales(*shape: int) -> Any:
    return np.random.default_rng(7).uniform(0.5, 2, shape).astype(np.float32)


def of_linear() -> Arguments:
    weight = values(5, 130, dtype=F8)
    return {"x": values(3, 130), "weight": weight, "scale": scales(1, 2)}


def of_linear_out() -> Arguments:
    return {**of_linear(), "out": np.zeros((3, 5), BF16)}


def of_plain_linear() -> Arguments:
    return {"x": values(3, 130), "weight": values(5, 130)}


def of_fp8() -> Arguments:
    a, b = values(3, 128, dtype=F8), values(5, 128, dtype=F8)
    return {"a": (a, scales(3, 1)), "b": (b, scales(1, 1)), "d": np.zeros((3, 5), BF16)}


def of_bf16() -> Arguments:
    return {"a": values(3, 64), "b": values(5, 64), "d": np.zeros((3, 5), np.float32)}


def of_sum() -> Arguments:
    return {**of_bf16(), "c": values(3, 5, dtype=np.float32)}


def of_sum_in_place() -> Arguments:
    given = of_bf16()
    return {**given, "c": given["d"]}


def with_torch(make: Callable[[], Arguments]) -> Callable[[], Arguments]:
    def tensor(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(tensor(one) for one in value)
        is_array = isinstance(value, np.ndarray)
        return restore(value, torch.empty(0)).clone() if is_array else value

    def made() -> Arguments:
        shared: dict[int, Any] = {}
        given = make()
        return {name: shared.setdefault(id(one), tensor(one)) for name, one in given.items()}

    return made


# name: function, table, arguments, what is written
CALLS: dict[str, tuple[Any, Any, Callable[[], Arguments], str | None]] = {
    "fp8_linear": (gemm.fp8_linear, _CALLS, of_linear, None),
    "fp8_linear out": (gemm.fp8_linear, _CALLS, of_linear_out, "out"),
    "linear": (gemm.linear, _CALLS, of_plain_linear, None),
    "fp8": (gemm.fp8_gemm_nt, _FP8_CALLS, of_fp8, "d"),
    "bf16": (gemm.bf16_gemm_nt, _BF16_CALLS, of_bf16, "d"),
    "cublaslt": (gemm.cublaslt_gemm_nt, _BF16_CALLS, of_bf16, "d"),
    "sum": (gemm.bf16_gemm_nt, _BF16_CALLS, of_sum, "d"),
    "sum in place": (gemm.bf16_gemm_nt, _BF16_CALLS, of_sum_in_place, "d"),
}
CALLS |= {f"{name}, torch": (f, t, with_torch(m), w) for name, (f, t, m, w) in CALLS.items()}


def each(array: Callable[[Any], Any]) -> dict[str, Change]:
    """The change of every array argument, one at a time, the parts of pairs too."""
    changes: dict[str, Change] = {}
    for name in ("x", "weight", "scale", "out", "a", "b", "d", "c"):
        for part in (None, 0, 1):
            changes[f"{name}{'' if part is None else part}"] = changed(name, part, array)
    return changes


def changed(name: str, part: int | None, array: Callable[[Any], Any]) -> Change:
    def change(given: Arguments) -> None:
        value = given.get(name)
        if value is None or isinstance(value, tuple) != (part is not None):
            pytest.skip("no such argument")
        if part is None:
            given[name] = array(value)
        else:
            given[name] = tuple(array(v) if i == part else v for i, v in enumerate(value))

    return change


def numpy_only(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def changed(array: Any) -> Any:
        if not isinstance(array, np.ndarray):
            pytest.skip("of numpy")
        return change(array)

    return changed


def torch_only(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def changed(array: Any) -> Any:
        if isinstance(array, np.ndarray):
            pytest.skip("of torch")
        return change(array)

    return changed


def frozen(array: Any) -> Any:
    array.flags.writeable = False
    return array


def spaced(array: Any) -> Any:
    room = np.zeros((array.shape[0], array.shape[1] * 2), array.dtype)
    room[:, ::2] = array
    return room[:, ::2]


def turned(array: Any) -> Any:
    return np.asfortranarray(array)


def wide(array: Any) -> Any:
    room = np.zeros((array.shape[0], array.shape[1] + 3), array.dtype)
    room[:, : array.shape[1]] = array
    return room[:, : array.shape[1]]


def freed(tensor: Any) -> Any:
    tensor.untyped_storage().resize_(0)
    return tensor


def wanting(tensor: Any) -> Any:
    return tensor.requires_grad_() if tensor.dtype != torch.float8_e4m3fn else freed(tensor)


def unaligned(array: Any) -> Any:
    room = np.zeros(array.nbytes + 1, np.uint8)[1:]
    moved = room.view(array.dtype).reshape(array.shape)
    moved[:] = array
    return moved


ARRAYS: dict[str, Callable[[Any], Any]] = {
    "float32": numpy_only(lambda a: a.astype(np.float32)),
    "float16": numpy_only(lambda a: a.astype(np.float16)),
    "a row less": lambda a: a[:-1],
    "a column less": lambda a: a[:, :-1],
    "no row": lambda a: a[:0],
    "no column": lambda a: a[:, :0],
    "one axis": lambda a: a.reshape(-1),
    "three axes": lambda a: a[None],
    "backwards": numpy_only(lambda a: a[::-1]),
    "columns backwards": numpy_only(lambda a: a[:, ::-1]),
    "spaced": numpy_only(spaced),
    "wide rows": numpy_only(wide),
    "turned": numpy_only(turned),
    "one row again and again": numpy_only(lambda a: np.broadcast_to(a[:1], a.shape)),
    "read-only": numpy_only(lambda a: frozen(a)),
    "a subclass": numpy_only(sub_array),
    "unaligned": numpy_only(unaligned),
    "other bytes": numpy_only(lambda a: a.astype(a.dtype.newbyteorder(">"))),
    "torch": numpy_only(lambda a: restore(a, torch.empty(0))),
    "freed": torch_only(freed),
    "wants a gradient": torch_only(wanting),
    "meta": torch_only(lambda t: t.to("meta")),
    "negative": torch_only(torch._neg_view),
    "numbers": lambda a: a.tolist() if a.dtype.itemsize > 1 else 3,
    "none": lambda a: None,
}


@pytest.mark.filterwarnings("ignore:Casting complex")
@pytest.mark.parametrize("what", ARRAYS)
@pytest.mark.parametrize("call", CALLS)
def test_a_changed_array_is_seen(call: str, what: str) -> None:
    function, table, make, written = CALLS[call]
    for name, change in each(ARRAYS[what]).items():
        try:
            change(make())
        except pytest.skip.Exception:
            continue
        left = None if written == name.rstrip("01") else written
        assert_changes_are_seen(function, table, make, change, left)


SCALARS: dict[str, Arguments] = {
    "form": {"form": "many"},
    "no form": {"form": "none"},
    "form of another type": {"form": 1},
    "quantised": {"quantize_activations": True},
    "quantised by a number": {"quantize_activations": 1},
    "quantised by an array": {"quantize_activations": np.True_},
    "quantised by 1.0": {"quantize_activations": 1.0},
    "out_dtype": {"out_dtype": "float32"},
    "no out_dtype": {"out_dtype": "int8"},
    "recipe": {"recipe": (1, 128, 128)},
    "a recipe of floats": {"recipe": (1.0, 128, 128)},
    "a wrong recipe": {"recipe": (1, 1, 128)},
    "a list of a recipe": {"recipe": [1, 128, 128]},
    "half a pair": {"recipe_a": (1, 128)},
    "compiled_dims": {"compiled_dims": "mn"},
    "wrong compiled_dims": {"compiled_dims": "x"},
    "a flag": {"disable_ue8m0_cast": True},
    "no flag": {"disable_ue8m0_cast": 2.0},
}


@pytest.mark.parametrize("call", CALLS)
def test_a_changed_value_is_seen(call: str) -> None:
    function, table, make, written = CALLS[call]
    for values in SCALARS.values():
        assert_changes_are_seen(function, table, make, lambda g, v=values: g.update(v), written)


def of_room(given: Arguments, shape: tuple[int, int], **parts: Callable[[Any], Any]) -> None:
    """Arguments that are parts of one array."""
    room = np.zeros(shape, BF16 if "a" in parts else np.float32)
    given.update({name: part(room) for name, part in parts.items()})


OVERLAPS: list[tuple[str, Change]] = [
    ("fp8_linear out", lambda g: g.update(out=g["x"][:, :5])),
    ("fp8_linear out", lambda g: g.update(out=g["weight"].view(BF16)[:3, :5])),
    ("fp8_linear out", lambda g: g.update(scale=(o := np.zeros((3, 5), "f4"))[:1, :2], out=o)),
    ("fp8", lambda g: g.update(d=g["a"][0].view(BF16)[:, :5])),
    ("fp8", lambda g: g.update(d=(o := np.zeros((3, 5), "f4")), a=(g["a"][0], o[:, :1]))),
    ("bf16", lambda g: g.update(d=g["a"][:, :5])),
    (
        "bf16",
        lambda g: of_room(g, (3, 80), a=lambda r: r[:, :64], d=lambda r: r[:, 70:75]),
    ),
    ("sum", lambda g: of_room(g, (3, 9), c=lambda r: r[:, 4:], d=lambda r: r[:, :5])),
    ("sum", lambda g: of_room(g, (3, 10), c=lambda r: r[:, 5:], d=lambda r: r[:, :5])),
    ("sum", lambda g: g.update(c=g["d"])),
    ("sum", lambda g: g.update(c=g["d"][::-1])),
    ("sum in place", lambda g: g.update(c=values(3, 5, dtype=np.float32))),
    ("sum in place", lambda g: g.update(c=g["d"][:])),
    ("sum in place", lambda g: g.update(c=g["d"].reshape(-1)[::-1][:15].reshape(3, 5))),
]


@pytest.mark.parametrize(("call", "change"), OVERLAPS)
def test_a_result_over_an_input_is_seen(call: str, change: Change) -> None:
    function, table, make, written = CALLS[call]
    assert_changes_are_seen(function, table, make, change, written)


@pytest.mark.parametrize("call", CALLS)
def test_the_level_is_part_of_a_call(call: str) -> None:
    function, table, make, _ = CALLS[call]
    assert_the_level_counts(function, table, make)


def test_every_layout_is_a_call_of_its_own() -> None:
    square, out = values(4, 4), np.zeros((4, 4), np.float32)
    forget_calls()
    for _ in range(2):
        for name in ("nt", "nn", "tn", "tt"):
            getattr(gemm, f"bf16_gemm_{name}")(square, square, out)
            a = square.astype(np.float32)
            left, right = (a.T if name[0] == "t" else a), (a.T if name[1] == "t" else a)
            np.testing.assert_allclose(out, left @ right, rtol=1e-2, atol=1e-2)


def test_a_call_on_freed_arrays_memory_is_a_call_like_others() -> None:
    d = np.zeros((3, 5), np.float32)
    for i in range(500):  # addresses and ids come back
        a, b = np.full((3, 64), i % 7, BF16), np.ones((5, 64), BF16)
        gemm.bf16_gemm_nt(a, b, d)
        assert (d == 64 * (i % 7)).all()
        del a, b


def test_packed_scales_are_unpacked_each_time() -> None:
    given = of_fp8()
    packed = gemm.pack_ue8m0_to_int(np.ones((3, 4), np.float32))
    other = gemm.pack_ue8m0_to_int(np.full((5, 4), 2, np.float32))
    d = given["d"]
    for scale in (2, 4, 8):
        packed[:] = gemm.pack_ue8m0_to_int(np.full((3, 4), scale, np.float32))
        gemm.fp8_gemm_nt((given["a"][0], packed[:, :1]), (given["b"][0], other[:, :1]), d)
        ones = np.full((3, 1), scale, np.float32), np.full((5, 1), 2, np.float32)
        wanted = np.zeros_like(d)
        pairs = (given["a"][0], ones[0]), (given["b"][0], ones[1])
        gemm.fp8_gemm_nt(*pairs, wanted, recipe=(1, 1, 128))
        assert d.tobytes() == wanted.tobytes()


def test_threads_compute_their_own_results() -> None:
    wrong: list[int] = []
    weight = np.ones((5, 128), BF16)

    def work(number: int) -> None:
        for i in range(300):
            x = np.full((1 + i % 3, 128), number + 1, BF16)
            if (gemm.linear(x, weight) != 128 * (number + 1)).any():
                wrong.append(i)

    in_threads(work)
    assert not wrong
