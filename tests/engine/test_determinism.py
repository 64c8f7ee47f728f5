"""A request's tokens and logprobs are the same bits whatever else happens in the engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.model.forms import FORMS
from whalefall import jit
from whalefall.engine import LLM, Engine, EngineConfig, SamplingParams
from whalefall.model.synth import synth

VOCAB = 384
GREEDY = SamplingParams(temperature=0, max_tokens=12, logprobs=3, ignore_eos=True)
DRAWN = SamplingParams(
    temperature=0.9, top_p=0.95, seed=5, max_tokens=12, logprobs=3, ignore_eos=True
)

Answer = tuple[list[int], list[tuple[float, tuple[tuple[int, float], ...]]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth(tmp_path_factory.mktemp("model"), FORMS["v3"], seed=7)


def prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


def run(engine: Engine, requests: dict[str, tuple[list[int], SamplingParams]]) -> dict[str, Answer]:
    found: dict[str, Answer] = {name: ([], []) for name in requests}
    for name, (tokens, params) in requests.items():
        engine.add(name, tokens, params)
    while engine.has_work():
        for delta in engine.step():
            found[delta.request_id][0].extend(delta.token_ids)
            for each in delta.logprobs or ():
                found[delta.request_id][1].append((each.logprob, each.top))
    return found


@pytest.mark.parametrize("compute", ["w8a16", "w8a8", "fp32"])
@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_same_bits_alone_and_in_any_company(
    folder: Path, compute: str, params: SamplingParams
) -> None:
    mine = prompt(1, 200)
    alone = run(
        Engine(folder, EngineConfig(compute=compute, num_blocks=32)), {"me": (mine, params)}
    )
    others = {f"other{i}": (prompt(10 + i, 9 + 23 * i), DRAWN) for i in range(7)}

    def same(config: EngineConfig, requests: dict[str, tuple[list[int], SamplingParams]]) -> Engine:
        engine = Engine(folder, config)
        assert run(engine, requests)["me"] == alone["me"]
        return engine

    crowd = {**others, "me": (mine, params)}
    same(EngineConfig(compute=compute, num_blocks=64), crowd)
    for budget in (7, 64, 130):
        same(EngineConfig(compute=compute, num_blocks=64, max_batch_tokens=budget), crowd)
    # few blocks: somebody is swapped out and in again
    engine = same(EngineConfig(compute=compute, num_blocks=9, max_batch_tokens=64), crowd)
    assert engine.stats().preemptions > 0
    # a prefix hit, full and partial
    engine = Engine(folder, EngineConfig(compute=compute, num_blocks=32))
    run(engine, {"first": (mine[:150] + prompt(2, 30), GREEDY)})
    for cached in (128, 192):
        assert run(engine, {"me": (mine, params)})["me"] == alone["me"]
        assert engine.stats().prefix_hits == cached + (128 if cached == 192 else 0)


def test_same_bits_on_one_and_two_threads(folder: Path) -> None:
    found = []
    for threads in (1, 2):
        jit.set_num_threads(threads)
        found.append(
            run(Engine(folder, EngineConfig(num_blocks=32)), {"me": (prompt(1, 90), DRAWN)})
        )
    jit.set_num_threads(1)
    assert found[0] == found[1]


def test_logits_do_not_depend_on_chunks(folder: Path) -> None:
    llm, tokens = LLM(folder), prompt(3, 150)
    whole = llm.logits(tokens)
    for chunk in (1, 37, 64):
        assert (llm.logits(tokens, chunk) == whole).all()
