"""Closeness of arrays as one number, whatever their scale.

Source: DeepGEMM's `calc_diff`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from whalefall.gemm import calc_diff

__all__ = ["assert_close", "diff"]


def diff(got: Any, want: Any) -> float:
    """1 − 2⟨x, y⟩ / (⟨x, x⟩ + ⟨y, y⟩) in float64: 0 for equal arrays, 1 for unrelated ones.

    Args:
        got, want: arrays of one shape, of any float type that numpy can read; empty ones are equal.
    """
    x, y = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return 0.0 if x.size == 0 and y.size == 0 else float(calc_diff(x, y))


def assert_close(got: Any, want: Any, max_diff: float, what: str = "array") -> None:
    """Fail unless the shapes are equal, infinities and NaN stand where the truth has them, and the
    rest differs by no more than `max_diff`.

    Args:
        got, want: as for `diff`.
        max_diff: the largest `diff` that passes.
        what: named in the failure.
    Raises: AssertionError: one line with the figure and the worst element.
    """
    x, y = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert x.shape == y.shape, f"{what}: shape is {list(x.shape)}, wanted {list(y.shape)}"
    fine = np.isfinite(y)
    odd = np.argwhere(~((x == y) | (np.isnan(x) & np.isnan(y)) | (fine & np.isfinite(x))))
    if len(odd):
        place = tuple(int(i) for i in odd[0])
        raise AssertionError(f"{what}: at {list(place)} is {x[place]}, wanted {y[place]}")
    x, y = np.where(fine, x, 0.0), np.where(fine, y, 0.0)
    found = diff(x, y)
    if found > max_diff:
        place = tuple(int(i) for i in np.unravel_index(np.abs(x - y).argmax(), x.shape))
        raise AssertionError(
            f"{what}: diff is {found:.3g}, wanted at most {max_diff:.3g}; worst at {list(place)}: "
            f"{x[place]}, wanted {y[place]}"
        )
