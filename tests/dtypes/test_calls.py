"""Known calls: what is part of a call's likeness, and what is looked at each time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.dtypes.adding import GIVEN, NEW, Add, floats, struct_of
from whalefall.dtypes import KnownCalls, Places, Result, forget_calls


def test_a_call_on_new_arrays_is_known_and_computed(entry: Any) -> None:
    table = KnownCalls("aaas", written=2, returns=2)
    first = (floats(1, 2), floats(3, 4), floats(0, 0), "k")
    assert table.find(*first) is None
    table.keep(first, GIVEN, struct_of(*first[:3]), entry)
    for i in range(300):
        x, y, to = floats(i, 2), floats(3, i), floats(0, 0)
        assert table.find(x, y, to, "k") is to
        assert to.tolist() == [i + 3, 2 + i]


def test_results_are_new_each_time_and_of_their_own_library(entry: Any) -> None:
    table = KnownCalls("aa")
    x = floats(1, 2, 3, 4, 5, 6)
    table.keep((x, None), NEW, struct_of(x, None), entry, [Result(x, (1, 2, 3), "float32", (1, 2))])
    made = [table.find(x * i, None) for i in range(3)]
    assert [one.ravel(order="K").tolist() for one in made[:2]] == [[1.0] * 6, [2, 3, 4, 5, 6, 7]]
    assert made[0].shape == (1, 3, 2)
    assert made[0].strides[1:] == (4, 12)
    assert made[0].flags.owndata
    assert made[0].flags.writeable
    t = torch.arange(6.0)
    struct = Add(t.data_ptr(), None, None, 6)
    table.keep((t, None), NEW, struct, entry, [Result(t, (1, 2, 3), "float32", (1, 2))])
    one = table.find(t + 1, None)
    assert type(one) is torch.Tensor
    assert one.shape == (1, 3, 2)
    assert one.stride()[1:] == (1, 3)
    assert one[0].T.ravel().tolist() == [2, 3, 4, 5, 6, 7]
    one.untyped_storage().resize_(100)  # its own memory


def readonly(x: Any) -> Any:
    x.flags.writeable = False
    return x


class Sub(np.ndarray):  # type: ignore[type-arg]
    pass


def numpy_others() -> dict[str, Any]:
    x = floats(1, 2, 3, 4)
    return {
        "shape": floats(1, 2, 3),
        "axes": x.reshape(1, 4),
        "strides": np.repeat(x, 2)[::2],
        "backwards": x[::-1],
        "dtype": x.view(np.int32),
        "other endian": x.astype(">f4"),
        "an unknown dtype": np.zeros(4, np.complex64),
        "structured": np.zeros(4, "i4,f4"),
        "objects": np.array([None] * 4),
        "read-only": readonly(x.copy()),
        "a subclass": x.view(Sub),
        "a masked array": np.ma.masked_array(x),
        "a record array": np.zeros(4, np.float32).view(np.recarray),
        "none": None,
        "a list": [1.0, 2.0, 3.0, 4.0],
        "a number": 1.0,
        "nothing": np.zeros(0, np.float32),
        "torch": torch.ones(4),
        "many axes": x.reshape((1,) * 12 + (4,)),
    }


@pytest.mark.parametrize("what", numpy_others())
def test_another_array_is_another_call(what: str, entry: Any) -> None:
    table = KnownCalls("aa")
    x = floats(1, 2, 3, 4)
    table.keep((x, None), NEW, struct_of(x, None), entry, [Result(x, (4,), "float32")])
    assert table.find(x, None) is not None
    assert table.find(numpy_others()[what], None) is None
    assert table.find(x, x) is None


def cut(first: int, held: int) -> torch.Tensor:
    t = torch.ones(4 + first)[first:]
    t.untyped_storage().resize_(held)
    return t


OTHER_TENSORS: dict[str, Callable[[], Any]] = {
    "numpy": lambda: floats(1, 2, 3, 4),
    "strides": lambda: torch.ones(8)[::2],
    "wants a gradient": lambda: torch.ones(4, requires_grad=True),
    "a parameter": lambda: torch.nn.Parameter(torch.ones(4)),
    "negative": lambda: torch._neg_view(torch.ones(4)),
    "cut": lambda: cut(0, 12),
    "freed": lambda: cut(0, 0),
    "freed, off its start": lambda: cut(1, 0),
    "meta": lambda: torch.ones(4, device="meta"),
    "sparse": lambda: torch.ones(4).to_sparse(),
    "int": lambda: torch.ones(4, dtype=torch.int32),
    "complex": lambda: torch.ones(4, dtype=torch.complex64),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(4), 1.0, 0, torch.qint8),
    "zero": lambda: torch._efficientzerotensor((4,)),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(4)]),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("what", OTHER_TENSORS)
def test_another_tensor_is_another_call(what: str, entry: Any) -> None:
    table, t = KnownCalls("aa"), torch.ones(4)
    table.keep((t, None), NEW, Add(t.data_ptr(), None, None, 4), entry, [Result(t, (4,), "int32")])
    assert table.find(t, None) is not None
    assert table.find(OTHER_TENSORS[what](), None) is None


def test_a_gradient_counts_only_while_torch_records(entry: Any) -> None:
    table, t = KnownCalls("aa"), torch.nn.Parameter(torch.ones(4))
    with torch.no_grad():
        struct = Add(t.data_ptr(), None, None, 4)
        table.keep((t, None), NEW, struct, entry, [Result(t, (4,), "float32")])
        assert table.find(t, None).tolist() == [2.0] * 4
        assert not table.find(t, None).requires_grad
    assert table.find(t, None) is None
    with torch.inference_mode():
        assert table.find(t, None).is_inference()


def test_what_torch_wraps_is_left_to_python(entry: Any) -> None:
    table, t, found = KnownCalls("aa"), torch.ones(4), []
    table.keep((t, None), NEW, Add(t.data_ptr(), None, None, 4), entry, [Result(t, (4,), "int32")])

    def look(x: Any) -> Any:
        found.append(table.find(x, None))
        return x.sum()

    torch.func.grad(look)(t)
    torch.func.vmap(look)(torch.ones(2, 4))
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        look(mode.from_tensor(t))
        found.append(table.find(t, None))
    assert found == [None] * 4
    assert table.find(t, None) is not None


PLAIN = [
    *(1, 2, 1.0, 2.0, True, False, None, 0, 0.0, -0.0, "1", "", "k", "nk", (1,), (1, 2), ()),
    *((1.0,), ((1,),), (True,), 2**40, -1, "a longer text than one word", "a longer text than two"),
]


def test_plain_values_count_with_their_types(entry: Any) -> None:
    x = floats(1)
    for value in PLAIN:
        table = KnownCalls("as")
        alone = Places(Add, {"x": 0}, {"to": 0}, status=True)
        table.keep((x, value), alone, struct_of(x, None), entry, [Result(x, (1,), "float32")])
        known = [other for other in PLAIN if table.find(x, other) is not None]
        assert [repr(other) for other in known] == [repr(value)]
        for odd in (
            2**70,
            [1],
            {},
            object(),
            np.int64(1),
            np.float64(1),
            "\ud800",
            (((((1,),),),),),
        ):
            assert table.find(x, odd) is None


def test_some_arguments_count_by_class_or_not_at_all(entry: Any) -> None:
    class Schedule:
        pass

    table, x = KnownCalls("aonm", classes=(Schedule,)), floats(1)
    alone = Places(Add, {"x": 0}, {"to": 0}, status=True)
    args = (x, Schedule(), 5, 5)
    made = Result(x, (1,), "float32")
    table.keep(args, alone, struct_of(x, None), entry, [made])
    assert table.find(x, Schedule(), 0, 1) is not None
    for odd in ((None, 0, 1), (x, 0, 1), (3, 0, 1)):
        assert table.find(x, *odd) is None
    table.keep((x, np.zeros(2, np.int32), 5, 5), alone, struct_of(x, None), entry, [made])
    assert table.find(x, np.ones(2, np.int32), 0, 1) is not None
    for array in (np.zeros(2, np.float32), np.zeros(3, np.int32)):
        assert table.find(x, array, 0, 1) is None
    for odd in ((-1, 1), (0, 0), (1.0, 1), (True, 1), (0, np.int64(1)), (2**70, 1)):
        assert table.find(x, Schedule(), *odd) is None


def test_the_level_that_is_forced_counts(entry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    table, x = KnownCalls("aa"), floats(1)
    table.keep((x, None), NEW, struct_of(x, None), entry, [Result(x, (1,), "float32")])
    assert table.find(x, None) is not None
    monkeypatch.setenv("WHALEFALL_ISA", "any")
    assert table.find(x, None) is None
    monkeypatch.delenv("WHALEFALL_ISA")
    assert table.find(x, None) is not None


def test_where_a_result_may_meet_an_input_python_looks(entry: Any) -> None:
    table = KnownCalls("aaa", written=2, returns=2)
    x, y, to = floats(1, 2), floats(1, 2), floats(0, 0)
    table.keep((x, y, to), GIVEN, struct_of(x, y, to), entry)
    assert table.find(x, y, to) is to
    room = np.zeros(8, np.float32)
    for first in range(-1, 2):
        assert table.find(x, room[3 + first : 5 + first], room[3:5]) is None
        assert table.find(room[3 + first : 5 + first], y, room[3:5]) is None
    assert table.find(room[:2], room[4:6], room[2:4]) is not None


def test_an_accumulator_is_the_result_itself_or_apart(entry: Any) -> None:
    def known(kept: Any, given: Any) -> bool:
        table = KnownCalls("aaa", written=2, accumulator=1, returns=2)
        table.keep(kept, GIVEN, struct_of(*kept), entry)
        return table.find(*given) is not None

    x, y, to, room = floats(1, 2), floats(1, 2), floats(0, 0), np.zeros(8, np.float32)
    assert known((x, y, to), (y, x, room[:2]))
    assert known((x, to, to), (x, y, y))
    assert not known((x, y, to), (x, to, to))
    assert not known((x, to, to), (x, y, to))
    assert not known((x, y, to), (x, room[1:3], room[:2]))


def test_a_refusal_by_the_kernel_is_left_to_python(entry: Any) -> None:
    table, x = KnownCalls("aa"), floats(1, 2)
    table.keep((x, None), NEW, struct_of(x, None), entry, [Result(x, (2,), "float32")])
    assert table.find(-x, None) is None
    assert table.find(x, None).tolist() == [2, 3]


def test_a_struct_that_points_elsewhere_is_not_kept(entry: Any) -> None:
    table, x, y = KnownCalls("aa"), floats(1, 2), floats(3, 4)
    result = [Result(x, (2,), "float32")]
    table.keep((x, y), NEW, struct_of(x.copy(), y), entry, result)  # a copy that passes away
    table.keep((x, None), NEW, struct_of(x, y), entry, result)  # a pointer that nobody gave
    table.keep((x, y), Places(Add, {"x": 0}, {"to": 0}), struct_of(x, y), entry, result)
    table.keep((x, y), NEW, struct_of(x, y), lambda address: 0, result)  # numpy's kernel
    assert table.find(x, y) is None
    assert table.find(x, None) is None


def test_the_oldest_call_goes_first(entry: Any) -> None:
    table, most = KnownCalls("aas"), 256
    x = floats(1)
    for i in range(most + 10):
        table.keep((x, None, i), NEW, struct_of(x, None), entry, [Result(x, (1,), "float32")])
    known = [table.find(x, None, i) is not None for i in range(most + 10)]
    assert known == [False] * 10 + [True] * most
    forget_calls()
    assert table.find(x, None, most) is None


def test_pairs_may_be_tuples_or_lists(entry: Any) -> None:
    table, x, y = KnownCalls("p"), floats(1, 2), floats(3, 4)
    table.keep(((x, y),), NEW, struct_of(x, y), entry, [Result(x, (2,), "float32")])
    assert table.find([y, x]).tolist() == [4, 6]
    for odd in ((x,), (x, y, x), x, None, {0: x, 1: y}):
        assert table.find(odd) is None
