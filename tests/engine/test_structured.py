"""Answers in a given form, drawn from a model that would write anything."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import numpy as np
import pytest

from whalefall.engine import LLM, Engine, EngineConfig, SamplingParams, StructuredOutputs
from whalefall.engine.sampling import SampleRow, sample, sample_row
from whalefall.errors import ConfigError
from whalefall.serve.commands import bundled_path

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["file", "directory"]},
    },
    "required": ["name", "size", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(bundled_path(), num_blocks=32)


def answers(llm: LLM, form: StructuredOutputs, **fields: Any) -> list[str]:
    params = SamplingParams(
        **{"temperature": 1.0, "seed": 4, "n": 6, "max_tokens": 120, **fields},
        structured_outputs=form,
    )
    (output,) = llm.generate("What does tar do?", params)
    assert {answer.finish_reason for answer in output.outputs} == {"stop"}
    return [answer.text for answer in output.outputs]


def test_a_schema_is_met(llm: LLM) -> None:
    for schema in (SCHEMA, json.dumps(SCHEMA)):
        for text in answers(llm, StructuredOutputs(json=schema)):
            found = json.loads(text)
            assert list(found) == ["name", "size", "kind"]
            assert len(found["name"]) <= 8
            assert found["size"] in range(100)
            assert found["kind"] in ("file", "directory")


def test_a_regex_and_a_choice_and_a_grammar_are_met(llm: LLM) -> None:
    for text in answers(llm, StructuredOutputs(regex=r"[a-c]{3}-\d+\.")):
        assert re.fullmatch(r"[a-c]{3}-\d+\.", text)
    choice = ["no manual entry", "tar", 'a "quoted" one']
    texts = answers(llm, StructuredOutputs(choice=choice), n=20, temperature=20.0)
    assert set(texts) <= set(choice)
    assert len(set(texts)) > 1
    for grammar in (
        'root ::= "x" ab ab? "!"\nab ::= "ab" | "cd"',
        'start: "x" ab ab? "!"\nab: "ab" | "cd"',
    ):
        for text in answers(llm, StructuredOutputs(grammar=grammar)):
            assert re.fullmatch("x(ab|cd){1,2}!", text)


def test_any_object(llm: LLM) -> None:
    params = SamplingParams(
        temperature=0, max_tokens=40, structured_outputs=StructuredOutputs(json_object=True)
    )
    (output,) = llm.generate("{", params)
    assert output.text.lstrip().startswith("{")
    if output.finish_reason == "stop":
        assert isinstance(json.loads(output.text), dict)


def test_the_form_begins_after_its_start_token(llm: LLM) -> None:
    tokenizer = llm.tokenizer
    assert tokenizer is not None
    start = tokenizer.encode("The")[0]
    form = StructuredOutputs(choice=["yes", "no"], start_token=start)
    params = SamplingParams(
        temperature=0, max_tokens=30, logit_bias={start: 100}, structured_outputs=form
    )
    (output,) = llm.generate("What", params)
    assert output.token_ids[0] == start
    assert output.text in ("Theyes", "Theno")
    late = StructuredOutputs(choice=["yes", "no"], start_token=tokenizer.eos_token_id)
    params = SamplingParams(temperature=0, max_tokens=5, structured_outputs=late)
    (free,) = llm.generate("What", params)
    assert (
        free.token_ids
        == llm.generate("What", SamplingParams(temperature=0, max_tokens=5))[0].token_ids
    )


def test_speculation_changes_no_constrained_answer() -> None:
    found = []
    forms = [StructuredOutputs(json=SCHEMA), StructuredOutputs(choice=["ab", "abc"])]
    for speculative in (False, True):
        llm = LLM(bundled_path(), num_blocks=32, speculative=speculative, draft_tokens=3)
        if speculative:
            llm.engine._policy.num_drafts = lambda batch: 3  # type: ignore[method-assign]
        found.append(
            [
                llm.generate(
                    "The file",
                    SamplingParams(temperature=t, seed=1, n=3, max_tokens=60, logprobs=1,
                                   structured_outputs=form),
                )[0].outputs
                for t in (0, 0.9)
                for form in forms
            ]
        )  # fmt: skip
    assert found[0] == found[1]
    assert llm.engine.stats().spec_accepted > 20


def test_what_cannot_be_compiled_or_makes_no_sense_is_refused(llm: LLM) -> None:
    for form, message in (
        ({"json": {"type": "nonsense"}}, "nonsense"),
        ({"json": "{"}, "structured outputs: Expecting"),
        ({"regex": "a+("}, "regex"),
        ({"grammar": "start: foo("}, "structured outputs: 1"),
    ):
        params = SamplingParams(structured_outputs=StructuredOutputs(**form))  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=message):
            llm.generate("x", params)
    assert not llm.engine.has_work()
    for wrong in (
        {},
        {"regex": "a", "choice": ["b"]},
        {"choice": []},
        {"choice": "ab"},
        {"regex": ""},
    ):
        with pytest.raises(ConfigError):
            StructuredOutputs(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="ignore_eos"):
        SamplingParams(ignore_eos=True, structured_outputs=StructuredOutputs(regex="a"))


def test_matchers_of_one_form_are_apart_and_forms_are_compiled_once(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(bundled_path(), EngineConfig(num_blocks=4))
    compiled: list[str] = []
    compile_ = engine.grammars._compile
    monkeypatch.setattr(
        engine.grammars, "_compile", lambda source: compiled.append(source) or compile_(source)
    )
    first, second = (engine.grammars.matcher(StructuredOutputs(choice=["ab"])) for _ in range(2))
    assert len(compiled) == 1
    (token,) = llm.tokenizer.encode("ab")[:1]  # type: ignore[union-attr]
    before = second.allowed()
    first.push(token)
    assert before is not None
    assert (second.allowed() == before).all()
    ahead = second.allowed([token])
    assert (second.allowed() == before).all()  # looking ahead leaves it where it was
    assert (ahead == first.allowed()).all()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_native_sampler_masks_as_its_definition(temperature: float) -> None:
    rng = np.random.default_rng(3)
    params = SamplingParams(temperature=temperature, top_p=0.9, logprobs=2)
    for vocab in (9, 64, 1003):
        logits = rng.standard_normal(vocab).astype(np.float32)
        bits = rng.random(vocab) < 0.2
        bits[rng.integers(vocab)] = True
        allowed = np.packbits(bits, bitorder="little")
        for draw in (0.0, 0.3, 0.99):
            row = SampleRow(logits, params, Counter(), (), draw, allowed)
            ours, wanted = sample([row])[0], sample_row(row)
            assert ours[0] == wanted[0]
            assert bits[ours[0]]
            assert ours[1].logprob == pytest.approx(wanted[1].logprob, abs=1e-5)  # type: ignore[union-attr]
