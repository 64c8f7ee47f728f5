"""Ep room: what a rank sends, and a collective that waits to move it. Plain data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from whalefall.arguments import whole
from whalefall.ep.arena import Arena
from whalefall.ep.arguments import ADDRESSES, arrays
from whalefall.ep.handle import Handle, Want
from whalefall.errors import ConfigError, DtypeError, ShapeError

__all__ = ["Bias", "Pending", "Rows", "check_combine", "check_rows", "contiguous_rows"]
__all__ += ["check_beside", "layout_of", "result"]

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
    """A collective whose data phase has not run: `send` and `receive`, or both by `run`.

    Attributes:
        leave: in place of `send` where the caller goes away until `receive`: it may change what it
            gave, and what other ranks need from this one goes on without it.
        tick: of the low-latency form.
    """

    send: Callable[[], None]
    receive: Callable[[], None]
    run: Callable[[], None]
    result: Any
    leave: Callable[[], None] = field(default=lambda: None)
    tick: int = 0


def _row_bytes(array: np.ndarray) -> int:
    return math.prod(array.shape[1:]) * array.itemsize


def contiguous_rows(x: np.ndarray) -> np.ndarray:
    """x with contiguous rows (the rows themselves may lie apart)."""
    return x if not len(x) or x[0].flags.c_contiguous else np.ascontiguousarray(x)


def check_combine(
    rows: np.ndarray, handle: Handle, weights: np.ndarray | None = None, bias: Bias = (None, None)
) -> None:
    """Raise ShapeError or DtypeError for rows, their weights or biases that combine cannot take."""
    if not isinstance(bias, tuple) or len(bias) != 2:
        raise ConfigError(
            f"ep: combine: bias is a {type(bias).__name__}, wanted two arrays or None"
        )
    arrays("combine", rows=rows if rows is not None else 0, topk_weights=weights)
    arrays("combine", bias=bias[0], second_bias=bias[1])
    if rows.ndim != 2:
        raise ShapeError(f"ep: combine: rows are {list(rows.shape)}, wanted [rows, hidden]")
    K, T = handle.want.top_k, handle.num_tokens
    if weights is not None:
        wanted = (T if handle.want.per_selection else len(rows), K)
        if weights.shape != wanted or weights.dtype != np.float32 or not K:
            raise ShapeError(
                f"ep: combine: topk_weights is {weights.dtype} {list(weights.shape)}, wanted "
                f"float32 {list(wanted)}"
            )
    for one in bias:
        if one is not None and (one.dtype.name != "bfloat16" or one.shape != (T, rows.shape[-1])):
            raise ShapeError(
                f"ep: combine: bias is {one.dtype} {list(one.shape)}, wanted bfloat16 "
                f"[{T}, {rows.shape[-1]}]"
            )
    if len(rows) < handle.num_rows:
        raise ShapeError(
            f"ep: combine: rows are {list(rows.shape)}, wanted [{handle.num_rows}, hidden] as "
            "received"
        )
    if rows.dtype.name not in ("bfloat16", "float32"):
        raise DtypeError(f"ep: combine: rows are {rows.dtype}, wanted bfloat16 or float32")


def layout_of(shape: Any, dtype: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """A shape and a dtype, checked.

    Raises: DtypeError, ConfigError.
    """
    try:
        dtype = np.dtype(dtype)
    except (TypeError, ValueError, RuntimeError):
        raise DtypeError(f"ep: dtype is a {type(dtype).__name__}, wanted one of numpy's") from None
    lengths = tuple(shape) if isinstance(shape, tuple | list) else (shape,)
    shape = tuple(whole("ep: shape", n, 0, ADDRESSES) for n in lengths)
    if math.prod(shape) * dtype.itemsize > ADDRESSES:
        raise ConfigError(f"ep: shape is {list(shape)}, wanted one that fits memory")
    return shape, dtype


def result(
    arena: Arena, out: np.ndarray | None, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> np.ndarray:
    """`out`, or memory for it where none was given.

    Raises: ShapeError if it is not a contiguous array of this shape and type.
    """
    if out is None:
        return arena.empty(shape, dtype)
    arrays("combine", out=out)
    if out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous:
        raise ShapeError(
            f"ep: combine: out is {out.dtype} {list(out.shape)}, wanted contiguous {dtype} "
            f"{list(shape)}"
        )
    return out


def check_rows(x: np.ndarray, topk_idx: np.ndarray | None, hidden: int | None, where: str) -> None:
    """Raise ShapeError for tokens that dispatch cannot take; `hidden` is the engine's, if known."""
    arrays(where, x=x if x is not None else 0, topk_idx=topk_idx)
    if x.ndim != 2:
        raise ShapeError(f"ep: {where}: x is {list(x.shape)}, wanted [tokens, hidden]")
    if hidden not in (None, x.shape[1]):
        raise ShapeError(f"ep: {where}: hidden is {x.shape[1]}, engine was made for {hidden}")
    if topk_idx is not None and topk_idx.shape[:1] != x.shape[:1]:
        raise ShapeError(f"ep: {where}: topk_idx has {topk_idx.shape[:1]} tokens, x has {len(x)}")


def check_beside(
    topk_idx: np.ndarray, weights: np.ndarray | None, scale: np.ndarray | None
) -> None:
    """Raise ShapeError or DtypeError for weights or scales that do not fit the tokens."""
    arrays("dispatch", topk_idx=topk_idx if topk_idx is not None else 0, scale=scale)
    arrays("dispatch", topk_weights=weights)
    if weights is not None and (weights.shape != topk_idx.shape or weights.dtype != np.float32):
        raise ShapeError(
            f"ep: dispatch: topk_weights is {weights.dtype} {list(weights.shape)}, wanted float32 "
            f"{list(topk_idx.shape)}"
        )
    if scale is not None and (scale.ndim < 2 or len(scale) != len(topk_idx)):
        raise ShapeError(f"ep: dispatch: scale is {list(scale.shape)}, wanted [{len(topk_idx)}, …]")
