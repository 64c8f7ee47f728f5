"""Every supported form against Transformers' own model in fp32, on random small checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tests.model import truth
from tests.model.forms import FORMS
from whalefall.errors import DtypeError
from whalefall.model import Checkpoint, ModelConfig, Weights, load_config, load_weights, reference
from whalefall.model.native_step import NativeStep
from whalefall.model.numpy_step import NumpyStep
from whalefall.model.step import Step, StepBatch
from whalefall.model.synth import synth
from whalefall.model.weights import Experts, Linear

CASES = {f"{form}-fp8": (form, True) for form in FORMS}
CASES |= {"v3-bf16": ("v3", False), "v2-lite-bf16": ("v2-lite", False)}
PROMPT, ANSWER = 70, 64  # beyond a page, and beyond YaRN's original 64 positions


def batch(tokens: list[int], start: int, in_prompt: bool, rows: list[int]) -> StepBatch:
    return StepBatch(
        tokens=np.array(tokens, np.int32),
        positions=np.arange(start, start + len(tokens), dtype=np.int32),
        starts=np.array([0, len(tokens)], np.int32),
        block_tables=np.array([[2, 0, 1]], np.int32),  # pages in no order
        logit_rows=np.array(rows, np.int32),
        in_prompt=in_prompt,
    )


def pages(config: ModelConfig) -> np.ndarray:
    return np.full((config.num_layers, 3, 64, config.latent_dim), np.nan, np.float32)


def greedy(step: Step, config: ModelConfig, prompt: list[int], count: int) -> list[int]:
    kv, answer = pages(config), []
    logits = step(batch(prompt, 0, True, [len(prompt) - 1]), kv)
    for position in range(len(prompt), len(prompt) + count):
        answer.append(int(logits[0].argmax()))
        logits = step(batch(answer[-1:], position, False, [0]), kv)
    return answer


def load(folder: Path) -> tuple[ModelConfig, Weights]:
    config = load_config(folder)
    return config, load_weights(Checkpoint(folder), config)


@pytest.mark.parametrize(("form", "fp8"), list(CASES.values()), ids=list(CASES))
def test_a_form_gives_transformers_logits_and_greedy_tokens(
    form: str, fp8: bool, tmp_path: Path
) -> None:
    folder = synth(tmp_path / "model", FORMS[form], fp8=fp8, seed=1)
    config, weights = load(folder)
    peer = truth.load_transformers(folder, tmp_path / "fp32")
    prompt = np.random.default_rng(2).integers(0, config.vocab_size, PROMPT).tolist()
    wanted = truth.logits(peer, prompt)
    # float64 against Transformers' fp32: three layers of rounding, logits of size 1
    np.testing.assert_allclose(reference.forward(prompt, weights, config), wanted, atol=2e-5)

    step = NativeStep(weights, config, "fp32", 256)
    ours = step(batch(prompt, 0, True, list(range(PROMPT))), pages(config))
    np.testing.assert_allclose(ours, wanted, atol=1e-4)
    assert greedy(step, config, prompt, ANSWER) == truth.greedy(peer, prompt, ANSWER)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth(tmp_path_factory.mktemp("tiny"), FORMS["v3"], seed=3)


def test_the_numpy_step_agrees_with_the_native_one(tiny: Path) -> None:
    config, weights = load(tiny)
    tokens = np.random.default_rng(4).integers(0, config.vocab_size, 80).tolist()
    native, plain = NativeStep(weights, config, "fp32", 128), NumpyStep(weights, config, 128)
    kvs = pages(config), pages(config)
    rows = list(range(80))
    ours, theirs = (
        step(batch(tokens, 0, True, rows), kv)
        for step, kv in zip((native, plain), kvs, strict=True)
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    np.testing.assert_allclose(kvs[0], kvs[1], atol=1e-4)  # NaN where nothing was written
    assert (native.expert_load == plain.expert_load).all()
    assert native.expert_load.sum() == 80 * 3 * 2  # tokens, top-k, layers with experts


def in_bf16(linear: Linear) -> Linear:
    return Linear(linear.dequantize().astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("part", ["gate", "up", "down"])
def test_experts_of_one_layer_in_two_dtypes_are_refused(tiny: Path, part: str) -> None:
    config, weights = load(tiny)
    last = weights.layers[-1]
    assert isinstance(last.mlp, Experts)
    experts = list(last.mlp.experts)
    experts[2] = replace(experts[2], **{part: in_bf16(getattr(experts[2], part))})
    odd = replace(last, mlp=replace(last.mlp, experts=tuple(experts)))
    mixed = replace(weights, layers=(*weights.layers[:-1], odd))
    words = rf"^model: layer {config.num_layers - 1}: expert 2: .*bfloat16.* as of expert 0; conv"
    with pytest.raises(DtypeError, match=words):
        NativeStep(mixed, config, "fp32", 128)
