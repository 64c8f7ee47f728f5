"""A hash of what a task does, the same in every process: so that a re-run finds its results.

Pickled bytes will not do: they hold ids that differ from run to run, and line numbers. A function
counts by its code, defaults, closed-over values and the globals that its code names.
"""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["Memo", "fingerprint"]

# Objects already met, by id; held, since the id of a freed object is given out again.
Seen = dict[int, Any]


def fingerprint(*parts: Any) -> str:
    """32 hex digits that depend on the content of `parts` alone, as far as that can be told.

    An object of an unknown kind counts by its class and attributes, else by its pickled bytes; so
    in doubt two runs differ, and a task runs again.
    """
    digest = hashlib.sha256()
    for token in _tokens(parts, {}):
        digest.update(token)
        digest.update(b"\0")
    return digest.hexdigest()[:32]


class Memo:
    """Fingerprints of functions and classes, for the time of one planning.

    Thousands of tasks share a function, and what it refers to may be large.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, str]] = {}  # held, since ids are given out again

    def short(self, value: Any) -> Any:
        """The fingerprint of a function or class, anything else as it is."""
        if not callable(value):
            return value
        if id(value) not in self._known:
            self._known[id(value)] = value, fingerprint(value)
        return self._known[id(value)][1]


def _tokens(value: Any, seen: Seen) -> Iterator[bytes]:
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        yield f"{type(value).__name__}:{value!r}".encode()
        return
    if id(value) in seen:
        yield b"again"
        return
    if not isinstance(value, list | tuple | Mapping):  # which are compared by value, not identity
        seen[id(value)] = value
    yield type(value).__qualname__.encode()
    yield from _inner(value, seen)


def _inner(value: Any, seen: Seen) -> Iterator[bytes]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _tokens(item, seen)
    elif isinstance(value, set | frozenset):
        yield from sorted(fingerprint(item).encode() for item in value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tokens(key, seen)
            yield from _tokens(item, seen)
    elif isinstance(value, types.FunctionType):
        yield from _function(value, seen)
    elif isinstance(value, types.CodeType):
        yield from _code(value, seen)
    elif isinstance(value, types.MethodType):
        yield from _tokens((value.__func__, value.__self__), seen)
    elif isinstance(value, functools.partial):
        yield from _tokens((value.func, value.args, value.keywords), seen)
    elif isinstance(value, types.ModuleType):
        yield f"{value.__name__} {getattr(value, '__version__', '')}".encode()
        if not _installed(value.__name__):
            yield _source(value)
    elif isinstance(value, types.BuiltinFunctionType):
        yield f"{value.__module__}.{value.__qualname__}".encode()
    elif isinstance(value, type):
        yield from _class(value, seen)
    else:
        yield from _object(value, seen)


def _source(module: types.ModuleType) -> bytes:
    """The text of a module of the user's, so that an edited helper takes no stale results."""
    try:
        return Path(module.__file__ or "").read_bytes()
    except OSError:  # built in, or made at run time
        return b""


def _function(function: types.FunctionType, seen: Seen) -> Iterator[bytes]:
    if _installed(function.__module__):
        yield f"{function.__module__}.{function.__qualname__}".encode()
        return
    yield from _tokens(function.__code__, seen)
    yield from _tokens((function.__defaults__, function.__kwdefaults__), seen)
    for cell in function.__closure__ or ():
        try:
            yield from _tokens(cell.cell_contents, seen)
        except ValueError:  # not yet bound
            yield b"unbound"
    for name in sorted(_global_names(function.__code__)):
        if name in function.__globals__:
            yield name.encode()
            yield from _tokens(function.__globals__[name], seen)


def _code(code: types.CodeType, seen: Seen) -> Iterator[bytes]:
    yield code.co_code
    yield from _tokens((code.co_consts, code.co_names, code.co_varnames, code.co_freevars), seen)


def _global_names(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _global_names(constant)
    return names


def _class(kind: type, seen: Seen) -> Iterator[bytes]:
    yield f"{kind.__module__}.{kind.__qualname__}".encode()
    if _installed(kind.__module__):
        return
    yield from _tokens(kind.__bases__, seen)
    for name, value in sorted(vars(kind).items()):
        if isinstance(value, property):
            value = (value.fget, value.fset)
        elif isinstance(value, classmethod | staticmethod):
            value = value.__func__
        elif name.startswith("__") and not isinstance(value, types.FunctionType):
            continue  # slots, annotations, what decorators leave
        yield name.encode()
        yield from _tokens(value, seen)


def _installed(module: str | None) -> bool:
    """Whether a module belongs to an installed package or to Python itself, so counts by name."""
    import sys

    if module is None or module == "__main__":
        return False
    if module.split(".")[0] == "whalefall":
        return True
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return module in sys.builtin_module_names
    return "site-packages" in file or file.startswith((sys.base_prefix, sys.prefix))


def _object(value: Any, seen: Seen) -> Iterator[bytes]:
    yield from _tokens(type(value), seen)
    state = getattr(value, "__dict__", None)
    if state is not None and _plain(type(value)):
        yield from _tokens(state, seen)
        return
    import uuid

    import cloudpickle

    try:
        yield cloudpickle.dumps(value)
    except Exception:  # the executor will say so, with the task's name
        yield uuid.uuid4().bytes


def _plain(kind: type[Any]) -> bool:
    """Whether objects of a class are their `__dict__`, as far as pickling goes."""
    reduce_ex: Any = kind.__reduce_ex__
    return reduce_ex is object.__reduce_ex__
