"""Ranges of numeric options: what lies outside, and what is no number, is one clear line."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import typer

from whalefall.errors import ConfigError

__all__ = ["require", "within"]

Number = TypeVar("Number", int, float, None)


def require(what: str, value: float, low: float, high: float, above: bool = False) -> None:
    """Raise ConfigError if a value lies outside `low` to `high` (NaN lies outside of anything).

    Args:
        what: what the message calls it.
        low, high: the limits; they are allowed themselves.
        above: `low` itself is not allowed.
    """
    if (low < value if above else low <= value) and value <= high:
        return
    least = f"above {low:g}" if above else f"{low:g}"
    raise ConfigError(f"{what} is {value:g}, wanted {least} to {high:g}")


def within(
    low: float, high: float, above: bool = False
) -> Callable[[typer.Context, typer.CallbackParam, Number], Number]:
    """`require` as a callback of a typer option; None passes."""

    def check(context: typer.Context, param: typer.CallbackParam, value: Number) -> Number:
        if value is not None:
            require(f"{context.command_path}: {param.opts[0]}", value, low, high, above)
        return value

    return check
