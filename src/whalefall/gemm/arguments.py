"""Plain arguments of the casts and layouts, checked: whole numbers, flags, sequences of them."""

from __future__ import annotations

import operator
from numbers import Integral
from typing import Any

import numpy as np

from whalefall.errors import ConfigError, DtypeError

__all__ = ["flag", "whole", "wholes"]


def whole(where: str, name: str, value: Any, least: int = 1) -> int:
    """`value` as an int of at least `least`; ConfigError that says where it was given."""
    try:
        found = operator.index(value)
    except (TypeError, ValueError, RuntimeError):  # the last: a tensor of several
        found = least - 1
    if found < least:
        raise ConfigError(f"{where}: {name} is {_shown(value)}, wanted a whole number >= {least}")
    return found


def wholes(where: str, name: str, values: Any, least: int = 1) -> list[int]:
    """A sequence of them."""
    try:
        items = list(values)
    except (TypeError, ValueError):
        raise DtypeError(f"{where}: {name} is {_shown(values)}, wanted whole numbers") from None
    return [whole(where, f"{name}[{i}]", item, least) for i, item in enumerate(items)]


def flag(where: str, name: str, value: Any) -> bool:
    """`value` as a bool; DtypeError for what is neither one nor a whole number."""
    if not isinstance(value, (Integral, np.bool_)):
        raise DtypeError(f"{where}: {name} is {_shown(value)}, wanted True or False")
    return bool(value)


def _shown(value: Any) -> str:
    """In one line, and short."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"a {value.dtype} array {list(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
