"""Launch room: what one process shall run, and the command line that does it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from whalefall.errors import ConfigError

__all__ = ["Task"]

_TARGET = re.compile(r"\w[\w.]*(:[A-Za-z_]\w*)?")


@dataclass(frozen=True)
class Task:
    """One process to start.

    Attributes:
        name: what reports call it ("rank 3", "storage 1").
        target: "package.module", run as `python -m`; or "package.module:function", called with
            `kwargs`, whose return value is the task's result.
        args: a module's command-line arguments.
        kwargs: a function's keyword arguments; they, and what it returns, must be JSON values.
        env: variables added to this process's environment.
        prefix: a command put before Python's, e.g. ("ip", "netns", "exec", "host0"); it must exec.
        log: a file to which stdout and stderr are appended; None: stdout is ours, and of stderr
            the last lines are kept for the report.
        path: folders put first on the module search path.
        heard: called with (name, line) for each line of stderr, in a thread; only without `log`.
    """

    name: str
    target: str
    args: tuple[str, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    prefix: tuple[str, ...] = ()
    log: Path | None = None
    path: tuple[str, ...] = ()
    heard: Callable[[str, str], None] | None = None

    def __post_init__(self) -> None:
        if not _TARGET.fullmatch(self.target):
            raise ConfigError(
                f"launch: {self.name}: target is {self.target!r}, wanted module or module:function"
            )
        if self.kwargs and ":" not in self.target:
            raise ConfigError(f"launch: {self.name}: kwargs need module:function, not a module")

    def command(self, parent: int, result: int) -> list[str]:
        """The command line: our bootstrap, which binds the process to `parent`, then the target."""
        call = msgspec.json.encode(dict(self.kwargs)).decode() if ":" in self.target else ""
        arguments = [str(parent), str(result), self.target, *([call] if call else self.args)]
        return [*self.prefix, sys.executable, "-m", "whalefall.launch.child", *arguments]

    def environment(self) -> dict[str, str]:
        """The process's environment; it finds the modules that this process finds."""
        folders = [*self.path, *(p for p in sys.path if p)]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(folders)), **self.env}
