"""Ranges of numeric options: what lies outside, and what is no number, is one clear line."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import typer

from whalefall.errors import ConfigError

__all__ = ["DOLLARS", "HOURS", "SHARE", "TOKENS", "within"]

Number = TypeVar("Number", int, float, None)


def within(
    low: float, high: float, above: bool = False
) -> Callable[[typer.Context, typer.CallbackParam, Number], Number]:
    """A callback of a typer option that raises ConfigError for a value outside `low` to `high`.

    Args:
        low, high: the limits; they are allowed themselves.
        above: `low` itself is not allowed.
    """

    def check(context: typer.Context, param: typer.CallbackParam, value: Number) -> Number:
        if value is None or ((low < value if above else low <= value) and value <= high):
            return value  # NaN is on no side of anything
        least = f"above {low:g}" if above else f"{low:g}"
        raise ConfigError(
            f"{context.command_path}: {param.opts[0]} is {value:g}, wanted {least} to {high:g}"
        )

    return check


# Far above whatever exists, far below where float arithmetic overflows.
DOLLARS = within(0, 1e9)
HOURS = within(0, 1e12)
TOKENS = within(0, 1e21)
SHARE = within(0, 1)
