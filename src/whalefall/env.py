"""Every environment variable whalefall reads, in one table (also the page docs/environment.md).

`get` returns the value as text, `TABLE` describes it; no other module reads `os.environ` for a
`WHALEFALL_` name.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from whalefall.errors import ConfigError, WhalefallError

__all__ = ["TABLE", "Variable", "cache_dir", "get", "markdown", "native", "using_cache"]


@dataclass(frozen=True)
class Variable:
    """One environment variable: its name, default (as text) and meaning."""

    name: str
    default: str
    meaning: str


TABLE = (
    Variable(
        "WHALEFALL_CACHE", "~/.cache/whalefall", "where compiled kernels and measurements are kept"
    ),
    Variable(
        "WHALEFALL_ISA",
        "",
        "forces an instruction-set level: any, avx2, avx512, avx512bf16 or amx (default: the best)",
    ),
    Variable("WHALEFALL_THREADS", "", "threads of the kernel pool (default: all cores)"),
    Variable(
        "WHALEFALL_TRACE", "", "a folder: each process records a trace and writes it there at exit"
    ),
    Variable(
        "WHALEFALL_EP_TIMEOUT",
        "10",
        "seconds that a living rank may keep the others of its group waiting",
    ),
    Variable("WHALEFALL_HOST", "", "name of this host in a group of ranks (default: found out)"),
    Variable("WHALEFALL_FS_TOKEN", "", "the secret of the file-system cluster to connect to"),
    Variable(
        "WHALEFALL_FS_LOCAL",
        "1",
        "0: TCP between file-system processes of one host too, where Unix sockets would do",
    ),
    Variable("WHALEFALL_API_KEY", "", "the key that clients of `whalefall serve` must send"),
    Variable(
        "WHALEFALL_CXX",
        "",
        "the C++ compiler (default: the first of c++, g++, clang++ and the ziglang wheel's that "
        "compiles)",
    ),
)
# The bytes of a variable, or None, as C sees it: a sixth of the time of `get`, for what every call
# of a kernel asks. Whatever sets `os.environ` sets this too; the call holds the interpreter's lock,
# as setting does.
native = ctypes.PyDLL(None).getenv
native.restype = ctypes.c_char_p

_DEFAULTS = {v.name: v.default for v in TABLE}


def get(name: str) -> str:
    """The value of a variable of `TABLE`, or its default where it is unset or empty.

    KeyError for a name not in the table.
    """
    default = _DEFAULTS[name]
    return os.environ.get(name) or default


def cache_dir(*parts: str) -> Path:
    """`WHALEFALL_CACHE` as a path, or a folder in it; created where missing.

    Raises: ConfigError where that cannot be done.
    """
    with using_cache():
        path = Path(get("WHALEFALL_CACHE")).expanduser().joinpath(*parts)
        path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def using_cache() -> Iterator[None]:
    """What the system refuses in the block becomes a ConfigError that names the cache folder."""
    try:
        yield
    except WhalefallError:  # one of them is an OSError too
        raise
    except (OSError, RuntimeError) as error:  # RuntimeError: `~name` of a user who is not there
        words = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(
            f"cache folder {get('WHALEFALL_CACHE')}: {words}; "
            "set WHALEFALL_CACHE to a folder that can be written to"
        ) from None


def markdown() -> str:
    """The table as the page docs/environment.md shows it."""
    rows = ["| variable | default | meaning |", "| --- | --- | --- |"]
    rows += [f"| `{v.name}` | `{v.default or '–'}` | {v.meaning} |" for v in TABLE]
    return "\n".join(rows) + "\n"
