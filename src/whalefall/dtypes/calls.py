"""Calls whose like has been checked before: a function skips its checks, whatever the arrays.

In: the arguments of a call. Out: its results, where a call with arguments of the same shapes,
strides, dtypes and plain values passed every check before; else None, and the function goes the
long way and has this call's native struct taken down.
Addresses are no part of it: arrays may be new each time. What hangs on addresses (overlap) or on
what arrays hold (lengths, groups) is checked natively in each call, and where it fails the long way
finds it again and has the words for it.
"""

from __future__ import annotations

import ctypes
from _ctypes import CFuncPtr
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from whalefall.dtypes.arrays import is_torch
from whalefall.dtypes.native_calls import Made, Native, aside, native, result

__all__ = ["KnownCalls", "Places", "Result", "forget_calls"]

_ARRAY, _RESULT, _WITHIN = 0, 1, 2
_FASTCALL = 0x0080
_tables: list[KnownCalls] = []


class _Patch(ctypes.Structure):
    """`wf::calls::Patch`."""

    _fields_ = (("offset", ctypes.c_int32), ("source", ctypes.c_int32), ("which", ctypes.c_int32))


class _Method(ctypes.Structure):
    """`PyMethodDef`."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    )


class Places:
    """Where a native struct has the addresses of a call; every other pointer in it is null.

    Args:
        struct: its ctypes mirror.
        arrays: a field ("paged.q") and the array argument it is the address of, counted through
            the call's arrays, a pair being two.
        results: a field and the number of the result.
        within: a field and the field of the struct that it points to.
        status: whether the entry returns one; what is not 0 was refused, before anything was
            written.
    """

    def __init__(
        self,
        struct: type[ctypes.Structure],
        arrays: Mapping[str, int],
        results: Mapping[str, int] | None = None,
        within: Mapping[str, str] | None = None,
        *,
        status: bool = False,
    ) -> None:
        fields = dict(_fields(struct))
        named = {name: (_ARRAY, which) for name, which in arrays.items()}
        named |= {name: (_RESULT, which) for name, which in (results or {}).items()}
        named |= {name: (_WITHIN, fields[to][0]) for name, to in (within or {}).items()}
        pointers = {name for name, (_, kind) in fields.items() if kind is ctypes.c_void_p}
        assert pointers >= named.keys(), sorted(named.keys() - pointers)
        patches = [
            _Patch(fields[name][0], *named.get(name, (_ARRAY, -1))) for name in sorted(pointers)
        ]
        self.patches = (_Patch * len(patches))(*patches)
        self.status = status


def _fields(struct: Any, at: int = 0, before: str = "") -> list[tuple[str, tuple[int, Any]]]:
    """Fields of a struct and of structs in it: dotted name, offset, ctypes type."""
    found: list[tuple[str, tuple[int, Any]]] = []
    for name, kind in struct._fields_:
        offset = at + getattr(struct, name).offset
        found.append((before + name, (offset, kind)))
        if issubclass(kind, ctypes.Structure):
            found += _fields(kind, offset, f"{before}{name}.")
    return found


class Result(NamedTuple):
    """A result that a call makes: as `empty_like`, with two axes swapped where wanted."""

    like: Any
    shape: Sequence[int]
    dtype: str
    turned: tuple[int, int] | None = None


def _nothing(*_: Any) -> None:
    """What a function knows before its first call."""


class KnownCalls:
    """The checked calls of one public function.

    Args:
        kinds: a letter for each argument of `find`. a: an array or None; p: a pair of arrays; s: a
            plain value; o: an object of which only the class counts, None, or an array that the
            call does not use, as it looks; n, m: None, or a whole number of at least 0 (n) or 1
            (m) that changes no result.
        written: the array that the call writes, counted as in `Places`; it meets no other array,
            but that `accumulator` may be the same.
        returns: the array to give back. Without it and without results, `find` gives True.
        classes: of arguments "o" beside arrays.

    Attributes:
        find: called with the arguments; the results of the call, done, or None.
    """

    def __init__(
        self,
        kinds: str,
        *,
        written: int = -1,
        accumulator: int = -1,
        returns: int = -1,
        classes: Sequence[type] = (),
    ) -> None:
        self.find: Any = _nothing
        self._given = (kinds.encode(), written, accumulator, returns)
        self._classes = tuple(classes)
        self._table: int | None = None
        self._method: _Method | None = None
        _tables.append(self)

    def keep(
        self,
        args: tuple[Any, ...],
        places: Places,
        struct: ctypes.Structure,
        entry: Any,
        results: Sequence[Result] = (),
    ) -> None:
        """Take down a call that has passed its checks and run.

        Args:
            args: what `find` was given.
            struct: the call's native struct; one that points to copies is not taken.
            entry: the ctypes function it was handed to, or numpy's in its place: nothing is kept.
            results: in order, without `like` being kept.
        """
        if not isinstance(entry, CFuncPtr) or (loaded := native()) is None:
            return
        if loaded.torch is None:
            loaded.meet_torch()
        if self._table is None:
            aside(lambda: self._begin(loaded))
        if self._table is None:
            return
        made = (Made * len(results))(*[result(is_torch(r[0]), *r[1:]) for r in results])
        loaded.library.wf_calls_keep(
            *(self._table, args, ctypes.addressof(struct), ctypes.sizeof(struct)),
            *(places.patches, len(places.patches), made, len(made)),
            *(ctypes.cast(entry, ctypes.c_void_p), places.status),
        )

    def _begin(self, loaded: Native) -> None:
        if self._table is not None:  # another thread was first
            return
        classes = (ctypes.c_void_p * len(self._classes))(*map(id, self._classes))
        library = loaded.library
        table = library.wf_calls_table(*self._given, classes, len(self._classes))
        find = ctypes.cast(library.wf_calls_find, ctypes.c_void_p).value
        self._method = _Method(b"find", find, _FASTCALL, None)
        make = ctypes.pythonapi.PyCFunction_NewEx
        make.restype = ctypes.py_object
        make.argtypes = [ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p]
        self.find = make(ctypes.addressof(self._method), table, None)
        self._table = table

    def forget(self) -> None:
        """Know no call any more."""
        if self._table is not None and (loaded := native()) is not None:
            loaded.library.wf_calls_forget(self._table)


def forget_calls() -> None:
    """Let every function go the long way once more: for whoever swaps what is behind them."""
    for table in _tables:
        table.forget()
