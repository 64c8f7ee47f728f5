"""Ranges of numbers: what lies outside, and what is no number, is one clear line."""

from __future__ import annotations

from whalefall.errors import ConfigError

__all__ = ["require"]


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
