"""Engine room: the pages of latent KV, and the swap area.

In: block ids. Out: `array` [layers, blocks, 64, latent + rope] on mapped memory with huge pages
(4 KiB pages cost a quarter of the bandwidth); pages take memory when first written.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import ml_dtypes
import numpy as np

from whalefall.attention.structs import FP8_ROW_BYTES
from whalefall.engine.core.sequence import BLOCK_SIZE
from whalefall.errors import ConfigError, LimitError

__all__ = ["KV_DTYPES", "KVCache", "map_array"]

KV_DTYPES = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp32": np.dtype(np.float32),
    "fp8": np.dtype(np.uint8),  # rows of 656 bytes, FlashMLA's layout
}
_FP8_COLUMNS = 576  # of latent and rope that such a row holds
_HUGE = 2 << 20


def map_array(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A zeroed array on anonymous mapped memory that asks for huge pages.

    Raises: LimitError where the system grants no such address space.
    """
    count = int(np.prod(shape, dtype=np.int64))
    size = max(1, -(-count * dtype.itemsize // _HUGE)) * _HUGE
    try:
        # private: shared memory has huge pages only where the machine's owner says so
        area = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, ValueError):
        raise LimitError(
            f"the KV cache would take {size / 1e9:.0f} GB, which the system does not grant; "
            "make it smaller (--kv-cache-gb, kv_cache_bytes, num_blocks)"
        ) from None
    area.madvise(mmap.MADV_HUGEPAGE)
    raw = np.frombuffer(area, np.uint8)
    start = -raw.ctypes.data % _HUGE
    return raw[start : start + count * dtype.itemsize].view(dtype).reshape(shape)


def row_width(latent_dim: int, dtype: str) -> int:
    """Elements of a token's row.

    Raises: ConfigError for "fp8" where latent and rope are not of 512 and 64 columns.
    """
    if dtype != "fp8":
        return latent_dim
    if latent_dim != _FP8_COLUMNS:
        raise ConfigError(
            f"kv is 'fp8', whose rows hold {_FP8_COLUMNS} columns (512 latent, 64 rope); this "
            f"model has {latent_dim}: use bf16"
        )
    return FP8_ROW_BYTES


class KVCache:
    """Latent KV in pages of 64 tokens.

    Attributes:
        array: [layers, blocks, 64, latent + rope], or 656 bytes for "fp8".
    """

    def __init__(self, layers: int, num_blocks: int, latent_dim: int, dtype: str) -> None:
        """Map the pages. Raises: ConfigError for an unknown dtype."""
        if dtype not in KV_DTYPES:
            raise ConfigError(f"kv is {dtype!r}, wanted one of {', '.join(KV_DTYPES)}")
        shape = (layers, num_blocks, BLOCK_SIZE, row_width(latent_dim, dtype))
        self.array = map_array(shape, KV_DTYPES[dtype])
        self._swapped: dict[str, np.ndarray] = {}

    @staticmethod
    def block_bytes(layers: int, latent_dim: int, dtype: str) -> int:
        """Bytes of one block over all layers."""
        return layers * BLOCK_SIZE * row_width(latent_dim, dtype) * KV_DTYPES[dtype].itemsize

    def swap_out(self, seq_id: str, blocks: Sequence[int]) -> None:
        """Put the content of a sequence's blocks aside."""
        self._swapped[seq_id] = self.array[:, list(blocks)].copy()

    def swap_in(self, seq_id: str, blocks: Sequence[int]) -> None:
        """Bring the content put aside back, into blocks that may be others."""
        self.array[:, list(blocks)] = self._swapped.pop(seq_id)

    def put_aside(self, seq_id: str, pages: np.ndarray) -> None:
        """Let `swap_in` find pages [layers, blocks, 64, latent + rope] that came from elsewhere."""
        self._swapped[seq_id] = pages

    def pages(self, blocks: Sequence[int]) -> np.ndarray:
        """A copy of some blocks: [layers, blocks, 64, latent + rope]."""
        return self.array[:, list(blocks)]

    def drop(self, seq_id: str) -> None:
        """Forget what was put aside for a sequence."""
        self._swapped.pop(seq_id, None)
