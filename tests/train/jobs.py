"""Small recipes and data for the tests, and what ranks do with them (`tests.pipeline.ranks`)."""

from __future__ import annotations

import functools
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.pipeline import ranks
from whalefall.pipeline.torch import WeightGradStore
from whalefall.train import Rank, Recipe, read_recipe, train, write_rows, write_stream

ranks.CONTEXT.set_forkserver_preload(
    ["torch", "torch._dynamo", "torch.distributed.checkpoint", "pygal", "whalefall.train"]
)

MODEL = """
[model]
vocab_size = 96
hidden_size = 32
num_hidden_layers = 4
first_k_dense_replace = 1
intermediate_size = 48
moe_intermediate_size = 16
n_routed_experts = 8
num_experts_per_tok = 2
n_shared_experts = 1
num_attention_heads = 2
num_key_value_heads = 2
q_lora_rank = 24
kv_lora_rank = 16
qk_nope_head_dim = 8
qk_rope_head_dim = 8
v_head_dim = 12
num_nextn_predict_layers = 1
routed_scaling_factor = 2.5
n_group = 4
topk_group = 2
norm_topk_prob = true
rms_norm_eps = 1e-6
max_position_embeddings = 64
"""
REST = """
[run]
folder = "run"
steps = 8
precision = "fp32"
threads = 1
[data]
length = 16
[[data.source]]
files = "stream.ffr"
rows = 4
[[data.source]]
files = "packed-*.ffr"
rows = 4
[optimizer]
rate = 3e-3
warmup = 4
[loss]
sequence = 1e-2
[checkpoint]
every = 3
"""


def folder_with_recipe(folder: Path, text: str = MODEL + REST) -> Path:
    """Data and a recipe in a folder; gives the recipe's path."""
    random = np.random.default_rng(0)
    follows = random.integers(0, 96, (96, 3))  # a chain that can be learnt
    stream = [0]
    for choice in random.integers(0, 3, 3200):
        stream.append(int(follows[stream[-1], choice]))
    write_stream(folder / "stream.ffr", stream, 16)
    document = np.repeat([0, 1, -1], [7, 6, 3])
    learnt = np.repeat([0, 1, 0, 1, 0], [2, 5, 1, 5, 3])
    for part in range(2):
        rows = [np.stack([stream[at : at + 16], document, learnt]) for at in range(part, 900, 16)]
        write_rows(folder / f"packed-{part}.ffr", rows)
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


def layout(pipeline: int = 1, expert: int = 1, data: int = 1, schedule: str = "1f1b",
           chunks: int = 1) -> dict[str, Any]:  # fmt: skip
    """Changes of a recipe."""
    return {
        "parallel.pipeline": pipeline, "parallel.expert": expert, "parallel.data": data,
        "parallel.schedule": schedule, "parallel.chunks": chunks,
    }  # fmt: skip


def reports(rank: int, size: int, path: str, changes: dict[str, Any], steps: int) -> list[Any]:
    """The reports of some steps."""
    made = Rank(read_recipe(path, changes))
    return [asdict(made.train_step()) for _ in range(steps)]


def gradients(
    rank: int, size: int, path: str, changes: dict[str, Any], drop_flush: int | None = None
) -> dict[str, torch.Tensor]:
    """All gradients of the first step that this rank holds, summed over the ranks."""
    made = Rank(read_recipe(path, changes))
    if drop_flush is not None:
        _drop(drop_flush)
    made.optimizer.step = lambda *arguments: None  # type: ignore[method-assign]
    made.train_step()
    found = {}
    for named in made.named():
        found[named.name] = named.of(named.parameter.grad).clone().numpy()
    return found


def all_gradients(
    rank: int, size: int, path: str, layouts: dict[str, dict[str, Any]]
) -> dict[str, dict[str, torch.Tensor]]:
    """`gradients` of several layouts for as many ranks."""
    return {name: gradients(rank, size, path, changes) for name, changes in layouts.items()}


def all_reports(
    rank: int, size: int, path: str, layouts: dict[str, dict[str, Any]], steps: int
) -> dict[str, list[Any]]:
    """`reports` of several layouts for as many ranks."""
    return {name: reports(rank, size, path, changes, steps) for name, changes in layouts.items()}


def _drop(number: int) -> None:
    """Let one flush of weight gradients queue nothing."""
    original, count = WeightGradStore.flush, [0]

    def flush() -> None:
        if count[0] == number:
            WeightGradStore.cache = []
        count[0] += 1
        original()

    WeightGradStore.flush = flush  # type: ignore[method-assign]


def run_to_end(rank: int, size: int, path: str, changes: dict[str, Any], resume: bool) -> int:
    """A whole run."""
    return train(read_recipe(path, changes), resume)


def poisoned(rank: int, size: int, path: str, changes: dict[str, Any], victim: int) -> str:
    """A run in which a weight of rank `victim` turns NaN before step 4; gives the refusal."""
    original = Rank.train_step

    def step(self: Rank) -> Any:
        if self.step == 4 and rank == victim:
            with torch.no_grad():
                self.stages[-1].layers[-1].self_attn.o_proj[0, 0] = float("nan")
            self.precision.forget()
        return original(self)

    Rank.train_step = functools.wraps(original)(step)  # type: ignore[method-assign]
    try:
        train(read_recipe(path, changes))
    except ArithmeticError as error:
        return str(error)
    return "nothing was raised"


def on_ranks(function: Any, path: Path, changes: dict[str, Any], *more: Any) -> list[Any]:
    """`function` on as many ranks as the recipe has."""
    recipe: Recipe = read_recipe(path, changes)
    return ranks.run(function, recipe.parallel.ranks, str(path), changes, *more)
