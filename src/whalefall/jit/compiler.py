"""Which C++ compiler there is: WHALEFALL_CXX, the system's, or the one in the ziglang wheel."""

from __future__ import annotations

import functools
import importlib.util
import shlex
import shutil
import subprocess
import sys
import threading
import warnings
from dataclasses import dataclass

from whalefall import env
from whalefall.errors import ConfigError, MissingError

__all__ = ["Compiler", "NoCompilerError", "compiler", "find_compiler", "numpy_instead"]


NAMES = ("c++", "g++", "clang++")  # looked for in this order; make and env.py name them too


class NoCompilerError(MissingError):
    """There is no C++ compiler: what numpy can compute too, it computes."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: the command that starts it, and what it says about itself."""

    command: tuple[str, ...]
    version: str


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


@functools.cache
def find_compiler() -> Compiler | None:
    """The first compiler that answers `--version`, or None."""
    for command in _candidates():
        try:
            done = subprocess.run(
                [*command, "--version"], capture_output=True, text=True, timeout=60, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0 and done.stdout:
            return Compiler(command, done.stdout.splitlines()[0])
    return None


def compiler() -> Compiler:
    """The compiler; NoCompilerError with the remedy where there is none."""
    found = find_compiler()
    if found is None:
        raise NoCompilerError(
            "no C++ compiler (WHALEFALL_CXX, c++, g++, clang++ or ziglang); "
            "pip install ziglang, or apt-get install g++"
        )
    return found


_said = threading.Lock()  # held from the first warning on


def numpy_instead(missing: NoCompilerError) -> None:
    """Warn, once in a process, that numpy computes what a native unit would."""
    if _said.acquire(blocking=False):
        warnings.warn(f"{missing}; running the numpy reference, slowly", stacklevel=3)
