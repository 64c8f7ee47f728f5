"""The pages' first examples and the example run as written; the rooms' public names."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from whalefall import engine, model
from whalefall.engine import core

ROOT = Path(__file__).parents[2]
WANTED = {
    "docs/model.md": ["deepseek_v3 5 layers, 16 experts", "MHA would take", "What does tar do?"],
    "docs/engine.md": ["stop", "\n0 ", "\n1 "],
    "examples/06_generate.py": [
        "cached tokens of the first request: 0",
        "the next ones hit the prefix: True",
        "same tokens alone and together: True",
        "same logprobs, bit for bit: True",
        "three answers, repeatable: True",
        "blocks in use at the end: 0 of 64",
    ],
}


@pytest.mark.parametrize("name", WANTED)
def test_an_example_runs_as_written(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    if name.endswith(".md"):
        found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
        assert found is not None
        text = found[1]
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(compile(text, name, "exec"), {"__name__": "__main__"})
    for line in WANTED[name]:
        assert line in shown.getvalue()


def test_public_names() -> None:
    assert engine.__all__ == [
        "LLM",
        "Completion",
        "Delta",
        "Engine",
        "EngineConfig",
        "EngineStats",
        "RequestOutput",
        "SamplingParams",
        "StructuredOutputs",
        "TokenLogprobs",
    ]
    assert core.__all__ == [
        "Batch",
        "BlockManager",
        "DraftPolicy",
        "Scheduled",
        "Scheduler",
        "Sequence",
        "StepCosts",
    ]
    assert model.__all__ == [
        "Checkpoint",
        "Detokenizer",
        "ModelConfig",
        "Tokenizer",
        "Weights",
        "load_config",
        "load_tokenizer",
        "load_weights",
    ]
