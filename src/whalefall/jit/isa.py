"""Instruction-set levels: which there are, which this machine has, how to compile for one.

`any` is the x86-64 (or other architecture's) baseline; each later level contains the ones before.
A kernel is written once over `whalefall/simd.h` and compiled for a level; WHALEFALL_ISA forces one.
"""

from __future__ import annotations

import ctypes
import functools
import os
from dataclasses import dataclass
from pathlib import Path

from whalefall import env
from whalefall.errors import ConfigError, UnsupportedError

__all__ = ["LEVELS", "best_level", "cpu_features", "cpu_levels", "flags", "levels"]


@dataclass(frozen=True)
class Level:
    """One ISA level: its rank in the order, the CPU flags it needs, the compiler options."""

    rank: int
    needs: frozenset[str]
    options: tuple[str, ...]


_AVX2 = frozenset({"avx2", "fma", "f16c", "bmi2"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vbmi", "avx512_vnni"}
_BF16 = _AVX512 | {"avx512_bf16"}
_AMX = _BF16 | {"amx_tile", "amx_bf16", "amx_int8"}
_ASK_FOR_TILES = (158, 0x1023, 18)  # arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
_AVX2_OPTIONS = ("-mavx2", "-mfma", "-mf16c", "-mbmi2")
_AVX512_OPTIONS = (
    *_AVX2_OPTIONS,
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vbmi", "-mavx512vnni"),
)
LEVELS: dict[str, Level] = {
    "any": Level(0, frozenset(), ()),
    "avx2": Level(1, _AVX2, _AVX2_OPTIONS),
    "avx512": Level(2, _AVX512, _AVX512_OPTIONS),
    "avx512bf16": Level(3, _BF16, (*_AVX512_OPTIONS, "-mavx512bf16")),
    "amx": Level(
        4, _AMX, (*_AVX512_OPTIONS, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8")
    ),
}


@functools.cache
def cpu_features() -> frozenset[str]:
    """The flags of /proc/cpuinfo (the kernel leaves out what it does not save, as XCR0 tells)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def cpu_levels() -> tuple[str, ...]:
    """The levels that this CPU has and the system lets this process use, lowest first."""
    have = cpu_features()
    found = tuple(name for name, level in LEVELS.items() if level.needs <= have)
    return found if "amx" not in found or _may_use_tiles() else found[:-1]


@functools.cache
def _may_use_tiles() -> bool:
    """Ask Linux for the tiles' registers, which it keeps from a process until it has asked.

    It says no before 5.16, under some sandboxes, and where a thread's stack for signals is too
    small for them. Threads have what their process has, and children of fork() what it had.
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "syscall", None)
    return call is not None and call(*map(ctypes.c_long, _ASK_FOR_TILES)) == 0


@functools.cache
def levels() -> tuple[str, ...]:
    """The levels that this CPU has and the compiler here, if any, compiles for; lowest first."""
    from whalefall.jit.compiler import find_compiler  # which asks here what the CPU has

    have, tool = cpu_levels(), find_compiler()
    return have[: have.index(tool.level) + 1] if tool else have


def best_level() -> str:
    """The level kernels use: WHALEFALL_ISA where set, else the highest of `levels`.

    Raises: ConfigError for an unknown name, UnsupportedError for a level that CPU or compiler lack.
    """
    return _level(env.native(b"WHALEFALL_ISA"))


@functools.cache
def _level(text: bytes | None) -> str:
    forced = os.fsdecode(text or b"")
    if not forced:
        return levels()[-1]
    if forced not in LEVELS:
        raise ConfigError(f"WHALEFALL_ISA is {forced!r}, wanted one of {', '.join(LEVELS)}")
    if forced not in levels():
        if forced in cpu_levels():
            raise UnsupportedError(
                f"WHALEFALL_ISA={forced}: the C++ compiler here cannot compile for it, wanted one "
                f"of {', '.join(levels())}; unset it, or name a newer compiler in WHALEFALL_CXX"
            )
        missing = ", ".join(sorted(LEVELS[forced].needs - cpu_features()))
        why = (
            f"this CPU lacks {missing}"
            if missing
            else "the system keeps its tiles from this process"
        )
        raise UnsupportedError(f"WHALEFALL_ISA={forced}: {why}; unset it")
    return forced


def flags(level: str) -> tuple[str, ...]:
    """Compiler options for a level, with WF_ISA (its rank) and WF_ISA_NAME defined."""
    return (*LEVELS[level].options, f"-DWF_ISA={LEVELS[level].rank}", f'-DWF_ISA_NAME="{level}"')
