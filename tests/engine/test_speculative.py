"""Drafting changes no bit of an answer, whatever is drafted and however much of it is right."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.model.forms import FORMS
from whalefall.engine import LLM, Engine, EngineConfig, SamplingParams
from whalefall.engine import engine as engine_module
from whalefall.engine.answer import Answer
from whalefall.engine.core import Scheduled, Sequence
from whalefall.errors import ConfigError
from whalefall.model.synth import synth
from whalefall.serve.commands import bundled_path

PROSE = (
    "The file is read from the standard input if no file name is given on the command line. "
    "If the option is given, the program writes the names of all the files that it has read to "
    "the standard error, one on each line, and exits with a status that says whether any of them "
    "could not be read. The following options are understood, and may be given in any order:\n"
)
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0, "logprobs": 3},
    "drawn": {"temperature": 0.7, "top_p": 0.95, "seed": 5, "logprobs": 2},
    "penalised": {"temperature": 0, "frequency_penalty": 0.7, "repetition_penalty": 1.2},
    "penalised, drawn": {"temperature": 0.8, "seed": 9, "presence_penalty": 0.5},
    "stopped": {"temperature": 0, "stop": [" the", "option"], "min_tokens": 6},
    "several": {"temperature": 0.6, "seed": 2, "n": 3, "max_tokens": 20},
}

Answers = dict[str, list[Any]]


def run(engine: Engine, requests: dict[str, tuple[list[int], SamplingParams]]) -> Answers:
    """Tokens, texts, logprobs and ends by request and answer."""
    found: Answers = {
        name: [[[], "", [], None, None] for _ in range(params.n)]
        for name, (_, params) in requests.items()
    }
    for name, (tokens, params) in requests.items():
        engine.add(name, tokens, params)
    while engine.has_work():
        for delta in engine.step():
            answer = found[delta.request_id][delta.index]
            answer[0] += delta.token_ids
            answer[1] += delta.text
            answer[2] += [(each.logprob, each.rank, each.top) for each in delta.logprobs or ()]
            answer[3:] = [delta.finish_reason, delta.stop_reason]
    return found


def always(engine: Engine, count: int) -> Engine:
    """The engine with the rule that switches drafts off taken out."""
    engine._policy.num_drafts = lambda batch: count  # type: ignore[method-assign]
    return engine


@pytest.fixture(scope="module")
def requests() -> dict[str, tuple[list[int], SamplingParams]]:
    tokens = LLM(bundled_path(), num_blocks=4).tokenizer.encode(PROSE)  # type: ignore[union-attr]
    return {
        kind: ((tokens + tokens)[i : 110 + i], SamplingParams(**{"max_tokens": 40, **fields}))
        for i, (kind, fields) in enumerate(KINDS.items())
    }


@pytest.fixture(scope="module")
def plain(requests: dict[str, tuple[list[int], SamplingParams]]) -> Answers:
    return run(Engine(bundled_path(), EngineConfig(speculative=False, num_blocks=64)), requests)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_request_alone(
    kind: str, requests: dict[str, tuple[list[int], SamplingParams]], plain: Answers
) -> None:
    config = EngineConfig(speculative=True, draft_tokens=2, num_blocks=64)
    engine = always(Engine(bundled_path(), config), 2)
    assert run(engine, {kind: requests[kind]})[kind] == plain[kind]
    stats = engine.stats()
    assert 0 < stats.spec_accepted < stats.spec_drafted


@pytest.mark.parametrize("drafts", [1, 3])
def test_all_kinds_together_in_chunks_with_hits_and_preemption(
    drafts: int, requests: dict[str, tuple[list[int], SamplingParams]], plain: Answers
) -> None:
    for fields in ({}, {"max_batch_tokens": 7}, {"num_blocks": 6}, {"max_sequences": 2}):
        config = EngineConfig(
            **{"speculative": True, "draft_tokens": drafts, "num_blocks": 64, **fields}  # type: ignore[arg-type]
        )
        engine = always(Engine(bundled_path(), config), drafts)
        assert run(engine, requests) == plain
        assert run(engine, requests) == plain  # now with what the prefix cache has
        assert engine.stats().spec_accepted > 0
        if fields.get("num_blocks") == 6:
            assert engine.stats().preemptions > 0
        assert engine.stats().kv_used == 0


def oracle(answer: list[int], num_prompt: int, seed: int) -> Callable[..., dict[str, list[int]]]:
    """A drafter that knows the answer, and is wrong at random places."""
    rng = np.random.default_rng(seed)

    def draft(items: Items[Scheduled], _: object) -> dict[str, list[int]]:
        found = {}
        for item in items:
            start = len(item.seq.tokens) - num_prompt
            right = answer[start : start + item.num_drafts]
            found[item.seq.seq_id] = [t ^ int(rng.random() < 0.3) for t in right]
        return found

    return draft


@pytest.mark.parametrize("compute", ["w8a16", "w8a8", "fp32"])
def test_any_pattern_of_right_and_wrong_drafts(compute: str, tmp_path: Path) -> None:
    folder = synth(tmp_path, FORMS["v3"], seed=7)
    prompt = np.random.default_rng(1).integers(0, 384, 50).tolist()
    params = SamplingParams(temperature=0.9, seed=5, max_tokens=60, logprobs=1, ignore_eos=True)
    wanted = run(
        Engine(folder, EngineConfig(compute=compute, speculative=False, num_blocks=8)),
        {"a": (prompt, params)},
    )
    for seed, drafts in enumerate((1, 2, 5, 16)):
        config = EngineConfig(compute=compute, speculative=True, draft_tokens=drafts, num_blocks=8)
        engine = always(Engine(folder, config), drafts)
        assert engine.runner.drafter is not None
        engine.runner.drafter.draft = oracle(wanted["a"][0][0], len(prompt), seed)  # type: ignore[method-assign]
        assert run(engine, {"a": (prompt, params)}) == wanted
        stats = engine.stats()
        assert 20 <= stats.spec_accepted < stats.spec_drafted


def test_blocks_filled_by_drafts_are_found_by_a_longer_prompt() -> None:
    config = EngineConfig(speculative=True, num_blocks=16)
    engine = always(Engine(bundled_path(), config), 1)
    params = SamplingParams(temperature=0, max_tokens=70, ignore_eos=True)
    answer = run(engine, {"a": ([5, 9, 200], params)})["a"][0][0]
    run(engine, {"b": ([5, 9, 200, *answer], params)})
    assert engine.stats().prefix_hits == 64


def test_drafts_are_as_good_after_a_preemption_and_a_hit() -> None:
    """The MTP layer's own latents are swapped, and shared, along with the model's."""

    def accepted(num_blocks: int, max_sequences: int) -> tuple[float, Engine]:
        config = EngineConfig(speculative=True, num_blocks=num_blocks, max_sequences=max_sequences)
        engine = always(Engine(bundled_path(), config), 1)
        tokenizer = engine.tokenizer
        assert tokenizer is not None
        params = SamplingParams(temperature=0, max_tokens=70)
        prompts = {f"{i}": (tokenizer.encode(PROSE[7 * i :]), params) for i in range(6)}
        run(engine, prompts)
        run(engine, prompts)
        return engine.stats().spec_accepted / engine.stats().spec_drafted, engine

    calm, engine = accepted(64, 1)
    hits = engine.stats().prefix_hits
    busy, engine = accepted(8, 6)
    assert engine.stats().preemptions > 0
    assert hits > 0
    assert busy > calm - 0.05 > 0.3


def test_a_checkpoint_without_the_layer_is_refused_or_runs_plainly(tmp_path: Path) -> None:
    folder = synth(tmp_path, FORMS["kimi-k2"], seed=7)
    with pytest.raises(ConfigError, match="no MTP layer"):
        Engine(folder, EngineConfig(speculative=True, num_blocks=4))
    assert Engine(folder, EngineConfig(num_blocks=4)).runner.drafter is None


def test_by_default_small_checkpoints_do_not_draft_and_large_ones_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert Engine(bundled_path(), EngineConfig(num_blocks=4)).runner.drafter is None
    monkeypatch.setattr(engine_module, "_CACHED_BYTES", 1 << 20)
    assert Engine(bundled_path(), EngineConfig(num_blocks=4)).runner.drafter is not None
    config = EngineConfig(num_blocks=4, speculative=False)
    assert Engine(bundled_path(), config).runner.drafter is None


def test_draft_tokens_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="draft_tokens is 17, wanted a whole number from 1 to 16"):
        EngineConfig(draft_tokens=17)


def test_the_rule_knows_what_the_checkpoint_reads(tmp_path: Path) -> None:
    shape = {**FORMS["v3"], "n_routed_experts": 64, "n_group": 1, "topk_group": 1}
    engine = Engine(synth(tmp_path, shape), EngineConfig(speculative=True, num_blocks=4))
    engine.add("a", [1, 2, 3], SamplingParams(max_tokens=2, ignore_eos=True))
    engine.step()
    costs = engine._policy.costs
    c = engine.model
    assert costs.expert == 3 * c.hidden_size * c.moe_intermediate_size  # a byte a weight
    assert costs.top_k == 3
    assert costs.draft > 2 * c.hidden_size * c.vocab_size  # the head is BF16
    # a second token reads up to three more experts in each of two layers
    more = engine._policy._speed(1, 1)
    drafts = costs.draft + 3 * costs.expert
    expected = 2 * (3 + 3 * (1 - 3 / 64)) * costs.expert
    assert 1 / more == pytest.approx(
        (costs.step + expected + drafts) / (costs.step + 6 * costs.expert), rel=1e-6
    )


def test_a_draft_is_sampled_as_if_those_before_it_were_there() -> None:
    params = SamplingParams(
        temperature=0.8, seed=3, frequency_penalty=1.0, min_tokens=3, max_tokens=9, logprobs=1
    )
    seq = Sequence("s", [4, 5], 2)
    answer = Answer("r", 0, seq, params, 3, None, (1,), 99)
    logits = np.zeros(32, np.float32)
    ahead = answer.sample_row(logits, [7, 7, 9])
    assert answer.sample_row(logits, [7]).banned == (1,)
    for token in (7, 7, 9):
        answer.push(token)
    there = answer.sample_row(logits)
    assert ahead.seen == there.seen == {4: 0, 5: 0, 7: 2, 9: 1}
    assert (ahead.uniform, ahead.banned) == (there.uniform, there.banned)
    assert there.banned == ()
    assert (ahead.num_logprobs, there.num_logprobs) == (None, 1)
