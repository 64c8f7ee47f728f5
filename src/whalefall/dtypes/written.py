"""Results: an array that a kernel will write, or one clear refusal."""

from __future__ import annotations

from typing import Any

import numpy as np

from whalefall.dtypes.arrays import NUMPY_DTYPES, View, over_memory, view
from whalefall.errors import ShapeError

__all__ = ["refuse_overlap", "refuse_shared", "written"]

_MOST_WORK = 10_000  # candidates that numpy looks at, within a millisecond; matrices need a few


def written(array: Any, name: str) -> View:
    """The memory of an array that will be written.

    Args:
        array: the array; `name` is how a refusal calls it, function first.
    Raises: as `view`; ShapeError for a read-only array, and where elements share memory.
    """
    seen = view(array, name)
    if isinstance(array, np.ndarray) and not array.flags.writeable:  # torch knows no such tensors
        raise ShapeError(f"{name} is read-only, wanted an array that may be written; copy it")
    refuse_shared(seen, name)
    return seen


def refuse_shared(seen: View, name: str) -> None:
    """ShapeError where elements of a result share memory."""
    reach = 0  # of the axes with smaller strides: the next one must step over it
    spans = zip(seen.strides, seen.shape, strict=True)
    for stride, length in sorted((abs(s), n) for s, n in spans if n > 1):
        if stride <= reach and 0 not in seen.shape:
            raise ShapeError(
                f"{name} has shape {list(seen.shape)} and strides {list(seen.strides)}: elements "
                "share memory, wanted each in its own; copy it"
            )
        reach += stride * (length - 1)


def refuse_overlap(
    where: str, name: str, result: View, inputs: tuple[View, ...], hint: str = ""
) -> None:
    """ShapeError where a result and an input share memory: columns of one buffer may lie apart."""
    low, high = _extent(result)
    for other in inputs:
        start, end = _extent(other)
        if low < end and start < high and not _apart(result, other):
            raise ShapeError(
                f"{where}: {name} (bytes {low:#x} to {high:#x}) overlaps an input ({start:#x} to "
                f"{end:#x}); give it memory of its own{hint}"
            )


def _apart(a: View, b: View) -> bool:
    """Whether no byte belongs to both; False also where that takes long to find out."""
    try:
        return not np.shares_memory(over_memory(a), over_memory(b), max_work=_MOST_WORK)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return False


def _extent(v: View) -> tuple[int, int]:
    size = NUMPY_DTYPES[v.dtype].itemsize
    if 0 in v.shape:
        return v.address, v.address
    spans = [(n - 1) * s for n, s in zip(v.shape, v.strides, strict=True)]
    low = v.address + size * sum(s for s in spans if s < 0)
    return low, v.address + size * (sum(s for s in spans if s > 0) + 1)
