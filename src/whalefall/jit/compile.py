"""Compiles one C++ source into a shared library, once per machine, and loads it.

The cache key covers the source, the headers it includes, options, compiler and CPU features, so a
cache folder shared between machines never serves a binary made for another one. Of the processes
that need the same thing at the same time one compiles, under a file lock; files appear by rename.
Each ends with its own checksum, which is looked at before it is loaded: the loader would map what a
full disk or a crash left of a file, and die of SIGBUS.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from whalefall import env
from whalefall.errors import ConfigError, MissingError, WhalefallError
from whalefall.jit import isa
from whalefall.jit.compiler import OPTIONS, Compiler, compiler, forget
from whalefall.jit.progress import announce

__all__ = ["INCLUDE", "CompileError", "Library", "build"]

INCLUDE = Path(__file__).parent / "include"
ABANDONED_S = 600.0  # no compiler works on one source for so long
_SEAL = b"whalefall-crc32:"  # then 8 hexadecimal digits: what a compiled file ends with
_INCLUDES = re.compile(rb'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


class CompileError(WhalefallError, RuntimeError):
    """The compiler refused a source; the message holds its first lines."""


class Library(ctypes.CDLL):
    """A loaded native library; `ON_LOAD` hooks (the thread pool's) have seen it.

    Attributes:
        path: the compiled file in the cache.
        level: the ISA level it was compiled for.
    """

    def __init__(self, path: Path, level: str) -> None:
        try:
            super().__init__(str(path))
        except OSError as error:
            raise ConfigError(
                f"jit: {error}; where its folder is mounted noexec, set WHALEFALL_CACHE to another"
            ) from None
        self.path = path
        self.level = level
        for hook in ON_LOAD:
            hook(self)


# Called with each library just loaded; `pool` hands its thread pool to units that export a slot.
ON_LOAD: list[Callable[[Library], None]] = []


def headers(source: Path) -> list[Path]:
    """The files that `source` includes by quoted name, recursively, in a fixed order."""
    seen: dict[Path, None] = {}
    todo = [source]
    while todo:
        current = todo.pop()
        for name in _INCLUDES.findall(current.read_bytes()):
            for folder in (current.parent, INCLUDE):
                path = (folder / os.fsdecode(name)).resolve()
                if path.is_file():
                    if path not in seen:
                        seen[path] = None
                        todo.append(path)
                    break
    return list(seen)


def cache_key(source: Path, options: Sequence[str], tool: Compiler) -> str:
    """A hash of everything that the compiled bytes depend on."""
    digest = hashlib.sha256()
    for path in [source, *headers(source)]:
        digest.update(path.read_bytes() + b"\0")
    for text in (
        _SEAL.decode(),
        *options,
        *tool.command,
        tool.version,
        *sorted(isa.cpu_features()),
    ):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:20]


def build(
    source: str | Path,
    defines: Mapping[str, str | int] | None = None,
    flags: Sequence[str] = (),
    level: str | None = None,
) -> Library:
    """Compile `source` (or find it compiled) and load it.

    Args:
        source: a .cpp file; it may include "whalefall/…" headers of this room and its neighbours.
        defines: macros; ints and identifiers only (dtype, head size), never M, N, K of a call.
        flags: more compiler options (a sanitizer, a warning).
        level: an ISA level; None: the best one, or what WHALEFALL_ISA forces.
    Returns: the library; the same object for the same arguments.
    Raises: NoCompilerError, MissingError without the source, CompileError with the compiler's
        words, ConfigError for a cache folder that cannot be used.
    """
    chosen = level or isa.best_level()
    pairs = tuple(sorted((defines or {}).items()))
    return _build(Path(source).resolve(), pairs, tuple(flags), chosen)


@functools.cache
def _build(
    source: Path, defines: tuple[tuple[str, str | int], ...], flags: tuple[str, ...], level: str
) -> Library:
    if not source.is_file():
        raise MissingError(f"jit: no source {source}; the wheel should carry it, reinstall")
    tool = compiler()
    options = [
        *OPTIONS,
        *isa.flags(level),
        *(f"-D{name}={value}" for name, value in defines),
        *flags,
    ]
    if any(path.name == "simd.h" for path in headers(source)):
        options += _measured_options(level)
    name = f"{source.stem}-{level}-{cache_key(source, options, tool)}.so"
    target = env.cache_dir("jit") / name
    if not _intact(target):
        with _alone(target):
            if not _intact(target):
                if target.exists():
                    warnings.warn(f"jit: {target} is damaged; compiling it anew", stacklevel=3)
                # Where the headers lie is not in the key, what they say is: checkouts share.
                _compile(tool, source, [*options, f"-I{INCLUDE}"], target)
    return Library(target, level)


def _intact(target: Path) -> bool:
    """Whether the file is there and is what `_seal` saw."""
    try:
        content = target.read_bytes()
    except OSError:
        return False
    body = content[: -len(_SEAL) - 8]
    return content.endswith(_SEAL + b"%08x" % zlib.crc32(body))


def _seal(path: str) -> None:
    """Append the checksum (a loader does not look behind the last section); on disk at return."""
    with open(path, "r+b") as file:
        file.write(_SEAL + b"%08x" % zlib.crc32(file.read()))
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """One process a machine compiles `target`; the other ranks of a unit wait for it."""
    with env.using_cache():
        file = target.with_suffix(".lock").open("w")
    with file:  # the kernel frees the lock if we are killed
        fcntl.flock(file, fcntl.LOCK_EX)
        for left in target.parent.glob(f"{target.stem}*.tmp"):  # of a process that was killed
            with contextlib.suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > ABANDONED_S:
                    left.unlink()
        try:
            yield
        finally:
            target.with_suffix(".lock").unlink(missing_ok=True)


def clear() -> tuple[int, int]:
    """Delete what is compiled, and what compilations that were ended left; running ones go on.

    Returns: how many libraries, how many files left over.
    """
    folder = env.cache_dir("jit")
    # These before the locks: whoever made one of them held its lock before, and holds it still.
    temporary, left = list(folder.glob("*.tmp")), 0
    with env.using_cache():
        for mark in env.cache_dir("compilers").iterdir():  # they are tried anew, too
            mark.unlink(missing_ok=True)
        libraries = list(folder.glob("*.so"))
        for path in libraries:
            path.unlink(missing_ok=True)
        running = []
        for lock in folder.glob("*.lock"):
            with contextlib.suppress(FileNotFoundError), lock.open("r+b") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    running.append(lock.stem)
                    continue
                lock.unlink()
                left += 1
        for path in temporary:
            if not path.name.startswith(tuple(running)):
                path.unlink(missing_ok=True)
                left += 1
    return len(libraries), left


def _measured_options(level: str) -> list[str]:
    from whalefall.jit import machine  # which builds a unit of its own, one without simd.h

    options = ["-DWF_SLOW_DENORMALS"] if machine.denormals_are_slow() else []
    if machine.tile_is_fast(level):
        return [*options, "-DWF_TILE"]
    return [*options, "-DWF_DOT"] if machine.dot_is_fast(level) else options


def _compile(tool: Compiler, source: Path, options: Sequence[str], target: Path) -> None:
    with env.using_cache():
        handle, name = tempfile.mkstemp(suffix=".tmp", prefix=target.stem, dir=target.parent)
    os.close(handle)
    command = [*tool.command, *options, str(source), "-o", name, "-ldl"]
    try:
        with announce(f"compiling {source.name} ({target.stem.split('-')[1]})", sys.stderr):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            forget(tool)
            words = "\n".join(done.stderr.splitlines()[:20])
            raise CompileError(f"jit: {' '.join(tool.command)} refused {source.name}:\n{words}")
        with env.using_cache():
            _seal(name)
            os.chmod(name, 0o755)
            os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)
