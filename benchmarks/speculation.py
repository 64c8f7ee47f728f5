"""Speculative decoding: what is accepted, what it costs, and what it brings.

The bundled checkpoint: share of drafts accepted on answers and on prose (pages that training never
saw, where `--prose FILE`, a JSON list of texts, is given), and tokens/s with and without. The mid
shape with an MTP layer (`--mid`): the time of a step with drafts over that of a plain one, from
which follows the acceptance above which drafts pay; its random weights accept nothing themselves.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np

from whalefall.engine import LLM, SamplingParams
from whalefall.model.synth import SHAPES, synth
from whalefall.serve.commands import bundled_path
from whalefall.testing.benchmark import Row, save

NAMES = Path(__file__).parents[1] / "recipes" / "bundled" / "names.jsonl"


def make(model: Path, drafts: int) -> LLM:
    """An engine that always drafts so many tokens; 0: that never does."""
    llm = LLM(model, speculative=drafts > 0, draft_tokens=max(1, drafts), kv_cache_bytes=256 << 20)
    llm.engine._policy.num_drafts = lambda batch: drafts * (batch > 0)  # type: ignore[method-assign]
    return llm


def accepted(prompts: list[list[int]], params: SamplingParams) -> float:
    """Share of single drafts accepted."""
    llm = make(bundled_path(), 1)
    llm.generate(prompts, params)
    stats = llm.engine.stats()
    return stats.spec_accepted / stats.spec_drafted


def questions(llm: LLM, count: int) -> list[list[int]]:
    """The main question about evenly chosen commands."""
    assert llm.tokenizer is not None
    lines = NAMES.read_text(encoding="utf-8").splitlines()
    commands = [json.loads(line)["command"] for line in lines[:: max(1, len(lines) // count)]]
    return [
        llm.tokenizer.apply_chat_template([{"role": "user", "content": f"What does {c} do?"}])
        for c in commands[:count]
    ]


def acceptance_rows(prose: Path | None) -> list[Row]:
    """What is accepted."""
    llm = make(bundled_path(), 0)
    assert llm.tokenizer is not None
    cases: dict[str, tuple[list[list[int]], SamplingParams]] = {}
    cases["answers, temperature 0"] = (
        questions(llm, 120), SamplingParams(temperature=0, max_tokens=48),
    )  # fmt: skip
    if prose is not None:
        texts = json.loads(prose.read_text(encoding="utf-8"))
        prompts = [llm.tokenizer.encode(text[2000:2600])[:64] for text in texts]
        for temperature in (0.0, 0.7):
            cases[f"held-out prose, temperature {temperature:g}"] = (
                prompts, SamplingParams(temperature=temperature, seed=1, max_tokens=100),
            )  # fmt: skip
    rows = []
    for name, (prompts, params) in cases.items():
        share = 100 * accepted(prompts, params)
        aim = "" if "0.7" in name else "> 50 %"
        rows.append(
            Row(f"bundled, drafts accepted: {name}", "all drafts", aim, share, 100.0, "%",
                share / 100, share > 50 if aim else None)
        )  # fmt: skip
    return rows


def bundled_rows(rounds: int) -> list[Row]:
    """Tokens/s with one draft and without, in turns."""
    engines = {"plain": make(bundled_path(), 0), "drafts": make(bundled_path(), 1)}
    rows = []
    for batch in (1, 8):
        prompts = questions(engines["plain"], batch)
        params = SamplingParams(temperature=0, max_tokens=120, ignore_eos=True)
        speeds: dict[str, list[float]] = {name: [] for name in engines}
        for turn in range(rounds + 1):
            for name, llm in engines.items():
                start = time.perf_counter()
                llm.generate(prompts, params)
                if turn:
                    speeds[name].append(batch * 120 / (time.perf_counter() - start))
        ours, theirs = (statistics.median(speeds[name]) for name in ("drafts", "plain"))
        rows.append(
            Row(f"bundled, 1 draft, {batch} sequences", "no drafts", "", ours, theirs, "tok/s",
                ours / theirs, None, extra=speeds)
        )  # fmt: skip
    return rows


def step_ms(llm: LLM, batch: int, steps: int = 6) -> float:
    """Milliseconds of a step in which `batch` sequences generate."""
    rng = np.random.default_rng(0)
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    for number in range(batch):
        llm.engine.add(f"{number}", rng.integers(5, 30000, 8).tolist(), params)
    for _ in range(2):
        llm.engine.step()
    start = time.perf_counter()
    for _ in range(steps):
        llm.engine.step()
    seconds = (time.perf_counter() - start) / steps
    for number in range(batch):
        llm.engine.cancel(f"{number}")
    while llm.engine.has_work():
        llm.engine.step()
    return 1000 * seconds


def mid_rows(model: Path, rounds: int) -> list[Row]:
    """A step with one draft over a plain one, on the mid shape."""
    if not (model / "config.json").exists():
        synth(model, {**SHAPES["mid"], "num_nextn_predict_layers": 1}, fp8_head=True)
    engines = {"plain": make(model, 0), "drafts": make(model, 1)}
    rows = []
    for batch in (1, 8):
        times: dict[str, list[float]] = {name: [] for name in engines}
        for turn in range(rounds + 1):
            for name, llm in engines.items():
                value = step_ms(llm, batch)
                if turn:
                    times[name].append(value)
        ours, theirs = (statistics.median(times[name]) for name in ("drafts", "plain"))
        rows.append(
            Row(f"mid shape, step with 1 draft, {batch} sequences", "plain step", "", ours, theirs,
                "ms", theirs / ours, None, extra=times,
                note=f"pays above {100 * (ours / theirs - 1):.0f} % accepted")
        )  # fmt: skip
    return rows


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(prog="whalefall bench speculation", description=__doc__)
    parser.add_argument("--prose", type=Path)
    parser.add_argument("--mid", type=Path, help="the mid shape with an MTP layer; made if missing")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    rows = acceptance_rows(arguments.prose) + bundled_rows(arguments.rounds)
    if arguments.mid is not None:
        rows += mid_rows(arguments.mid, arguments.rounds)
    save("speculation", rows)


if __name__ == "__main__":
    main()
