"""The checks of `flash_mla_with_kvcache` for CUDA tensors: all that needs no look at their memory.

What lengths, tables and indices hold stays on the GPU: the kernel reads nothing outside its arrays
whatever they hold (see `triton.py`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from whalefall.arguments import flag, shown
from whalefall.attention.operands import (
    check_cache,
    check_heads,
    check_int32,
    check_mixture,
    check_one_head,
    check_query,
    check_sink,
    scale_operand,
    width_of_values,
)
from whalefall.dtypes import View
from whalefall.errors import DtypeError, ShapeError, UnsupportedError

__all__ = ["GpuDecode", "checked"]

_HERE = "flash_mla_with_kvcache"
_WIDTH, _V_WIDTH = 576, 512


class GpuDecode(NamedTuple):
    """A checked call; arguments of `triton.decode`."""

    q: Any
    k_cache: Any
    where: Any
    lengths: Any
    softmax_scale: float
    causal: bool
    is_fp8_kvcache: bool
    sparse: bool
    attn_sink: Any


def checked(given: dict[str, Any]) -> GpuDecode:
    """The arguments of `flash_mla_with_kvcache`, by name, checked as for CPU tensors.

    Raises: ShapeError, DtypeError, ConfigError as there; UnsupportedError for tensors of several
        devices and for what the kernel has no form for (extra_k_cache, other widths, kv heads).
    """
    q, sparse = given["q"], given["indices"] is not None
    causal = flag(f"{_HERE}: causal", given["causal"])
    fp8 = flag(f"{_HERE}: is_fp8_kvcache", given["is_fp8_kvcache"])
    seen = _view(q, "q", q)
    check_query(_HERE, "q", seen, "b, s_q, h_q, d")
    b, s_q, heads, width = seen.shape
    v_width = width_of_values(_HERE, "head_dim_v", given["head_dim_v"], width)
    scale = scale_operand(_HERE, "softmax_scale", given["softmax_scale"], width)
    sink = given["attn_sink"]
    if sink is not None:
        check_sink(_HERE, _view(sink, "attn_sink", q), heads)
    check_mixture(_HERE, {**given, "causal": causal})
    cache = _view(given["k_cache"], "k_cache", q)
    check_cache(_HERE, "k_cache", cache, fp8, width)
    kv_heads = cache.shape[2]
    if sparse:
        check_one_head(_HERE, "k_cache", kv_heads)
    check_heads(_HERE, heads, "k_cache", kv_heads)
    where, lengths = _keys(given, b, s_q)
    _check_form(given, seen, cache, v_width, fp8)
    return GpuDecode(q, given["k_cache"], where, lengths, scale, causal, fp8, sparse, sink)


def _keys(given: dict[str, Any], b: int, s_q: int) -> tuple[Any, Any]:
    """Which keys: (block_table, cache_seqlens), or (indices, topk_length)."""
    shape: tuple[int | None, ...]
    if given["indices"] is None:
        names, shape = ("block_table", "cache_seqlens"), (b, None)
    else:
        names, shape = ("indices", "topk_length"), (b, s_q, None)
    where, lengths = (given[name] for name in names)
    check_int32(_HERE, names[0], _view(where, names[0], given["q"]), shape)
    if lengths is None and names[1] == "topk_length":
        lengths = where.new_full((b,), where.shape[-1])
    check_int32(_HERE, names[1], _view(lengths, names[1], given["q"]), (b,))
    return where, lengths


def _check_form(given: dict[str, Any], q: View, cache: View, v_width: int, fp8: bool) -> None:
    """UnsupportedError, or DtypeError, for what a CPU answers and this kernel doesn't."""
    extra = given["extra_k_cache"]
    forms = (
        (extra is not None, f"extra_k_cache is {shown(extra)}, wanted None"),
        (v_width != _V_WIDTH, f"head_dim_v is {v_width}, wanted {_V_WIDTH}"),
        (q.shape[3] != _WIDTH, f"q has {q.shape[3]} columns, wanted {_WIDTH}"),
        (cache.shape[2] != 1, f"k_cache has {cache.shape[2]} kv heads, wanted 1"),
    )
    for there, words in forms:
        if there:
            raise UnsupportedError(f"{_HERE}: {words} on a GPU; move the tensors with .cpu()")
    if q.dtype == "float32" or (not fp8 and cache.dtype != q.dtype):
        raise DtypeError(
            f"{_HERE}: q is {q.dtype} and k_cache {cache.dtype}, wanted q in bfloat16 or float16 "
            "and k_cache in q's dtype, or bytes, on a GPU; convert them"
        )
    # words of four bytes are read, where they lie
    if fp8 and (cache.address % 4 or any(step % 4 for step in cache.strides[:3])):
        raise ShapeError(
            f"{_HERE}: k_cache has strides {list(cache.strides)}, wanted multiples of 4 bytes, "
            "from an address that is one; copy it"
        )


def _view(tensor: Any, name: str, q: Any) -> View:
    """Shape, strides and dtype of a tensor beside q; its memory is not for the CPU."""
    if not hasattr(tensor, "data_ptr"):
        raise DtypeError(
            f"{_HERE}: {name} is a {type(tensor).__name__}, wanted a tensor like q; make it one"
        )
    if tensor.device != q.device:
        raise UnsupportedError(
            f"{_HERE}: {name} is on {tensor.device} and q on {q.device}, wanted one device; move "
            "it with .to(q.device)"
        )
    shape, strides = tuple(tensor.shape), tuple(tensor.stride())
    dtype = str(tensor.dtype).removeprefix("torch.")
    return View(tensor.data_ptr(), shape, strides, dtype)
