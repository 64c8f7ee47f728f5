"""A live bar on standard error while a plan runs, where someone watches it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["shown"]


@contextmanager
def shown(job: Any, wanted: bool | None) -> Iterator[None]:
    """Show finished and all tasks while the block runs.

    Args:
        job: its `watch` is called as tasks finish.
        wanted: None for: if standard error is a terminal.
    """
    if not (sys.stderr.isatty() if wanted is None else wanted):
        yield
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        line = progress.add_task("tasks", total=None)

        def watch(finished: int, total: int, label: str) -> None:
            progress.update(line, completed=finished, total=total, description=label)

        job.watch = watch
        try:
            yield
        finally:
            job.watch = None
