"""The scheduling object that FlashMLA's callers pass along; results do not depend on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from whalefall.arguments import shown
from whalefall.errors import DtypeError

__all__ = ["FlashMLASchedMeta", "check_metadata", "get_mla_metadata"]


@dataclass
class FlashMLASchedMeta:
    """Stands for the schedule that a GPU kernel would keep between calls; its fields stay as made.

    Work is shared out anew in each call, in cuts that are fixed for each request.

    Attributes:
        have_initialized: False.
        config, tile_scheduler_metadata, num_splits: None.
    """

    @dataclass
    class Config:
        """The sizes that the original's schedule is made for."""

        b: int
        s_q: int
        h_q: int
        page_block_size: int
        h_k: int
        causal: bool
        is_fp8_kvcache: bool
        topk: int | None
        extra_page_block_size: int | None
        extra_topk: int | None

    have_initialized: bool = False
    config: Config | None = None
    tile_scheduler_metadata: Any = None
    num_splits: Any = None


def get_mla_metadata(*args: Any, **kwargs: Any) -> tuple[FlashMLASchedMeta, None]:
    """A schedule object and None, to be passed on to `flash_mla_with_kvcache`.

    Args:
        args, kwargs: accepted and ignored, as the original does.
    Source: FlashMLA `get_mla_metadata`.
    """
    return FlashMLASchedMeta(), None


def check_metadata(where: str, metadata: Any, num_splits: Any) -> None:
    """Accepts both habits: the object with None, or the two int tensors of older releases."""
    if metadata is None or (isinstance(metadata, FlashMLASchedMeta) and num_splits is None):
        return
    if all(_is_int32(tensor) for tensor in (metadata, num_splits)):
        return
    raise DtypeError(
        f"{where}: tile_scheduler_metadata is {shown(metadata)} and num_splits is "
        f"{shown(num_splits)}, wanted an object and None, or two int32 tensors; pass on what "
        "get_mla_metadata() gave"
    )


def _is_int32(tensor: Any) -> bool:
    dtype = str(getattr(tensor, "dtype", "")).removeprefix("torch.")
    return hasattr(tensor, "shape") and dtype == "int32"
