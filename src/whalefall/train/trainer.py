"""Train room: the loop of one rank, from a recipe to its last checkpoint.

In: a recipe and a meeting point. Out: checkpoints, history and curves in the run's folder.
`job.py` starts one process of this for each rank.
"""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from whalefall.errors import ConfigError
from whalefall.train.checkpoint import Stamp, Store
from whalefall.train.history import History, draw_curves, read_history
from whalefall.train.rank import DivergedError, Rank, set_threads
from whalefall.train.recipe import Recipe, read_recipe

__all__ = ["CURVES", "HISTORY", "check_recipe", "report_line", "run_rank", "store_of", "train"]

HISTORY, CURVES = "history.jsonl", "curves.svg"
DRAW_S = 30.0


def store_of(recipe: Recipe) -> Store:
    """Where a recipe's checkpoints are."""
    return Store(recipe.checkpoints, recipe.checkpoint.keep)


def run_rank(
    recipe: str, changes: dict[str, Any], rank: int, meeting: str, resume: bool
) -> dict[str, Any]:
    """A rank's process: join the others, train, say how it ended (`job.py` reads that)."""
    loaded = read_recipe(recipe, changes)
    dist.init_process_group(
        "gloo", f"file://{meeting}", rank=rank, world_size=loaded.parallel.ranks,
        timeout=timedelta(minutes=30),
    )  # fmt: skip
    try:
        return {"steps": train(loaded, resume)}
    except DivergedError as error:
        return {"diverged": str(error)}
    finally:
        dist.destroy_process_group()


def train(recipe: Recipe, resume: bool = False) -> int:
    """Train to the recipe's last step in this process, a rank of the default group.

    Args:
        resume: go on from the newest checkpoint; without one, start.
    Returns: the steps done.
    Raises: DivergedError, ConfigError where the checkpoint is of another recipe.
    """
    set_threads(recipe)
    rank, store = Rank(recipe), store_of(recipe)
    _go_on(rank, store, recipe, resume)
    folder, first = Path(recipe.folder), dist.get_rank() == 0
    folder.mkdir(parents=True, exist_ok=True)
    history = History(folder / HISTORY, rank.step) if first else None
    drawn = time.monotonic()
    while rank.step < recipe.run.steps:
        start = time.perf_counter()
        try:
            report = rank.train_step()
        except DivergedError as error:
            raise DivergedError(f"{error}; {_last(store)}") from None
        if history is not None:
            history.add(report, time.perf_counter() - start)
            if time.monotonic() - drawn > DRAW_S:
                draw_curves({"": read_history(folder / HISTORY)}, folder / CURVES)
                drawn = time.monotonic()
        if rank.step % recipe.checkpoint.every == 0 or rank.step == recipe.run.steps:
            store.save(rank.state(), _stamp(rank, recipe))
    if history is not None:
        history.close()
        draw_curves({"": read_history(folder / HISTORY)}, folder / CURVES)
    return rank.step


def _stamp(rank: Rank, recipe: Recipe) -> Stamp:
    return Stamp(rank.step, recipe.fingerprint(), recipe.raw_config)


def _last(store: Store) -> str:
    steps = store.steps()
    return f"last checkpoint: {store.path(steps[-1])}" if steps else "there is no checkpoint yet"


def _go_on(rank: Rank, store: Store, recipe: Recipe, resume: bool) -> None:
    steps = store.steps()
    if not resume or not steps:
        return
    check_recipe(store, steps[-1], recipe)
    store.load(steps[-1], rank.state())
    rank.loaded(steps[-1])


def check_recipe(store: Store, step: int, recipe: Recipe) -> None:
    """ConfigError where a checkpoint is of another recipe."""
    if store.stamp(step).fingerprint != recipe.fingerprint():
        raise ConfigError(
            f"train: {store.path(step)} is of another recipe (model, data, loss, optimizer, "
            "seed or steps differ); choose another run.folder"
        )


def report_line(line: dict[str, Any]) -> str:
    """One history line for people."""
    mtp = "" if line["mtp"] is None else f" mtp {line['mtp']:.3f}"
    rate = line["tokens"] / max(line["seconds"], 1e-9)
    return (
        f"step {line['step'] + 1} loss {line['loss']:.3f}{mtp} norm {line['norm']:.2f} "
        f"load max/mean {line['balance']:.2f} {rate:,.0f} tokens/s"
    )
