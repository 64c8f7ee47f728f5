"""Day 2, DeepEP: four ranks send tokens to their experts and add up what comes back.

Run it: python examples/02_deep_ep.py. Each rank is a process; 8 experts, two a rank.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

from whalefall import ep, launch

RANKS, EXPERTS, TOKENS, HIDDEN, TOP_K = 4, 8, 64, 256, 2


def rank_main(folder: str, rank: int) -> str:
    """One rank: gate, dispatch, experts, combine; and the same without any ranks."""
    random = np.random.default_rng(rank)
    x = random.standard_normal((TOKENS, HIDDEN)).astype(np.float32)
    logits = random.standard_normal((TOKENS, EXPERTS)).astype(np.float32)
    topk_idx, weights = ep.route(logits, None, TOP_K, num_groups=4, topk_groups=2)

    with ep.Engine(ep.FileGroup(folder, rank, RANKS)) as engine:
        received = engine.dispatch_selections(x, topk_idx, EXPERTS)
        out = np.empty_like(received.x)
        at = 0
        for local, rows in enumerate(received.per_expert):  # rows lie grouped by expert
            expert = rank * (EXPERTS // RANKS) + local
            out[at : at + rows] = received.x[at : at + rows] * np.float32(expert + 1)
            at += rows
        got = engine.combine_selections(out, received.handle, weights)

    alone = np.zeros_like(x)
    for k in range(TOP_K):
        alone += weights[:, k : k + 1] * (x * (topk_idx[:, k : k + 1] + 1).astype(np.float32))
    same = "the bits of one process" if np.array_equal(got, alone) else "DIFFERENT"
    return f"rank {rank}: received {len(received.x)} rows, {same}"


def main() -> None:
    here = Path(__file__)
    with tempfile.TemporaryDirectory() as folder:
        tasks = [
            launch.Task(f"rank {r}", f"{here.stem}:rank_main", path=(str(here.parent),),
                        kwargs={"folder": folder, "rank": r})
            for r in range(RANKS)
        ]  # fmt: skip
        print("\n".join(launch.run(tasks, timeout_s=60)))


if __name__ == "__main__":
    sys.exit(main())
