"""Ep room: numbers and flags as callers give them, checked before anything is told to other ranks.

A rank that fails after it has told the others is out of step with them; so what could fail later
(numbers that are none, truth values that arrays do not have) is refused here.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from whalefall.errors import ConfigError, DtypeError

__all__ = ["ADDRESSES", "MOST", "arrays", "engine_arguments", "flag", "seconds", "whole"]

MOST = (1 << 31) - 1  # what a header can carry
ADDRESSES = 1 << 46  # bytes of address space


def whole(value: Any, name: str, least: int = 0, most: int = MOST) -> int:
    """An integer within bounds.

    Raises: ConfigError.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ConfigError(f"{name} is {_short(value)}, wanted an integer of {least} or more")
    if not least <= value <= most:
        raise ConfigError(f"{name} is {_short(value)}, wanted {least} or more, up to {most}")
    return int(value)


def engine_arguments(group: Any, host: Any, **sizes: Any) -> None:
    """Raise ConfigError for what no engine can be made with; hidden and num_experts may be None."""
    if not hasattr(group, "all_gather") or not isinstance(host, str | None):
        got = type(group).__name__, type(host).__name__
        raise ConfigError(f"Engine: group and host are {got}, wanted an ep.Group and a str")
    least = {"hidden": 1, "num_experts": 1, "chunk_bytes": 512}
    for name, value in sizes.items():
        if value is not None or least.get(name) != 1:
            whole(value, f"Engine: {name}", least.get(name, 0), ADDRESSES)


def seconds(value: Any, name: str) -> float:
    """A time above 0.

    Raises: ConfigError.
    """
    try:
        given = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        given = math.nan
    if not 0 < given < 1e9:
        raise ConfigError(f"{name} is {_short(value)}, wanted seconds above 0")
    return given


def arrays(where: str, **given: Any) -> None:
    """Raise DtypeError for what is neither an array nor None."""
    for name, value in given.items():
        if value is not None and not isinstance(value, np.ndarray):
            raise DtypeError(f"ep: {where}: {name} is {_short(value)}, wanted a numpy array")


def flag(value: Any, name: str) -> bool:
    """True or False; None is False.

    Raises: ConfigError for what has no truth value.
    """
    if value is True or value is False:
        return bool(value)
    try:
        return bool(value)
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(f"{name} is {_short(value)}, wanted True or False") from None


def _short(value: Any) -> str:
    if isinstance(value, int):
        return str(value) if abs(value) < 1 << 64 else f"a number of {value.bit_length()} bits"
    return repr(value) if isinstance(value, str | float | None) else f"a {type(value).__name__}"
