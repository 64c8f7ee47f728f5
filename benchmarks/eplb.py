"""Expert placement against the original's, side by side.

`whalefall bench eplb --original PATH/eplb.py` times the original itself (one thread, as it runs);
without a path, our numpy version of its algorithm stands in, and the rows say so.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from whalefall import eplb
from whalefall.eplb import arguments, cpu, published
from whalefall.testing.benchmark import Row, interleave, save

LAYERS, EXPERTS = 58, 256
PREFILL, GLOBAL, DECODE = (288, 8, 4, 32), (288, 1, 1, 32), (288, 8, 18, 144)
WIDE = (320, 8, 8, 64)


def loads(kind: str, value: float) -> np.ndarray:
    """[58, 256] loads: Zipf (exponent), in random order; lognormal (sigma); Pareto (alpha)."""
    random = np.random.default_rng(0)
    if kind == "Pareto":
        return random.pareto(value, (LAYERS, EXPERTS)) * 1e3
    if kind == "Zipf":
        ranked = np.tile(1 / np.arange(1, EXPERTS + 1) ** value, (LAYERS, 1))
        return random.permuted(ranked, axis=1) * 1e6
    return random.lognormal(0, value, (LAYERS, EXPERTS)) * 1e3


def original(path: Path | None) -> tuple[str, Callable[..., Any]]:
    """The peer's name and its `rebalance_experts`."""
    if path is None:
        return "its algorithm in numpy", lambda w, *sizes: published.rebalance_experts_hierarchical(
            w, *arguments.check_shape(arguments.check_loads(w), *sizes).published()
        )
    import torch

    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("original_eplb", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return f"EPLB d52c72d, torch {torch.__version__}", lambda w, *sizes: module.rebalance_experts(
        torch.from_numpy(w), *sizes
    )


def measure(peer: str, theirs: Callable[..., Any], rounds: int) -> list[Row]:
    rows = []
    cases = [
        ("prefill, 4 nodes, 32 GPUs", PREFILL, ("Zipf", 0.8)),
        ("prefill, 4 nodes, 32 GPUs", PREFILL, ("lognormal", 0.7)),
        ("prefill, 4 nodes, 32 GPUs", PREFILL, ("Zipf", 1.2)),
        ("prefill, 4 nodes, 32 GPUs", PREFILL, ("Pareto", 1.0)),
        ("prefill, 8 nodes, 64 GPUs", WIDE, ("lognormal", 1.5)),
        ("global, 32 GPUs", GLOBAL, ("Zipf", 0.8)),
        ("decode, 144 GPUs", DECODE, ("Zipf", 1.0)),
        ("decode, 144 GPUs", DECODE, ("Zipf", 0.5)),
        ("decode, 144 GPUs", DECODE, ("lognormal", 1.0)),
    ]
    for name, sizes, (kind, value) in cases:
        weight = loads(kind, value)
        what = f"58 layers, 256 experts, {sizes[0]} slots, {name}, {kind} {value}"
        times = interleave(
            {
                "ours": lambda w=weight, s=sizes: eplb.rebalance_experts(w, *s),
                "theirs": lambda w=weight, s=sizes: theirs(w, *s),
            },
            rounds=rounds,
        )
        ours, peers = times["ours"].median_s * 1e3, times["theirs"].median_s * 1e3
        rows.append(
            Row(f"plan {what}", peer, ">= 20x", ours, peers, "ms", peers / ours, peers / ours >= 20)
        )
        rows.append(quality(f"load over bound, {what}", weight, sizes))
    return rows


def quality(what: str, weight: np.ndarray, sizes: tuple[int, int, int, int]) -> Row:
    """How far above the bound the busiest GPU is, in percent, ours and the published placement."""
    shape = arguments.check_shape(arguments.check_loads(weight), *sizes)
    plan = cpu.plan(arguments.check_loads(weight), shape, judge=True)
    ours, theirs = (plan.load / plan.bound - 1) * 100, (plan.greedy / plan.bound - 1) * 100
    far = theirs > 5
    reached = bool((ours[far] <= 1).mean() >= 0.95) if far.any() else None
    used = plan.bound / plan.load
    note = (
        f"published > 5 % off in {int(far.sum())} of {len(far)} layers, ours there "
        f"{ours[far].max():.2f} % at worst" if far.any() else "published nowhere > 5 % off"
    )  # fmt: skip
    return Row(
        what, "published placement", "<= 1 % where it is > 5 % off", float(ours.mean()),
        float(theirs.mean()), "%", float(np.mean(plan.greedy / plan.load)), reached, note,
        {"share_of_bound": float(used.mean())},
    )  # fmt: skip


def hot_experts() -> Row:
    """The published picture: 100 experts, 20 of which take 80 % of the tokens."""
    weight = np.concatenate([np.full(20, 4.0), np.full(80, 0.25)])[None]
    before = eplb.gpu_loads(weight, np.arange(100)[None], 10)
    after = eplb.rebalance(weight, 120, 1, 1, 10).balance[0] * 100
    used = float(before.mean() / before.max()) * 100
    return Row(
        "utilisation, 100 experts, 20 hot with 80 % of the tokens, 10 GPUs, 20 more slots",
        "experts in order", ">= 20 points more", float(after), used, "%", float(after) / used,
        bool(after >= used + 20),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--original", type=Path, help="the original's eplb.py")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    peer, theirs = original(args.original)
    save("eplb", [*measure(peer, theirs, 3 if args.quick else 7), hot_experts()])


if __name__ == "__main__":
    main()
