"""Prompts computed by one engine and gone on with by another."""

from __future__ import annotations

from pathlib import Path

import pytest

import whalefall
from whalefall.engine import Engine, EngineConfig, SamplingParams
from whalefall.engine.core import DraftPolicy
from whalefall.engine.unit_engine import UnitEngine

BUNDLED = Path(whalefall.__file__).parent / "model" / "bundled"
CONFIG = EngineConfig(
    max_sequences=4, max_batch_tokens=80, num_blocks=24, speculative=True, draft_tokens=2,
    max_model_len=1024,
)  # fmt: skip
GREEDY = SamplingParams(temperature=0.0, max_tokens=40)


def test_a_handed_over_prompt_is_drafted_for_as_where_it_was_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As many drafts are right: the MTP layer's rows came along."""
    monkeypatch.setattr(DraftPolicy, "num_drafts", lambda policy, batch: 2 if batch else 0)
    alone, decode = Engine(BUNDLED, CONFIG), UnitEngine(BUNDLED, CONFIG)
    prefill = UnitEngine(BUNDLED, CONFIG, hand_over=True)
    assert alone.tokenizer is not None
    for name in ("tar", "ls", "grep", "chmod", "ps", "mount"):
        chat = [{"role": "user", "content": f"What does {name} do?"}]
        prompt = alone.tokenizer.apply_chat_template(chat)
        alone.add(name, prompt, GREEDY)
        whole = tokens_of(alone.step() for _ in iter(alone.has_work, False))
        prefill.start(name, prompt, GREEDY, seed=0)
        computed = [prefill.round(0) for _ in iter(prefill.has_work, False)]
        [(_, pages)] = [handed for one in computed for handed in one.handed]
        first = tokens_of(one.deltas for one in computed)
        decode.resume(name, prompt, first, pages, GREEDY, seed=0)
        rest = tokens_of(decode.round(0).deltas for _ in iter(decode.has_work, False))
        assert first + rest == whole
    found, wanted = decode.stats(), alone.stats()
    # The first step after a hand-over drafts nothing; then 40 of 48 are right, alone 44 of 50.
    assert found.spec_drafted >= wanted.spec_drafted - 12
    share = found.spec_accepted / found.spec_drafted
    assert share > 0.93 * wanted.spec_accepted / wanted.spec_drafted


def tokens_of(steps) -> list[int]:  # type: ignore[no-untyped-def]
    return [token for deltas in steps for delta in deltas for token in delta.token_ids]
