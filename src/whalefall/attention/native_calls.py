"""The native entries of the attention room: their structs, and the libraries built for a call.

Each struct mirrors the one of the same name in `native/*.h`. Strides are in elements of the array,
those of a `Cache` in bytes. A unit is compiled for a row format and a group size; head sizes,
lengths and page sizes are plain arguments.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from whalefall import jit
from whalefall.jit import machine

__all__ = [
    "FP8_ROW_BYTES",
    "TYPES",
    "AppendArgs",
    "Cache",
    "Chosen",
    "DecodeArgs",
    "MergeArgs",
    "PagedArgs",
    "SparseArgs",
    "VarlenArgs",
    "append_entry",
    "decode_entry",
    "merge_entry",
    "paged_entry",
    "sparse_entry",
    "varlen_entry",
]

NATIVE = Path(__file__).parent / "native"
FP8_ROW_BYTES = 656
TYPES = {"float32": 0, "bfloat16": 1, "float16": 2, "fp8": 3}
_ROWS = {0: "Fp32Row", 1: "Bf16Row", 2: "Fp16Row", 3: "Bf16Row"}
Entry = Callable[[int], int]


def _fields(text: str) -> list[tuple[str, Any]]:
    """`p:` pointers, `n:` int64, `f:` floats and `i:` int32, in the order of the native struct."""
    kinds = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "f": ctypes.c_float, "i": ctypes.c_int32}
    return [(name, kinds[part[0]]) for part in text.split("; ") for name in part[2:].split()]


class Cache(ctypes.Structure):
    """Rows of a paged cache."""

    _fields_ = _fields("p:data; n:block_stride row_stride head_stride blocks page")


class PagedArgs(ctypes.Structure):
    """Paged MLA: each token brings the address of its block table and how many keys it sees."""

    _fields_ = [
        *_fields("p:q; n:q_token q_head; p:out; n:out_token out_head; p:lse; n:lse_token lse_head"),
        *_fields("p:sink tables keys; n:tokens heads kv_heads width v_width"),
        ("cache", Cache),
        *_fields("f:scale lonely_lse; i:q_type out_type cache_type"),
    ]


class DecodeArgs(ctypes.Structure):
    """A batch with one block table and one length each; `wrong_*` say what was refused."""

    _fields_ = [
        ("paged", PagedArgs),
        *_fields("p:block_table; n:table_stride table_width; p:lengths; n:batch per_request"),
        *_fields("n:wrong_request wrong_entry wrong_value; i:causal"),
    ]


class Chosen(ctypes.Structure):
    """The rows that each token lists in one cache."""

    _fields_ = [
        ("cache", Cache),
        *_fields("p:indices; n:index_token topk; p:lengths; n:tokens_per_length"),
    ]


class SparseArgs(ctypes.Structure):
    """Sparse MLA over one cache or two."""

    _fields_ = [
        *_fields("p:q; n:q_token q_head; p:out; n:out_token out_head; p:lse max_logits"),
        *_fields("n:lse_token lse_head; p:sink; n:tokens heads width v_width"),
        ("main", Chosen),
        ("extra", Chosen),
        *_fields("f:scale lonely_lse; i:q_type out_type cache_type"),
    ]


class MergeArgs(ctypes.Structure):
    """Partial results [parts, rows, width] with their lse [parts, rows]."""

    _fields_ = _fields("p:out lse merged merged_lse; n:parts rows width; f:lonely_lse; i:type")


class VarlenArgs(ctypes.Structure):
    """Dense attention over sequences end to end."""

    _fields_ = [
        *_fields("p:q k v; n:q_token q_head k_token k_head v_token v_head"),
        *_fields("p:out; n:out_token out_head; p:lse; n:lse_token lse_head; p:q_starts k_starts"),
        *_fields("n:sequences heads kv_heads width v_width"),
        *_fields("f:scale lonely_lse; i:causal q_type out_type"),
    ]


class AppendArgs(ctypes.Structure):
    """New latent rows for a cache."""

    _fields_ = [
        *_fields("p:latent rope; n:latent_stride latent_width rope_stride rope_width"),
        *_fields("i:type cache_type; p:tables positions; n:tokens"),
        ("cache", Cache),
    ]


def group_rows(heads: int, row: str = "") -> int:
    """Query rows computed together, by the query heads of a kv head.

    Bf16 dots use up two stored vectors in a cycle, so more rows must share what is read.
    """
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
    call = getattr(jit.build(NATIVE / source, defines, level=level), name)
    call.argtypes, call.restype = [ctypes.c_void_p], ctypes.c_int32
    return call  # type: ignore[no-any-return]


def row_format(cache_type: int, bf16_q: bool, level: str) -> str:
    """The row format that a unit is compiled for.

    Args:
        cache_type: of `TYPES`.
        bf16_q: whether queries are bf16, or may be rounded to it: then bf16 dots serve bf16 rows.
    """
    row = _ROWS[cache_type]
    return "DotRow" if row == "Bf16Row" and bf16_q and machine.dot_is_fast(level) else row


def _mla_entry(source: str, name: str, cache_type: int, heads: int, bf16_q: bool) -> Entry:
    level = jit.best_level()
    row = row_format(cache_type, bf16_q, level)
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
