"""What the server adds: eight streams over HTTP beside the engine alone, same requests, in turns.

The server is a process of its own; the client that reads the streams runs here, on the same
cores, and its time counts as the server's.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np

from whalefall.engine import Engine, EngineConfig, SamplingParams
from whalefall.serve.commands import bundled_path
from whalefall.testing.benchmark import Row, save

BATCH, PROMPT = 8, 32


def prompts(seed: int) -> list[list[int]]:
    """Fresh ones each turn: no prefix is known."""
    rng = np.random.default_rng(seed)
    return [rng.integers(5, 2000, PROMPT).tolist() for _ in range(BATCH)]


def alone(engine: Engine, seed: int, tokens: int) -> float:
    """Tokens a second of the engine by itself."""
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    start = time.perf_counter()
    for number, prompt in enumerate(prompts(seed)):
        engine.add(f"{number}", prompt, params)
    while engine.has_work():
        engine.step()
    return BATCH * tokens / (time.perf_counter() - start)


async def streamed(client: httpx.AsyncClient, seed: int, tokens: int) -> float:
    """Tokens a second over HTTP, all answers streamed."""

    async def one(prompt: list[int]) -> int:
        body = {
            "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        text = ""
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if '"usage"' in line:
                    text = line
        found = re.search(r'"completion_tokens":(\d+)', text)
        return int(found[1]) if found else 0

    start = time.perf_counter()
    counts = await asyncio.gather(*(one(prompt) for prompt in prompts(seed)))
    seconds = time.perf_counter() - start
    assert counts == [tokens] * BATCH, counts
    return sum(counts) / seconds


async def measure(model: Path, rounds: int, tokens: int) -> dict[str, list[float]]:
    """Tokens a second of both, in turns."""
    command = [sys.executable, "-m", "whalefall", "serve", "--port", "0", "--model", str(model)]
    found: dict[str, list[float]] = {"server": [], "engine": []}
    with subprocess.Popen([*command, "--no-speculate"], stdout=subprocess.PIPE, text=True) as child:
        try:
            line = child.stdout.readline() if child.stdout else ""
            address = re.search(r"http://[\d.]+:\d+", line)
            assert address, line
            config = EngineConfig(
                speculative=False, kv="bf16", max_sequences=32, max_batch_tokens=512
            )
            engine = Engine(model, config)
            async with httpx.AsyncClient(base_url=address.group(), timeout=600) as client:
                for turn in range(rounds + 1):
                    each = {
                        "server": await streamed(client, 2 * turn, tokens),
                        "engine": alone(engine, 2 * turn + 1, tokens),
                    }
                    for name, value in each.items() if turn else ():
                        found[name].append(value)
        finally:
            child.terminate()
    return found


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(prog="whalefall bench overhead", description=__doc__)
    mid = Path.home() / ".cache/whalefall/bench/mid"
    parser.add_argument("--model", type=Path, default=mid, help=f"a checkpoint ({mid})")
    parser.add_argument("--tokens", type=int, default=96, help="of an answer (96)")
    parser.add_argument("--rounds", type=int, default=7, help="of each contender (7)")
    arguments = parser.parse_args()
    rows = []
    for name, model, tokens in (
        ("mid shape", arguments.model, arguments.tokens),
        ("bundled", bundled_path(), 200),
    ):
        if not (model / "config.json").exists():
            print(f"no checkpoint at {model}: benchmarks/serve.py makes one", file=sys.stderr)
            continue
        speeds = asyncio.run(measure(model, arguments.rounds, tokens))
        ours, theirs = (statistics.median(speeds[key]) for key in ("server", "engine"))
        aim = name == "mid shape"
        rows.append(
            Row(f"{name}, {BATCH} streams through the server", "the engine alone",
                "<= 5 % less" if aim else "", ours, theirs, "tok/s", ours / theirs,
                ours / theirs >= 0.95 if aim else None, extra=speeds)
        )  # fmt: skip
    save("overhead", rows)


if __name__ == "__main__":
    main()
