"""Attention room: MLA decode and prefill over paged latent KV, sparse and dense.

In: numpy arrays or CPU torch tensors. Out: values and log-sum-exp, in the caller's library.
`reference.py` (float64, numpy) is the definition; `native/` agrees with it at every ISA level.
Source: FlashMLA; DeepSeek-V2 paper, 2.1.
"""

from whalefall.attention.cache import append_latent
from whalefall.attention.decode import flash_mla_with_kvcache
from whalefall.attention.fp8_rows import dequantize_kv_cache
from whalefall.attention.merge import merge_partials
from whalefall.attention.metadata import FlashMLASchedMeta, get_mla_metadata
from whalefall.attention.sparse import flash_mla_sparse_fwd
from whalefall.attention.varlen import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

__all__ = [
    "FlashMLASchedMeta",
    "append_latent",
    "dequantize_kv_cache",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
    "merge_partials",
]
