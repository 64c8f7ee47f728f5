"""The process's one kernel thread pool: how many threads it has, and its address for libraries."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

from whalefall import env
from whalefall.arguments import whole
from whalefall.errors import ConfigError
from whalefall.jit import isa
from whalefall.jit.compile import ON_LOAD, Library, build
from whalefall.jit.compiler import NoCompilerError

MOST_THREADS = 4096  # more than machines have cores: beyond it, a mistyped number

__all__ = ["MOST_THREADS", "address", "get_num_threads", "set_num_threads"]


class _NoThreads:
    """Stands for the pool where nothing can be compiled: remembers a number, and has no threads."""

    count = 1

    def wf_pool_set_threads(self, count: int) -> None:
        self.count = count

    def wf_pool_get_threads(self) -> int:
        return self.count


@functools.cache
def _pool() -> Library | _NoThreads:
    # One pool whatever WHALEFALL_ISA says, with the options that kernels have by default: for other
    # options ziglang would build its C++ library once more, which takes 40 s.
    library: Library | _NoThreads
    try:
        library = build(Path(__file__).parent / "native" / "pool.cpp", level=isa.levels()[-1])
        library.wf_pool.restype = ctypes.c_void_p
    except NoCompilerError:
        library = _NoThreads()
    text = env.get("WHALEFALL_THREADS")
    if text and not (text.isdecimal() and 0 < int(text) <= MOST_THREADS):
        raise ConfigError(f"WHALEFALL_THREADS is {text!r}, wanted 1 to {MOST_THREADS}, whole")
    library.wf_pool_set_threads(int(text) if text else len(os.sched_getaffinity(0)))
    return library


def address() -> int:
    """The address of the pool's `wf::Pool`, for `wf_set_pool`."""
    pool = _pool()
    assert isinstance(pool, Library)  # who asks is a library just loaded
    return int(pool.wf_pool())


def get_num_threads() -> int:
    """How many threads kernels use, the caller's included."""
    return int(_pool().wf_pool_get_threads())


def set_num_threads(count: int) -> None:
    """Set how many threads kernels use from the next call on; results do not depend on it.

    Source: the counterpart of DeepGEMM's `set_num_sms`.
    """
    _pool().wf_pool_set_threads(whole("set_num_threads: count", count, 1, MOST_THREADS))


def _hand_over(library: Library) -> None:
    if hasattr(library, "wf_set_pool"):
        library.wf_set_pool(ctypes.c_void_p(address()))


ON_LOAD.append(_hand_over)
