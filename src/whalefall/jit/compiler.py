"""Which C++ compiler there is: WHALEFALL_CXX, the system's, or the one in the ziglang wheel.

One that answers is not one that compiles: headers may be missing, or it may be older than the CPU's
instructions. So each candidate compiles a few lines before it is taken, once for its version, and
for the highest level it can.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

from whalefall import env
from whalefall.errors import ConfigError, MissingError
from whalefall.jit import isa
from whalefall.jit.progress import announce
from whalefall.writing import write_text

__all__ = ["OPTIONS", "Compiler", "NoCompilerError", "compiler", "find_compiler", "numpy_instead"]


NAMES = ("c++", "g++", "clang++")  # looked for in this order; make and env.py name them too
OPTIONS = (
    # Contraction is off so that an FMA happens only where the source says so: the same bits at
    # every optimisation level and compiler. No -ffast-math: NaN must stay NaN.
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno"),
    *("-fno-trapping-math", "-fvisibility=hidden", "-pthread", "-Wall", "-Wno-psabi"),
)
_PROBE = """
#include <cstdint>
#include <string>
#include <thread>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
extern "C" std::uint64_t wf_probe() { return std::to_string(sizeof(std::thread)).size(); }
"""
_PROBE_S = 600.0  # ziglang builds its C++ library first, in 40 s on an idle machine
_LONGEST = 160  # characters of a compiler's words in a message


class NoCompilerError(MissingError):
    """There is no C++ compiler: what numpy can compute too, it computes."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler.

    Attributes:
        command: what starts it.
        version: what it says about itself.
        level: the highest ISA level of this CPU that it compiles for.
    """

    command: tuple[str, ...]
    version: str
    level: str


def _candidates() -> list[tuple[str, ...]]:
    forced = env.get("WHALEFALL_CXX")
    if forced:
        try:
            return [tuple(shlex.split(forced))]
        except ValueError as error:
            raise ConfigError(
                f"WHALEFALL_CXX is {forced!r}, wanted a command as a shell takes it ({error})"
            ) from None
    found: list[tuple[str, ...]] = [(path,) for path in map(shutil.which, NAMES) if path]
    if importlib.util.find_spec("ziglang"):
        found.append((sys.executable, "-m", "ziglang", "c++"))
    return found


class _Refused(Exception):
    """Why a candidate is none."""


def find_compiler() -> Compiler | None:
    """The first candidate that compiles, or None."""
    return _search()[0]


@functools.cache
def _search() -> tuple[Compiler | None, str]:
    """What `find_compiler` returns, and why the candidates before it are none."""
    reasons: list[str] = []
    for command in _candidates():
        try:
            return _tried(command), "; ".join(reasons)
        except _Refused as reason:
            reasons.append(f"{' '.join(command)}: {reason}")
    return None, "; ".join(reasons)


def _tried(command: tuple[str, ...]) -> Compiler:
    answer = _run((*command, "--version"), 60)
    if answer.returncode != 0 or not answer.stdout:
        raise _Refused("gives no --version")
    version = answer.stdout.splitlines()[0]
    mark = _mark(command, version)
    levels = isa.cpu_levels()
    level, lacks = _remembered(mark)
    if level not in levels:
        level, lacks = _highest(command, levels)
        with contextlib.suppress(ConfigError), env.using_cache():  # a build will say so
            write_text(mark, f"{level}\n{lacks}")
    if level != levels[-1]:
        warnings.warn(
            f"jit: {' '.join(command)} cannot compile for {levels[-1]} ({lacks}): kernels are for "
            f"{level}, slower; install a newer compiler or name one in WHALEFALL_CXX",
            stacklevel=2,
        )
    return Compiler(command, version, level)


def _run(command: tuple[str, ...], seconds: float) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=seconds, check=False
        )
    except OSError as error:
        raise _Refused(error.strerror or "does not start") from None
    except subprocess.TimeoutExpired:
        raise _Refused(f"no answer in {seconds:g} s") from None


def _mark(command: tuple[str, ...], version: str) -> Path:
    """The file that holds what was found out about a compiler, by all that says which one it is."""
    where = shutil.which(command[0])
    stat = os.stat(where) if where else None
    texts = [*command, version, *OPTIONS, _PROBE, *isa.cpu_levels()]
    texts += [str((stat.st_mtime_ns, stat.st_size))] if stat else []
    name = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:20]
    with contextlib.suppress(ConfigError):
        return env.cache_dir("compilers") / name
    return Path(os.devnull) / name


def _remembered(mark: Path) -> tuple[str, str]:
    try:
        level, _, lacks = mark.read_text(encoding="utf-8").partition("\n")
    except (OSError, ValueError):
        return "", ""
    return level, lacks


def _highest(command: tuple[str, ...], levels: tuple[str, ...]) -> tuple[str, str]:
    """The highest level that a compiler compiles for, and its words about those above."""
    lacks = ""
    for level in reversed(levels):
        with tempfile.TemporaryDirectory(prefix="whalefall-probe-") as folder:
            source = Path(folder) / "probe.cpp"
            source.write_text(_PROBE, encoding="utf-8")
            # with a kernel's options: for others, ziglang would build its C++ library once more
            options = (*OPTIONS, *isa.flags(level), str(source), "-o", f"{folder}/probe.so", "-ldl")
            with announce(f"trying {' '.join(command)} ({level})", sys.stderr):
                done = _run((*command, *options), _PROBE_S)
            if done.returncode == 0 and Path(folder, "probe.so").is_file():
                return level, lacks
        lacks = lacks or _words(done.stderr)
    raise _Refused(f"cannot compile: {lacks}")


def _words(stderr: str) -> str:
    """The line of a compiler's output that says most, shortened."""
    lines = [" ".join(line.split()) for line in stderr.splitlines() if line.strip()]
    said = next((line for line in lines if "error" in line), lines[0] if lines else "no words")
    return said if len(said) <= _LONGEST else said[: _LONGEST - 1] + "…"


def forget(tool: Compiler) -> None:
    """Let the next process try this compiler anew: it refused a source, and may be at fault."""
    with contextlib.suppress(OSError):
        _mark(tool.command, tool.version).unlink()


def without() -> str:
    """What to say of a machine without a compiler: "none", and why candidates are none."""
    reasons = _search()[1]
    return f"none ({reasons})" if reasons else "none"


def compiler() -> Compiler:
    """The compiler; NoCompilerError with the remedy where there is none."""
    found, reasons = _search()
    if found is not None:
        return found
    if forced := env.get("WHALEFALL_CXX"):
        raise NoCompilerError(
            f"no C++ compiler: WHALEFALL_CXX is {forced!r} ({reasons}); correct it, or unset it to "
            "have one looked for (pip install ziglang brings one)"
        )
    if reasons:
        raise NoCompilerError(
            f"no C++ compiler that compiles ({reasons}); repair it, or pip install ziglang"
        )
    raise NoCompilerError(
        "no C++ compiler (WHALEFALL_CXX, c++, g++, clang++ or ziglang); "
        "pip install ziglang, or apt-get install g++"
    )


_said = threading.Lock()  # held from the first warning on


def numpy_instead(missing: NoCompilerError) -> None:
    """Warn, once in a process, that numpy computes what a native unit would."""
    if _said.acquire(blocking=False):
        warnings.warn(f"{missing}; running the numpy reference, slowly", stacklevel=3)
