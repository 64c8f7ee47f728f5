"""The structs of `native/*.h`, mirrored: what a native entry is given by address.

Strides are in elements of the array, those of a `Cache` in bytes.
"""

from __future__ import annotations

import ctypes
from typing import Any

__all__ = [
    "FP8_DTYPES",
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
    "VarlenCall",
]

FP8_ROW_BYTES = 656
FP8_DTYPES = ("float8_e4m3fn", "uint8", "int8")  # of the bytes of such a row
TYPES = {"float32": 0, "bfloat16": 1, "float16": 2, "fp8": 3}


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


class VarlenCall(ctypes.Structure):
    """Dense attention whose starts are looked at first, against the tokens of q and of k."""

    _fields_ = [("args", VarlenArgs), *_fields("n:q_tokens k_tokens")]


class AppendArgs(ctypes.Structure):
    """New latent rows for a cache."""

    _fields_ = [
        *_fields("p:latent rope; n:latent_stride latent_width rope_stride rope_width"),
        *_fields("i:type cache_type; p:tables positions; n:tokens"),
        ("cache", Cache),
    ]
