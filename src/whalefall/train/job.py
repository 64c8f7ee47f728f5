"""Train room: a run as a group of processes, watched from here.

In: a recipe. Out: progress on the terminal; a `RankFailure` with a readable report if a rank dies.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from whalefall.errors import ConfigError
from whalefall.launch import Group, Task
from whalefall.train.data import Rows
from whalefall.train.history import read_history
from whalefall.train.rank import DivergedError
from whalefall.train.recipe import Recipe, read_recipe
from whalefall.train.trainer import HISTORY, check_recipe, store_of

__all__ = ["run"]

POLL_S = 0.1


def run(
    path: str | Path,
    *,
    resume: bool = False,
    changes: dict[str, Any] | None = None,
    progress: Callable[[list[dict[str, Any]]], None] = lambda lines: None,
) -> Recipe:
    """Train a recipe to its end.

    Args:
        path: the TOML file.
        resume: go on from the newest checkpoint of the run's folder.
        changes: as `read_recipe`'s.
        progress: called with the new lines of the history, now and then.
    Returns: the recipe as read.
    Raises: RankFailure naming the rank that died; DivergedError; ConfigError if the folder has
        checkpoints and `resume` is not given, or those of another recipe; MissingError for data
        that is not there; as `read_recipe`.
    """
    recipe = read_recipe(path, changes)
    store = store_of(recipe)
    steps = store.steps()
    if steps and not resume:
        raise ConfigError(
            f"train: {recipe.checkpoints} has a checkpoint of step {steps[-1]}; --resume goes on "
            "from it, another run.folder starts anew"
        )
    if steps:
        check_recipe(store, steps[-1], recipe)
    Rows(recipe)  # says here, in one line, what every rank would stumble over
    if "://" in recipe.folder:
        raise ConfigError(f"train: run.folder is {recipe.folder}, wanted a local folder")
    with tempfile.TemporaryDirectory(prefix="whalefall-train-") as folder:
        tasks = [_task(path, changes, rank, folder, resume) for rank in
                 range(recipe.parallel.ranks)]  # fmt: skip
        with Group(tasks) as group:
            _watch(group, Path(recipe.folder) / HISTORY, progress)
            results = group.wait()
    for result in results:
        if "diverged" in result:
            raise DivergedError(result["diverged"])
    return recipe


def _task(
    path: str | Path, changes: dict[str, Any] | None, rank: int, folder: str, resume: bool
) -> Task:
    kwargs = {
        "recipe": str(path), "changes": changes or {}, "rank": rank,
        "meeting": os.path.join(folder, "meeting"), "resume": resume,
    }  # fmt: skip
    environment = {
        # a rank that writes a checkpoint, or compiles a kernel, keeps the others waiting
        "WHALEFALL_EP_TIMEOUT": os.environ.get("WHALEFALL_EP_TIMEOUT", "600"),
        # glibc would give freed activations back to the kernel and fault them in again
        "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    }
    return Task(f"rank {rank}", "whalefall.train.trainer:run_rank", kwargs=kwargs, env=environment)


def _watch(group: Group, history: Path, progress: Callable[[list[dict[str, Any]]], None]) -> None:
    """Hand on new lines until every rank has ended, or one has failed."""
    size, seen = 0, -1
    while True:
        group.check()
        ended = len(group.exits()) == len(group.members)
        if history.is_file() and history.stat().st_size != size:
            size = history.stat().st_size
            lines = [line for line in read_history(history) if line["step"] > seen]
            if lines:
                seen = lines[-1]["step"]
                progress(lines)
        if ended:
            return
        time.sleep(POLL_S)
