"""DeepGEMM's settings. Only the alignment and the thread count mean anything on a CPU.

Source: DeepGEMM `csrc/apis/runtime.hpp`, `csrc/apis/layout.hpp`.
"""

from __future__ import annotations

from dataclasses import dataclass

from whalefall import jit
from whalefall.arguments import flag, shown, whole
from whalefall.errors import ConfigError

__all__ = [
    "get_k_alignment_for_contiguous_layout",
    "get_m_alignment_for_contiguous_layout",
    "get_mk_alignment_for_contiguous_layout",
    "get_num_sms",
    "get_pdl",
    "get_tc_util",
    "get_theoretical_mk_alignment_for_contiguous_layout",
    "set_block_size_multiple_of",
    "set_ignore_compile_dims",
    "set_mk_alignment_for_contiguous_layout",
    "set_num_sms",
    "set_pdl",
    "set_tc_util",
]


@dataclass
class _Settings:
    alignment: int = 128
    tc_util: int = 100
    pdl: bool = False
    ignore_compile_dims: bool = False
    block_size_multiple_of: tuple[int, int] = (1, 1)


_settings = _Settings()


def set_mk_alignment_for_contiguous_layout(new_value: int, /) -> None:
    """Set the multiple at which groups of a contiguous or psum layout start (128 unless set)."""
    _settings.alignment = whole("set_mk_alignment_for_contiguous_layout: new_value", new_value, 1)


def get_mk_alignment_for_contiguous_layout() -> int:
    """The multiple at which groups of a contiguous or psum layout start."""
    return _settings.alignment


get_m_alignment_for_contiguous_layout = get_mk_alignment_for_contiguous_layout
get_k_alignment_for_contiguous_layout = get_mk_alignment_for_contiguous_layout


def get_theoretical_mk_alignment_for_contiguous_layout(expected_m: int | None = None) -> int:
    """128, as on the original's SM90 path; `expected_m` changes nothing there either."""
    if expected_m is not None:
        whole("get_theoretical_mk_alignment_for_contiguous_layout: expected_m", expected_m, 0)
    return 128


def set_num_sms(new_num_sms: int, /) -> None:
    """Set the number of kernel threads (SMs, on a GPU); 0: all cores."""
    whole("set_num_sms: new_num_sms", new_num_sms, 0, jit.MOST_THREADS)
    import os

    jit.set_num_threads(new_num_sms or len(os.sched_getaffinity(0)))


def get_num_sms() -> int:
    """The number of kernel threads."""
    return jit.get_num_threads()


def set_tc_util(new_tc_util: int, /) -> None:
    """Remember a tensor-core utilisation of 0 (meaning 100) to 100; it changes no result."""
    _settings.tc_util = whole("set_tc_util: new_tc_util", new_tc_util, 0, 100) or 100


def get_tc_util() -> int:
    """What `set_tc_util` was given; 100 unless set."""
    return _settings.tc_util


def set_pdl(new_enable_pdl: bool, /) -> None:
    """Remember whether dependent launches are wanted; a CPU has none."""
    _settings.pdl = flag("set_pdl: new_enable_pdl", new_enable_pdl)


def get_pdl() -> bool:
    """What `set_pdl` was given; False unless set."""
    return _settings.pdl


def set_ignore_compile_dims(new_value: bool, /) -> None:
    """Accepted: no dimension is ever compiled in here."""
    _settings.ignore_compile_dims = flag("set_ignore_compile_dims: new_value", new_value)


def set_block_size_multiple_of(new_value: int | tuple[int, int], /) -> None:
    """Accepted: tiles are fixed here, and results do not depend on them."""
    pair = new_value if isinstance(new_value, tuple) else (new_value, new_value)
    if len(pair) != 2:
        raise ConfigError(
            f"set_block_size_multiple_of: new_value is {shown(new_value)}, wanted one number "
            "or two; pass (m, n)"
        )
    m, n = (whole("set_block_size_multiple_of: new_value", size, 1) for size in pair)
    _settings.block_size_multiple_of = m, n
