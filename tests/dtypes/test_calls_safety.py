"""Known calls leave references and memory alone, in threads and where a library is unknown."""

from __future__ import annotations

import gc
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.dtypes.adding import GIVEN, NEW, Add, floats, struct_of
from tests.known_calls import in_threads
from whalefall.dtypes import KnownCalls, Result
from whalefall.dtypes import native_calls as native_module
from whalefall.dtypes.native_calls import native


def test_references_are_left_as_they_were(entry: Any) -> None:
    table = KnownCalls("pasoa", written=2)
    x, y, to, text = floats(1, 2), floats(3, 4), floats(0, 0), "".join(["t", "ext"])
    args = ((x, y), to, text, None, None)
    table.keep(args, GIVEN, struct_of(x, y, to), entry)
    made = KnownCalls("aa")
    for like in (x, torch.ones(2)):
        struct = Add(torch.as_tensor(like).data_ptr(), None, None, 2)
        made.keep((like, None), NEW, struct, entry, [Result(like, (2,), "float32")])
    t, floating = torch.ones(2), np.dtype(np.float32)
    things = [x, y, to, text, args[0], t, floating, None, True]
    odd = [
        ((x,), to, text, None, None),
        ((x, x), x, text, 3, None),
        ((-x, y), to, text, None, None),
    ]

    def work() -> None:
        for _ in range(1000):
            assert table.find(*args)
            assert [table.find(*one, None, None) for one in odd] == [None] * 3
            made.find(x, None), made.find(t, None)

    work()
    gc.collect()
    before = [sys.getrefcount(one) for one in things]
    work()
    gc.collect()
    after = [sys.getrefcount(one) for one in things]
    assert [b - a for a, b in zip(before[:-2], after[:-2], strict=True)] == [0] * (len(things) - 2)
    assert all(abs(b - a) < 50 for a, b in zip(before[-2:], after[-2:], strict=True))


def test_memory_is_given_back(entry: Any) -> None:
    table, x = KnownCalls("aa"), np.ones(1 << 20, np.float32)
    for like in (x, torch.ones(1 << 20)):
        struct = Add(torch.as_tensor(like).data_ptr(), None, None, 1 << 20)
        table.keep((like, None), NEW, struct, entry, [Result(like, like.shape, "float32")])
        for _ in range(20):
            assert table.find(like, None) is not None
        before = resident()
        for _ in range(100):  # 400 MB, were it kept
            assert table.find(like, None) is not None
        assert resident() - before < 50 << 20


def resident() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * 4096


def test_threads_call_at_once(entry: Any) -> None:
    table, wrong = KnownCalls("aas"), []
    for n in (3, 1000):
        x = np.ones(n, np.float32)
        table.keep((x, None, 0), NEW, struct_of(x, None), entry, [Result(x, (n,), "float32")])

    def work(number: int) -> None:
        for i in range(2000):
            x = np.full((3, 1000)[i % 2], number * 10_000 + i, np.float32)
            given = table.find(x, None, 0)
            if given is None or (given != x + 1).any():
                wrong.append(i)
            if i % 50 == 0:  # plans come and go meanwhile
                y = np.ones(2, np.float32)
                args = (y, None, number * 10_000 + i + 1)
                table.keep(args, NEW, struct_of(y, None), entry, [Result(y, (2,), "float32")])

    in_threads(work)
    assert not wrong


def test_a_memory_mapped_array_is_an_array(entry: Any, tmp_path: Path) -> None:
    table, x = KnownCalls("aa"), np.memmap(tmp_path / "w", np.float32, "w+", shape=(4,))
    table.keep((x, None), NEW, struct_of(x, None), entry, [Result(x, (4,), "float32")])
    assert type(table.find(x, None)) is np.ndarray
    assert table.find(np.memmap(tmp_path / "w", np.float32, "r", shape=(4,)), None) is None


def test_every_dtype_is_told_from_every_other(entry: Any) -> None:
    from whalefall.dtypes import NUMPY_DTYPES

    arrays = [np.zeros(3, dtype) for dtype in NUMPY_DTYPES.values()]
    arrays += [torch.zeros(3, dtype=getattr(torch, name)) for name in NUMPY_DTYPES]
    loaded = native()
    assert loaded is not None
    loaded.meet_torch()
    words = [tuple(loaded.read(one)[3:]) for one in arrays]  # type: ignore[index]
    assert len(set(words)) == len(arrays)


@pytest.mark.parametrize("what", ["implementation", "gil", "basicsize", "numpy"])
def test_an_unknown_python_or_numpy_goes_the_long_way(
    what: str, entry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    native_module._found.clear()
    if what == "implementation":
        monkeypatch.setattr(sys.implementation, "name", "other")
    elif what == "gil":
        monkeypatch.setattr(native_module.sysconfig, "get_config_var", lambda name: 1)
    elif what == "basicsize":
        monkeypatch.setattr(native_module, "_HEAD", 8)
    else:
        monkeypatch.setattr(native_module, "_expected", lambda array: [])
    try:
        assert native() is None
        table, x = KnownCalls("aa"), floats(1)
        table.keep((x, None), NEW, struct_of(x, None), entry, [Result(x, (1,), "float32")])
        assert table.find(x, None) is None
    finally:
        monkeypatch.undo()
        native_module._found.clear()
        assert native() is not None


def test_a_torch_that_is_read_wrong_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = native()
    assert loaded is not None
    right: Callable[[Any], list[int]] = native_module._expected
    tries = itertools.count()
    monkeypatch.setattr(
        native_module, "_expected", lambda array: right(array) + [0] * (next(tries) == 2)
    )
    loaded.torch = None
    loaded.meet_torch()
    assert loaded.torch is False
    assert loaded.read(torch.ones(2)) is None
    monkeypatch.undo()
    loaded.torch = None
    loaded.meet_torch()
    assert loaded.torch is True
    assert loaded.read(torch.ones(2)) is not None
