"""Ep room: CPU tensors as arrays over the same memory, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import torch

from whalefall.errors import DtypeError, ShapeError

__all__ = ["Copies", "array", "bf16", "from_bf16", "rows", "tensor"]


class Copies:
    """Contiguous stand-ins for tensors that may not be read yet; `before` fills them."""

    def __init__(self) -> None:
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def of(self, t: torch.Tensor) -> torch.Tensor:
        """Memory for the copy of a tensor."""
        self._pairs.append((_like(t), t))
        return self._pairs[-1][0]

    def before(self, call: Callable[[], None]) -> None:
        """Copy, then `call()`."""
        for made, t in self._pairs:
            made.copy_(t)
        call()


def rows(
    t: torch.Tensor, name: str, copies: Copies | None = None, together: bool = False
) -> np.ndarray:
    """[T, H] of any dtype as bytes [T, row bytes]; copied if elements of a row lie apart.

    Args:
        t: the tensor.
        name: of the argument.
        copies: where a copy is to be made later.
        together: rows must not lie apart either.
    """
    _check(t, name)
    if t.dim() != 2:
        raise ShapeError(f"ep: {name} is {list(t.shape)}, wanted [tokens, hidden]")
    t = t.detach()
    if not t.numel():  # may have any strides, which views of other types refuse
        t = torch.empty(t.shape, dtype=t.dtype)
    elif t.stride(1) != 1 or (together and not t.is_contiguous()):
        t = _copy(t, copies)
    return np.asarray(t.view(torch.uint8).numpy())


def array(
    t: torch.Tensor, dtype: torch.dtype, name: str, copies: Copies | None = None
) -> np.ndarray:
    """A tensor of this dtype as a contiguous array; `copies` as of `rows`.

    Raises: DtypeError.
    """
    _check(t, name)
    if t.dtype != dtype:
        raise DtypeError(f"ep: {name} is {t.dtype}, wanted {dtype}")
    t = t.detach()
    return np.asarray((t if t.is_contiguous() else _copy(t, copies)).numpy())


def bf16(
    t: torch.Tensor, name: str, copies: Copies | None = None, together: bool = False
) -> np.ndarray:
    """A bf16 tensor as an ml_dtypes array; rows may lie apart. Arguments as of `rows`.

    Raises: DtypeError.
    """
    _check(t, name)
    if t.dtype != torch.bfloat16:
        raise DtypeError(f"ep: {name} is {t.dtype}, wanted torch.bfloat16")
    t = t.detach()
    if not t.dim():
        raise ShapeError(f"ep: {name} is a number, wanted rows")
    if t.stride(-1) != 1 or (together and not t.is_contiguous()):
        t = _copy(t, copies)
    return np.asarray(t.view(torch.int16).numpy()).view(ml_dtypes.bfloat16)


def from_bf16(a: np.ndarray) -> torch.Tensor:
    """An ml_dtypes bf16 array as a tensor over the same memory."""
    return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)


def tensor(a: np.ndarray | None, dtype: torch.dtype | None = None) -> Any:
    """An array as a tensor over the same memory; bytes [N, row bytes] are seen as `dtype`."""
    if a is None:
        return None
    if dtype is not None and not a.size:
        return torch.empty((*a.shape[:-1], a.shape[-1] // dtype.itemsize), dtype=dtype)
    t = torch.from_numpy(a)
    return t if dtype is None else t.view(dtype)


def _like(t: torch.Tensor) -> torch.Tensor:
    return torch.empty(t.shape, dtype=t.dtype)


def _copy(t: torch.Tensor, later: Copies | None) -> torch.Tensor:
    # not `contiguous`: of one column that returns any stride
    return _like(t).copy_(t) if later is None else later.of(t)


def _check(t: torch.Tensor, name: str) -> None:
    if not isinstance(t, torch.Tensor):
        raise DtypeError(f"ep: {name} is a {type(t).__name__}, wanted a tensor")
    if t.device.type != "cpu":
        raise DtypeError(f"ep: {name} is on {t.device}, wanted a CPU tensor; .cpu() makes one")
    if t.layout != torch.strided:
        raise DtypeError(f"ep: {name} is {t.layout}, wanted torch.strided; .to_dense() makes one")
