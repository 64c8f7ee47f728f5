"""Results: an array that a kernel will write, or one clear refusal."""

from __future__ import annotations

from typing import Any

import numpy as np

from whalefall.dtypes.arrays import View, view
from whalefall.errors import ShapeError

__all__ = ["may_write", "written"]


def may_write(array: Any) -> bool:
    """Whether numpy lets `array` be written; torch knows no read-only tensors."""
    return not isinstance(array, np.ndarray) or array.flags.writeable


def written(array: Any, name: str) -> View:
    """The memory of an array that will be written.

    Args:
        array: the array; `name` is how a refusal calls it, function first.
    Raises: as `view`; ShapeError for a read-only array, and where elements share memory.
    """
    seen = view(array, name)
    if not may_write(array):
        raise ShapeError(f"{name} is read-only, wanted an array that may be written; copy it")
    reach = 0  # of the axes with smaller strides: the next one must step over it
    spans = zip(seen.strides, seen.shape, strict=True)
    for stride, length in sorted((abs(s), n) for s, n in spans if n > 1):
        if stride <= reach and 0 not in seen.shape:
            raise ShapeError(
                f"{name} has shape {list(seen.shape)} and strides {list(seen.strides)}: elements "
                "share memory, wanted each in its own; copy it"
            )
        reach += stride * (length - 1)
    return seen
