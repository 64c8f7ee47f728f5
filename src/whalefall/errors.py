"""The error tree: every refusal whalefall makes is a `WhalefallError`.

A message is one line: where, what it got, what it wanted, what to do next. Each class also derives
from the builtin that it refines, so that callers who know only the builtin still catch it.
"""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "CorruptError",
    "DtypeError",
    "LimitError",
    "MissingError",
    "RankFailure",
    "ShapeError",
    "UnsupportedError",
    "WhalefallError",
]


class WhalefallError(Exception):
    """The root: catch it to catch every refusal of this package."""


class ShapeError(WhalefallError, ValueError):
    """An array has the wrong shape, strides or layout."""


class DtypeError(WhalefallError, TypeError):
    """An array or argument has the wrong type."""


class ConfigError(WhalefallError, ValueError):
    """A setting, option, recipe or file of configuration makes no sense."""


class UnsupportedError(WhalefallError, NotImplementedError):
    """A thing that exists, but that this version (or this machine) cannot do."""


class MissingError(WhalefallError, FileNotFoundError):
    """A file, folder, tool or dependency is not there."""


class CorruptError(WhalefallError, ValueError):
    """Stored data does not match its checksum, index or format."""


class LimitError(WhalefallError, ValueError):
    """A request is larger than a stated limit."""


class RankFailure(WhalefallError, RuntimeError):
    """A process of a group died, hung or left; the message names its rank.

    Attributes:
        rank: of that process, the first where there are several; None where whoever raised it
            knows no number.
    """

    def __init__(self, *args: object, rank: int | None = None) -> None:
        super().__init__(*args)
        self.rank = rank
