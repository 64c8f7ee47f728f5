"""Dispatch and combine against gloo's all-to-all of the same bytes and against a plain copy.

`whalefall bench ep [--quick]`. Ranks are processes; all contenders run in turns in the same ones.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from whalefall import launch
from whalefall.testing.benchmark import Row, save

HERE = str(Path(__file__).resolve().parent)
HIDDEN = 7168
PUBLISHED_GBS = 153  # DeepEP, EP8 on H800, dispatch over NVLink (its README)


def ranks(function: str, size: int, **kwargs: Any) -> list[Any]:
    """Run a function of _ep_rank.py as `size` processes; their results."""
    with tempfile.TemporaryDirectory() as folder:
        tasks = [
            launch.Task(
                f"rank {r}", f"_ep_rank:{function}", path=(HERE,), env={"OMP_NUM_THREADS": "1"},
                kwargs={"folder": folder, "rank": r, "size": size, **kwargs},
            )
            for r in range(size)
        ]  # fmt: skip
        return launch.run(tasks, timeout_s=140)


def median_of_slowest(said: list[Any], name: str) -> float:
    """A collective takes as long as its slowest rank; the median over the rounds."""
    by_round = zip(*(one["seconds"][name] for one in said), strict=True)
    return statistics.median(max(times) for times in by_round)


def against_gloo(size: int, tokens: int, rounds: int, name: str) -> list[Row]:
    """Speed beside gloo, and as a share of a plain copy in the same processes."""
    said = ranks("compare", size, tokens=tokens, rounds=rounds)
    times = {n: median_of_slowest(said, n) for n in said[0]["seconds"]}
    theirs = times["gloo dispatch"] + times["gloo combine"]
    moved = 2 * statistics.mean(one["bytes"] for one in said)
    what = f"{name}: {tokens} tokens × {HIDDEN}, top-8, {size} ranks"
    gloo = f"gloo all_to_all_single, torch {said[0]['torch']}"

    def row(where: str, combine: str) -> Row:
        ours = times["dispatch"] + times[combine]
        return Row(f"{what}, dispatch + combine{where}", gloo, ">= 5x", ours * 1e3, theirs * 1e3,
                   "ms", theirs / ours, theirs / ours >= 5)  # fmt: skip

    rows = [row(" of recv_x", "combine"), row(" of results elsewhere", "combine, own memory")]
    ours = times["dispatch"] + times["combine"]
    if name == "prefill":
        copy = 64 * 2**20 / times["copy"]
        share = moved / ours / copy
        rows.append(
            Row(f"{what}, received bytes a second and rank", "plain copy, all ranks at once",
                ">= 0.6x", moved / ours / 1e9, copy / 1e9, "GB/s", share, share >= 0.6,
                note=f"published, EP8 on H800: {PUBLISHED_GBS} GB/s")
        )  # fmt: skip
    return rows


def bytes_between_hosts(tokens: int) -> list[Row]:
    """Counted at the sockets, 8 ranks on two hosts, groups of experts limited to 4 of 8."""
    said = ranks("wire_bytes", 8, tokens=tokens, hosts=["a"] * 4 + ["b"] * 4)
    total = {name: sum(one[name] for one in said) for name in said[0]}
    naive = total["naive rows"] * HIDDEN * 2
    two_hop = total["dispatch"] / naive
    fp8 = total["fp8 dispatch"] / total["dispatch"]
    return [
        Row(f"two-hop dispatch, bytes between 2 hosts, {tokens} tokens, top-8 in 4 groups",
            "a row for each (token, remote rank)", "<= 0.6x", total["dispatch"] / 1e6, naive / 1e6,
            "MB", naive / total["dispatch"], two_hop <= 0.6),
        Row("FP8 dispatch, bytes between 2 hosts", "BF16 dispatch", "<= 0.55x",
            total["fp8 dispatch"] / 1e6, total["dispatch"] / 1e6, "MB", 1 / fp8, fp8 <= 0.55),
    ]  # fmt: skip


def hidden_communication(size: int, rounds: int) -> Row:
    """Share of a dispatch's time that passes behind as much compute."""
    said = ranks("overlap", size, tokens=4096, rounds=rounds)
    hidden = statistics.mean(
        (2 * one["communication"] - one["both"]) / one["communication"] for one in said
    )
    cores = len(os.sched_getaffinity(0))
    traced = statistics.mean(one["overlap"] for one in said)
    return Row(
        f"dispatch behind equal compute, {size} ranks on {cores} cores", "all of it", ">= 0.8",
        hidden, 1.0, "share hidden", hidden, hidden >= 0.8 if cores >= 2 * size else None,
        note=f"share of communication under compute in the trace: {traced:.2f}",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="whalefall bench ep")
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds")
    quick = parser.parse_args().quick
    rounds, prefill = (3, 512) if quick else (7, 4096)
    rows: list[Row] = []
    for size in (2,) if quick else (2, 4, 8):
        rows += against_gloo(size, 128, 3 * rounds, "decode")  # short, so that it takes many
    for size in (2,) if quick else (2, 4):
        rows += against_gloo(size, prefill, rounds, "prefill")
    rows += bytes_between_hosts(128)
    for size in (1,) if quick else (1, 2):
        rows.append(hidden_communication(size, rounds))
    save("ep", rows)


if __name__ == "__main__":
    main()
