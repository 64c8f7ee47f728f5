"""Ep room: what callers give, checked before anything is told to other ranks.

A rank that fails after it has told the others is out of step with them; so what could fail later
(numbers that are none, truth values that arrays do not have) is refused at once.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np

from whalefall import env
from whalefall.arguments import finite, shown, whole
from whalefall.errors import ConfigError, DtypeError

__all__ = ["ADDRESSES", "MOST", "arrays", "engine_arguments", "engine_timeout", "seconds"]

MOST = (1 << 31) - 1  # what a header can carry
ADDRESSES = 1 << 46  # bytes of address space


def engine_arguments(group: Any, host: Any, **sizes: Any) -> None:
    """Raise ConfigError for what no engine can be made with; hidden and num_experts may be None."""
    if not hasattr(group, "all_gather") or not isinstance(host, str | None):
        got = type(group).__name__, type(host).__name__
        raise ConfigError(f"Engine: group and host are {got}, wanted an ep.Group and a str")
    least = {"hidden": 1, "num_experts": 1, "chunk_bytes": 512}
    for name, value in sizes.items():
        if value is not None or least.get(name) != 1:
            whole(f"Engine: {name}", value, least.get(name, 0), ADDRESSES)


def engine_timeout(timeout_s: Any) -> float:
    """`timeout_s` of an engine; where None is given, WHALEFALL_EP_TIMEOUT.

    Raises: ConfigError.
    """
    if timeout_s is not None:
        return seconds("Engine: timeout_s", timeout_s)
    given: Any = env.get("WHALEFALL_EP_TIMEOUT")
    with contextlib.suppress(ValueError):
        given = float(given)
    return seconds("Engine: WHALEFALL_EP_TIMEOUT", given)


def seconds(what: str, value: Any) -> float:
    """A time above 0.

    Raises: ConfigError.
    """
    return finite(what, value, 0, 1e9, above=True)


def arrays(where: str, **given: Any) -> None:
    """Raise DtypeError for what is neither an array nor None."""
    for name, value in given.items():
        if value is not None and not isinstance(value, np.ndarray):
            raise DtypeError(f"ep: {where}: {name} is {shown(value)}, wanted a numpy array")
