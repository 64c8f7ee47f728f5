"""Comm room: gather and scatter of whole rows by index, native, GIL released.

# N rows of the index, D elements of a row
"""

from __future__ import annotations

import numpy as np

from whalefall.comm.library import library
from whalefall.errors import DtypeError, LimitError, ShapeError

__all__ = ["gather_rows", "scatter_rows"]


def gather_rows(source: np.ndarray, index: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """out[i] = source[index[i]].

    Args:
        source: [rows, …], each row contiguous; any dtype.
        index: [N] int64.
        out: [N, …] of the same dtype, each row contiguous; default: a new array.
    Returns: out.
    Raises: LimitError for an index out of range; ShapeError, DtypeError.
    """
    index = _index(index)
    if out is None:
        out = np.empty((len(index), *source.shape[1:]), source.dtype)
    row_bytes = _check(source, out, len(index), "gather_rows", "out", out)
    bad = library().wf_gather_rows(
        source.ctypes.data, source.strides[0], len(source), index.ctypes.data, len(index),
        row_bytes, out.ctypes.data, out.strides[0],
    )  # fmt: skip
    if bad:
        raise _range(index, -1 - bad, len(source), "gather_rows")
    return out


def scatter_rows(source: np.ndarray, index: np.ndarray, out: np.ndarray) -> np.ndarray:
    """out[index[i]] = source[i]; of equal indices the last wins.

    Args:
        source: [N, …], each row contiguous; any dtype.
        index: [N] int64.
        out: [rows, …] of the same dtype, each row contiguous.
    Returns: out.
    Raises: LimitError for an index out of range (nothing is written); ShapeError, DtypeError.
    """
    index = _index(index)
    row_bytes = _check(source, out, len(index), "scatter_rows", "source", source)
    bad = library().wf_scatter_rows(
        source.ctypes.data, source.strides[0], index.ctypes.data, len(index),
        row_bytes, out.ctypes.data, out.strides[0], len(out),
    )  # fmt: skip
    if bad:
        raise _range(index, -1 - bad, len(out), "scatter_rows")
    return out


def _index(index: np.ndarray) -> np.ndarray:
    if index.dtype != np.int64 or index.ndim != 1:
        raise DtypeError(f"rows: index is {index.dtype} {list(index.shape)}, wanted int64 [N]")
    return np.ascontiguousarray(index)


def _check(
    source: np.ndarray, out: np.ndarray, count: int, where: str, name: str, by_index: np.ndarray
) -> int:
    if source.dtype != out.dtype:
        raise DtypeError(f"{where}: out is {out.dtype}, wanted {source.dtype} as the source")
    if source.shape[1:] != out.shape[1:]:
        raise ShapeError(
            f"{where}: rows of out are {list(out.shape[1:])}, wanted {list(source.shape[1:])}"
        )
    if len(by_index) != count:
        raise ShapeError(f"{where}: {name} has {len(by_index)} rows, wanted {count} as the index")
    if not out.flags.writeable:
        raise DtypeError(f"{where}: out is read-only")
    for array in (source, out):
        if len(array) and not array[0].flags.c_contiguous:
            raise ShapeError(f"{where}: rows must be contiguous, strides are {array.strides}")
    return int(np.prod(source.shape[1:], dtype=np.int64)) * source.itemsize


def _range(index: np.ndarray, at: int, rows: int, where: str) -> LimitError:
    return LimitError(f"{where}: index[{at}] is {index[at]}, wanted 0 … {rows - 1}")
