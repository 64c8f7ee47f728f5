"""Plain arguments, checked once for all rooms: whole numbers, flags, finite numbers.

In: `what` ("function: argument") and the value as given. Out: the value as Python's own type, or a
refusal in one line: what, got, wanted, what to pass. Arrays have checks of their own, in `dtypes`
and the rooms.
"""

from __future__ import annotations

import contextlib
import math
from numbers import Integral, Real
from typing import Any

from whalefall.errors import ConfigError, WhalefallError

__all__ = ["finite", "flag", "shown", "whole", "wholes"]

LONGEST = 60  # characters of a value in a message
WIDEST = 128  # bits of a number that is shown with all its digits
PLAIN = (str, bytes, int, float, complex, tuple, list, dict, range, type(None))


def whole(
    what: str,
    value: Any,
    least: int | None = None,
    most: int | None = None,
    *,
    error: type[WhalefallError] = ConfigError,
) -> int:
    """`value` as an int from `least` to `most`, both allowed; None: no limit.

    Numpy's integers are whole numbers; truth values, floats like 2.0 and arrays of one element are
    none, so that whoever goes on with the value as given has a number too.

    Raises: `error`.
    """
    # The first is true nearly always, and the quickest to ask.
    if type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool)):
        number = int(value)
        if (least is None or number >= least) and (most is None or number <= most):
            return number
    limits = "" if least is None else f" >= {least}"
    if most is not None:
        limits = f" <= {most}" if least is None else f" from {least} to {most}"
    raise error(f"{what} is {shown(value)}, wanted a whole number{limits}; pass such an int")


def wholes(what: str, values: Any, least: int | None = None) -> list[int]:
    """Several whole numbers of at least `least`, in a sequence or an array.

    Raises: ConfigError.
    """
    try:
        given = list(values.tolist() if hasattr(values, "tolist") else values)
    except (TypeError, RuntimeError):  # the latter: of a tensor without memory
        raise ConfigError(
            f"{what} is {shown(values)}, wanted whole numbers; pass a list of ints"
        ) from None
    return [whole(f"{what}[{i}]", item, least) for i, item in enumerate(given)]


def flag(what: str, value: Any) -> bool:
    """`value` as a bool: a truth value (an array's, too), a whole number, or None, which is False.

    Raises: ConfigError.
    """
    if value is True or value is False:
        return bool(value)
    truth = str(getattr(value, "dtype", "")) in ("bool", "torch.bool")
    if truth or value is None or isinstance(value, Integral):
        with contextlib.suppress(ValueError, RuntimeError):  # of several, or without memory
            return bool(value)
    raise ConfigError(f"{what} is {shown(value)}, wanted True or False; pass a bool")


def finite(
    what: str, value: Any, low: float = -math.inf, high: float = math.inf, *, above: bool = False
) -> float:
    """`value` as a finite float from `low` to `high`, both allowed.

    Args:
        above: `low` itself is not allowed.
    Raises: ConfigError.
    """
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.nan
        if math.isfinite(number) and (low < number if above else low <= number) and number <= high:
            return number
    if math.isfinite(high):
        wanted = f"{'above ' if above else ''}{low:g} to {high:g}"
    elif math.isfinite(low):
        wanted = f"a finite number {'above' if above else '>='} {low:g}"
    else:
        wanted = "a finite number"
    raise ConfigError(f"{what} is {shown(value)}, wanted {wanted}")


def shown(value: Any) -> str:
    """A value in one short line: numbers and texts as Python writes them, cut where they are long.

    Of an array dtype and shape, of any other object its type.
    """
    if isinstance(value, type):
        return f"the type {value.__name__}"
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and hasattr(value, "dtype"):
        if shape or not isinstance(value, Real):
            return f"a {value.dtype} array {list(shape)}"
    elif not isinstance(value, PLAIN):
        return f"a {type(value).__name__}"
    if isinstance(value, int) and value.bit_length() > WIDEST:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, tuple | list | dict) and len(value) > LONGEST // 3:
        return f"a {type(value).__name__} of {len(value)}"
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # a number in it has too many digits
        return f"a {type(value).__name__}"
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
