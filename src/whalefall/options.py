"""Ranges of numeric options. Apart from `arguments`, asked by libraries without a command line."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import typer

from whalefall.arguments import finite

__all__ = ["within"]

Number = TypeVar("Number", int, float, None)


def within(
    low: float, high: float, above: bool = False
) -> Callable[[typer.Context, typer.CallbackParam, Number], Number]:
    """`arguments.finite` as a callback of a typer option; None passes."""

    def check(context: typer.Context, param: typer.CallbackParam, value: Number) -> Number:
        if value is not None:
            finite(f"{context.command_path}: {param.opts[0]}", value, low, high, above=above)
        return value

    return check
