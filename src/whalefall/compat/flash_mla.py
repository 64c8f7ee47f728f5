"""Stands in for `flash_mla` and `flash_mla.flash_mla_interface`, on whalefall's attention room."""

from whalefall.attention import FlashMLASchedMeta as FlashMLASchedMeta
from whalefall.attention import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    get_mla_metadata,
)
from whalefall.compat.absent import absent

__version__ = "1.0.0"  # of the interface it follows
__all__ = [  # as the original's; `FlashMLASchedMeta` is in its `flash_mla_interface`
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
]
__getattr__ = absent("flash_mla")
