"""A small random model, answers of one process, and gateways over units of processes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from whalefall import jit
from whalefall.engine import Engine, EngineConfig, SamplingParams
from whalefall.model.synth import SHAPES, synth
from whalefall.serve.units import Gateway, UnitsConfig, parse_layout

ENGINE: dict[str, Any] = {
    "max_sequences": 4, "max_batch_tokens": 80, "num_blocks": 24, "strict_prefix": True,
}  # fmt: skip
Request = tuple[list[int], SamplingParams]
Answers = dict[tuple[str, int], dict[str, Any]]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    shape = {**SHAPES["tiny"], "n_routed_experts": 12, "n_group": 1, "topk_group": 1}
    return str(synth(tmp_path_factory.mktemp("model"), shape))


@contextlib.contextmanager
def units(model: str, prefill: str, decode: str, **settings: Any) -> Iterator[Gateway]:
    engine = {**ENGINE, **settings.pop("engine", {})}
    config = UnitsConfig(
        parse_layout(prefill, "--prefill"), parse_layout(decode, "--decode"), engine, **settings
    )
    with contextlib.closing(Gateway(model, config)) as gateway:
        yield gateway


def requests(count: int, tokens: int = 12) -> list[Request]:
    """Prompts of many lengths; greedy and drawn, with logprobs, some of several answers."""
    return [
        (
            [(11 * i + 7 * p) % 250 + 5 for p in range(5 + 37 * i % 190)],
            SamplingParams(
                n=1 + (i % 4 == 3), temperature=0.9 * (i % 2), seed=i, max_tokens=tokens,
                logprobs=2, ignore_eos=True, repetition_penalty=1.0 + 0.1 * (i % 3 == 2),
            ),
        )
        for i in range(count)
    ]  # fmt: skip


def collect(
    engine: Any, wanted: list[Request], between: Callable[[int], None] | None = None,
    timeout_s: float = 60.0,
) -> Answers:  # fmt: skip
    """All answers; `between` sees how many tokens there are after each step."""
    found: Answers = {}
    for number, (prompt, params) in enumerate(wanted):
        engine.add(f"r{number}", prompt, params)
    end, count = time.monotonic() + timeout_s, 0
    while engine.has_work():
        assert time.monotonic() < end, f"{count} tokens, then nothing"
        for delta in engine.step():
            answer = found.setdefault(
                (delta.request_id, delta.index), {"tokens": [], "text": "", "logprobs": []}
            )
            answer["tokens"] += delta.token_ids
            answer["text"] += delta.text
            answer["logprobs"] += delta.logprobs or []
            answer["finish"] = delta.finish_reason
            count += len(delta.token_ids)
        if between is not None:
            between(count)
    return found


@pytest.fixture(scope="session")
def alone_on() -> Callable[..., Answers]:
    """What one process answers: (model, requests, settings)."""

    def run(model: str, wanted: list[Request], **settings: Any) -> Answers:
        before = jit.get_num_threads()
        jit.set_num_threads(1)
        try:
            return collect(Engine(Path(model), EngineConfig(**{**ENGINE, **settings})), wanted)
        finally:
            jit.set_num_threads(before)

    return run


@pytest.fixture(scope="session")
def alone(model: str, alone_on: Callable[..., Answers]) -> Callable[..., Answers]:
    """What one process answers on the small random model."""
    return partial(alone_on, model)
