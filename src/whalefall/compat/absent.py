"""Names of the originals that are not built here: one line says so, and what serves instead.

A stand-in module's `__getattr__` is `absent(module)`; `from module import name` and
`import module.name` end in `refuse_import`, since Python replaces an AttributeError there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from whalefall.errors import WhalefallError

__all__ = ["INSTEAD", "AbsentError", "absent", "refuse_import"]

_LOGITS = "float32 products of torch or numpy over cast-back rows, and indices made of them"
_MEGA = "whalefall.gemm.fused_experts, between deep_ep's dispatch and combine"
_FORWARD = "flash_attn_varlen_func under torch.no_grad()"
_DIST = "torch.distributed"

INSTEAD: dict[str, dict[str, str]] = {
    "deep_gemm": {
        "fp8_mqa_logits": _LOGITS,
        "fp8_fp4_mqa_logits": _LOGITS,
        "fp8_paged_mqa_logits": _LOGITS,
        "fp8_fp4_paged_mqa_logits": _LOGITS,
        "get_paged_mqa_logits_metadata": _LOGITS,
        "einsum": "numpy.einsum or torch.einsum",
        "fp8_einsum": "fp8_gemm_nt, once for each matrix",
        "tf32_hc_prenorm_gemm": "a float32 product of torch or numpy, and sums of squares",
        "mega": _MEGA,
        "get_symm_buffer_for_mega_moe": _MEGA,
        "transform_weights_for_mega_moe": _MEGA,
        "fp8_fp4_mega_moe": _MEGA,
        "bf16_mega_moe": _MEGA,
        "SymmBuffer": _MEGA,
        "legacy": "m_grouped_bf16_gemm_nt_contiguous or k_grouped_bf16_gemm_tn_contiguous",
        "dist": _DIST,
        "init_dist": f"{_DIST}.init_process_group",
        "uneven_all_gather": f"{_DIST}.all_gather",
    },
    "deep_gemm.utils": {"dist": _DIST},
    "flash_mla": {
        "FlashAttnVarlenFunc": _FORWARD,
        "_flash_attn_varlen_forward": _FORWARD,
        "_flash_attn_varlen_backward": "torch's own attention where a gradient is wanted",
        "cuda": "the functions of flash_mla",
    },
}


class AbsentError(WhalefallError, AttributeError):
    """A name of an original that is not built."""


def _line(module: str, name: str) -> str:
    return f"{module}.{name} is not implemented in whalefall; use {INSTEAD[module][name]}"


def absent(module: str) -> Callable[[str], Any]:
    """The `__getattr__` of the module that stands in for `module`."""

    def missing(name: str) -> NoReturn:
        if name in INSTEAD[module]:
            raise AbsentError(_line(module, name))
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return missing


def refuse_import(path: str) -> None:
    """ImportError where `path`, a dotted name, is known as not built."""
    module, _, name = path.rpartition(".")
    if name in INSTEAD.get(module, {}):
        raise ImportError(_line(module, name), name=path)
