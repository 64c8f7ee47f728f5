"""Starts processes that act as the ranks of a group, for tests."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from whalefall import launch
from whalefall.arguments import whole
from whalefall.errors import ConfigError

__all__ = ["run_ranks"]


def run_ranks(
    target: Callable[..., Any], size: int, *arguments: Any, timeout_s: float = 120.0
) -> list[Any]:
    """Call `target(rank, size, folder, *arguments)` in `size` processes at once.

    Args:
        target: a function at the top of an importable module or a test file.
        size: how many ranks.
        arguments: JSON values; what `target` returns must be one too.
        timeout_s: after which all are ended.
    Returns: what each rank returned, in order.
    Raises: RankFailure if a rank fails, with its last words; the others are ended. ConfigError for
        a function that a new process could not find.
    """
    whole("run_ranks: size", size, 1)
    if "." in target.__qualname__ or target.__name__ == "<lambda>":
        raise ConfigError(
            f"run_ranks: {target.__qualname__} is no function at the top of a module; a new "
            "process cannot find it"
        )
    file = str(Path(inspect.getfile(target)).resolve())
    with tempfile.TemporaryDirectory(prefix="whalefall-ranks-") as folder:
        tasks = [
            launch.Task(
                f"rank {rank}",
                f"{__name__}:_call",
                kwargs={
                    "file": file, "module": target.__module__, "name": target.__name__,
                    "arguments": [rank, size, folder, *arguments],
                },
                env={"OMP_NUM_THREADS": "1"},
            )
            for rank in range(size)
        ]  # fmt: skip
        results: list[Any] = launch.run(tasks, timeout_s)
    return results


def _call(file: str, module: str, name: str, arguments: list[Any]) -> Any:
    """In the rank: a test file is no module that can be imported by its name, so by its path."""
    try:
        found = importlib.import_module(module)
        wanted = inspect.getfile(found)
    except (ImportError, TypeError):
        found, wanted = None, ""
    if found is None or Path(wanted).resolve() != Path(file):
        spec = importlib.util.spec_from_file_location("ranks_target", file)
        if spec is None or spec.loader is None:
            raise ConfigError(f"run_ranks: {file} is no Python file")
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
    return getattr(found, name)(*arguments)
