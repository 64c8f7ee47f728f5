"""Jit room: C++ compiled at first use, cached, loaded; one thread pool; what the machine can do.

In: a source file of a room's `native/` folder, defines, an ISA level. Out: a `Library` whose C
functions are called through ctypes (the GIL is free meanwhile).
Source: DeepGEMM's run-time compilation, for CPUs.
"""

from whalefall.jit.compile import Library, build
from whalefall.jit.compiler import NoCompilerError, numpy_instead
from whalefall.jit.isa import LEVELS, best_level, levels
from whalefall.jit.pool import MOST_THREADS, get_num_threads, set_num_threads

__all__ = [
    "LEVELS",
    "MOST_THREADS",
    "Library",
    "NoCompilerError",
    "best_level",
    "build",
    "get_num_threads",
    "levels",
    "numpy_instead",
    "set_num_threads",
]
