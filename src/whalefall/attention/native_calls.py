"""The native entries of the attention room: the libraries built for a call.

A unit is compiled for a row format and a group size; head sizes, lengths and page sizes are plain
arguments. Where there is no compiler, `without_compiler` has the entries in numpy.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

from whalefall import jit
from whalefall.attention import without_compiler
from whalefall.jit import machine

__all__ = [
    "append_entry",
    "decode_entry",
    "merge_entry",
    "paged_entry",
    "sparse_entry",
    "varlen_entry",
]

NATIVE = Path(__file__).parent / "native"
_ROWS = {0: "Fp32Row", 1: "Bf16Row", 2: "Fp16Row", 3: "Bf16Row"}
Entry = Callable[[int], int]


def group_rows(heads: int, row: str = "") -> int:
    """Query rows computed together, by the query heads of a kv head.

    Bf16 dots use up two stored vectors in a cycle, so more rows must share what is read; a tile
    has 16.
    """
    if row == "TileRow":
        return 16
    if heads <= 2:
        return heads
    return 8 if row == "DotRow" and heads >= 8 else 4


@functools.cache
def _entry(source: str, name: str, level: str, row: str = "", group: int = 0) -> Entry:
    defines: dict[str, str | int] = {}
    if row:
        defines["WF_ROW"] = row
    if group:
        defines["WF_GROUP"] = group
    try:
        call = getattr(jit.build(NATIVE / source, defines, level=level), name)
    except jit.NoCompilerError as missing:
        jit.numpy_instead(missing)
        return without_compiler.entry(name, row)
    call.argtypes, call.restype = [ctypes.c_void_p], ctypes.c_int32
    return call  # type: ignore[no-any-return]


def row_format(cache_type: int, heads: int, bf16_q: bool, level: str) -> str:
    """The row format that a unit is compiled for.

    Args:
        cache_type: of `TYPES`.
        heads: query heads of a kv head. One or two, which memory bounds, gain nothing by tiles.
        bf16_q: whether queries are bf16, or may be rounded to it: then tiles or bf16 dots serve
            bf16 rows, where they are fast.
    """
    row = _ROWS[cache_type]
    if row != "Bf16Row" or not bf16_q:
        return row
    if heads > 2 and machine.tile_is_fast(level):
        return "TileRow"
    return "DotRow" if machine.dot_is_fast(level) and not machine.tile_is_fast(level) else row


def _mla_entry(source: str, name: str, cache_type: int, heads: int, bf16_q: bool) -> Entry:
    level = jit.best_level()
    row = row_format(cache_type, heads, bf16_q, level)
    return _entry(source, name, level, row, group_rows(heads, row))


def paged_entry(cache_type: int, heads_of_kv: int, bf16_q: bool = False) -> Entry:
    """`wf_paged_attention` for a cache format and the query heads of a kv head."""
    return _mla_entry("mla_paged.cpp", "wf_paged_attention", cache_type, heads_of_kv, bf16_q)


def decode_entry(cache_type: int, heads_of_kv: int, bf16_q: bool = False) -> Entry:
    """`wf_decode`, which returns 0, or 1 for a bad length, or 2 for a bad block."""
    return _mla_entry("mla_paged.cpp", "wf_decode", cache_type, heads_of_kv, bf16_q)


def sparse_entry(cache_type: int, heads: int, bf16_q: bool = False) -> Entry:
    """`wf_sparse_attention` for a cache format and the query heads."""
    return _mla_entry("mla_sparse.cpp", "wf_sparse_attention", cache_type, heads, bf16_q)


def varlen_entry(row_type: int) -> Entry:
    """`wf_varlen_attention` for the format of K and V.

    Always in fp32: a prompt's first tokens see few keys, whose weights rounded to bf16 would leave
    the original's tolerance.
    """
    return _entry("mha_varlen.cpp", "wf_varlen_attention", jit.best_level(), _ROWS[row_type])


def append_entry() -> Entry:
    """`wf_cache_append`."""
    return _entry("cache_append.cpp", "wf_cache_append", jit.best_level())


def merge_entry() -> Entry:
    """`wf_merge`."""
    return _entry("state_merge.cpp", "wf_merge", jit.best_level())
