"""A call after calls like it, beside the same call in a process that knows none."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from whalefall import jit
from whalefall.dtypes import KnownCalls, as_numpy, forget_calls

Arguments = dict[str, Any]


def outcome(call: Callable[[], Any]) -> Any:
    """What a call gives, down to bits and strides, or how it is refused (without addresses)."""
    try:
        given = call()
        return [described(one) for one in (given if isinstance(given, tuple) else (given,))]
    except Exception as error:
        return type(error), re.sub(r"0x[0-9a-f]+", "0x…", str(error))


def described(array: Any) -> Any:
    if array is None or array is True:
        return array
    seen = as_numpy(array)
    steps = [s for n, s in zip(seen.shape, seen.strides, strict=True) if n > 1]
    wants = getattr(array, "requires_grad", False)
    return type(array), seen.dtype, seen.shape, steps, wants, seen.tobytes()


@contextlib.contextmanager
def hits(table: KnownCalls) -> Iterator[list[bool]]:
    """Whether each call of a function was known, in order."""
    seen: list[bool] = []
    find = table.find

    def spy(*args: Any) -> Any:
        found = find(*args)
        seen.append(found is not None)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "find", spy)
        yield seen


def run(function: Callable[..., Any], arguments: Arguments, written: str | None) -> Any:
    """The outcome of a call and of what it wrote."""
    done = outcome(lambda: function(**arguments))
    left = None if written is None else outcome(lambda: arguments[written])
    return done, left


def assert_changes_are_seen(
    function: Callable[..., Any],
    table: KnownCalls,
    make: Callable[[], Arguments],
    change: Callable[[Arguments], Any],
    written: str | None = None,
) -> bool:
    """A changed call after calls of `make()` ends as it ends where none is known.

    Returns: whether the changed call was known.
    """
    forget_calls()
    changed = make()
    change(changed)
    wanted = run(function, changed, written)
    forget_calls()
    plain = run(function, make(), written)  # the long way
    run(function, make(), written)  # the first call with tensors only makes them known
    with hits(table) as seen:
        assert run(function, make(), written) == plain
        assert seen == [True], "a call like one before is not known"
        again = make()
        change(again)
        assert run(function, again, written) == wanted
    assert run(function, make(), written) == plain
    return seen[-1]


def assert_the_level_counts(
    function: Callable[..., Any], table: KnownCalls, make: Callable[[], Arguments]
) -> None:
    """A call is not known at a level that is forced after it, and then is."""
    for level in jit.levels():
        forget_calls()
        function(**make())
        with pytest.MonkeyPatch.context() as patch, hits(table) as seen:
            function(**make())
            patch.setenv("WHALEFALL_ISA", level)
            function(**make())
            function(**make())
        assert seen == [True, False, True]


def in_threads(work: Callable[[int], None], count: int = 4) -> None:
    """`work` in threads at once, each with its number."""
    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def sub_array(array: Any) -> Any:
    """The same memory as a subclass of ndarray."""
    return array.view(_Sub)


class _Sub(np.ndarray):  # type: ignore[type-arg]
    pass
