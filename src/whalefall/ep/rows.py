"""Ep room: what a rank sends, and a collective that waits to move it. Plain data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from whalefall.ep.handle import Want

__all__ = ["Bias", "Pending", "Rows", "pointer"]

Bias = tuple[np.ndarray | None, np.ndarray | None]


@dataclass(frozen=True)
class Rows:
    """What a rank sends; all contiguous but `x`, whose rows may lie apart.

    Attributes:
        x: [T, …].
        scale: [T, …] sent along, or None.
        topk_idx: [T, K] int64, or None.
        topk_weights: [T, K] float32, or None.
    """

    x: np.ndarray
    scale: np.ndarray | None = None
    topk_idx: np.ndarray | None = None
    topk_weights: np.ndarray | None = None

    @property
    def x_bytes(self) -> int:
        """Bytes of a row of x."""
        return _row_bytes(self.x)

    @property
    def scale_bytes(self) -> int:
        """Bytes of a row of scales."""
        return 0 if self.scale is None else _row_bytes(self.scale)

    @property
    def top_k(self) -> int:
        """K."""
        return 0 if self.topk_idx is None else self.topk_idx.shape[1]

    @property
    def packed_bytes(self) -> int:
        """Bytes of a packed row, at most."""
        return -(-(self.x_bytes + self.scale_bytes + 3 + 8 * self.top_k) // 64) * 64

    def fields(self, want: Want, max_rows: int) -> dict[str, int]:
        """A header's fields."""
        flags = want.per_selection | (self.topk_weights is not None) << 1
        return {
            "kind": 1, "tokens": len(self.x), "x_bytes": self.x_bytes,
            "scale_bytes": self.scale_bytes, "top_k": self.top_k, "flags": flags,
            "num_experts": want.num_experts, "extra": want.rows_per_expert or max_rows,
        }  # fmt: skip


@dataclass
class Pending:
    """A collective whose data phase has not run: `send` and `receive`, or both by `run`."""

    send: Callable[[], None]
    receive: Callable[[], None]
    run: Callable[[], None]
    result: Any


def _row_bytes(array: np.ndarray) -> int:
    return math.prod(array.shape[1:]) * array.itemsize


def pointer(array: np.ndarray | None) -> int | None:
    """Where an array begins; None stays None."""
    return None if array is None else int(array.__array_interface__["data"][0])
