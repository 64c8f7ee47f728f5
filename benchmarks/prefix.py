"""Time to first token of a 4k prompt: its prefix on disk, in memory, or computed again.

One engine on the mid shape, its prefix cache in a folder of a local disk (the page cache is warm,
as after a restart of the server; `--drop` writes the files out and drops them from it first). The
three take turns; what memory knows of the prompt is forgotten before each read from disk.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from whalefall.engine import Engine, EngineConfig, SamplingParams
from whalefall.engine.core import BlockManager
from whalefall.model.synth import synth
from whalefall.testing.benchmark import Row, save

PARAMS = SamplingParams(max_tokens=1, temperature=0)


def first_token_s(engine: Engine, prompt: list[int]) -> tuple[float, int]:
    """Seconds from `add` to the first token, and the tokens that were cached."""
    start = time.perf_counter()
    engine.add("one", prompt, PARAMS)
    cached = 0
    while engine.has_work():
        for delta in engine.step():
            cached = delta.num_cached_tokens
    return time.perf_counter() - start, cached


def forget(engine: Engine) -> None:
    """Empty the prefix cache in memory."""
    engine._blocks = engine._scheduler.blocks = BlockManager(engine._blocks.num_blocks)


def drop(folder: Path) -> None:
    """Take the cache's files out of the page cache."""
    for path in folder.rglob("*.kv"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(
    model: Path, folder: Path, tokens: int, rounds: int, cold: bool
) -> dict[str, list[float]]:
    """Seconds to the first token, by where the prefix is."""
    config = EngineConfig(
        prefix_cache=str(folder), num_blocks=2 * tokens // 64 + 8, speculative=False
    )
    engine = Engine(model, config)
    assert engine._disk is not None
    rng = np.random.default_rng(0)
    prompts = [rng.integers(300, engine.model.vocab_size, tokens).tolist() for _ in range(3)]
    found: dict[str, list[float]] = {"computed": [], "memory": [], "disk": []}
    first_token_s(engine, prompts[0][-1:-200:-1])  # memory is taken, kernels are loaded
    for prompt in prompts:
        seconds, cached = first_token_s(engine, prompt)
        assert not cached
        found["computed"].append(seconds)
        engine._disk.flush()
    whole = (tokens - 1) // 64 * 64
    for turn in range(rounds + 1):
        forget(engine)
        if cold:
            drop(folder)
        for name in ("disk", "memory"):
            seconds, cached = first_token_s(engine, prompts[0])
            assert cached == whole, (name, cached)
            if turn:
                found[name].append(seconds)
    return found


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(prog="whalefall bench prefix", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "whalefall" / "bench")
    parser.add_argument("--model", type=Path, help="a checkpoint (default: the mid shape)")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--drop", action="store_true")
    arguments = parser.parse_args()
    model = arguments.model or arguments.work / "mid"
    if not (model / "config.json").exists():
        synth(model, "mid", fp8_head=True)
    with tempfile.TemporaryDirectory(dir=arguments.work.parent) as folder:
        found = measure(model, Path(folder), arguments.tokens, arguments.rounds, arguments.drop)
    median = {name: statistics.median(values) for name, values in found.items()}
    print({name: [round(v, 4) for v in values] for name, values in found.items()})
    what = f"mid shape, time to first token, {arguments.tokens} tokens, prefix on disk"
    again, memory = median["computed"] / median["disk"], median["disk"] / median["memory"]
    save(
        "prefix",
        [
            Row(what, "computing it again", ">= 20x", median["disk"], median["computed"], "s",
                again, again >= 20),
            Row(what, "prefix in memory", "<= 1.1x the time", median["disk"], median["memory"],
                "s", 1 / memory, memory <= 1.1),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
