"""The latent KV cache in FP8 rows of 656 bytes, against bf16 and against its own definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine.test_precision import BUNDLED, divergence, tokens
from tests.model.forms import FORMS
from whalefall import LLM, SamplingParams
from whalefall.attention import append_latent, dequantize_kv_cache
from whalefall.errors import ConfigError
from whalefall.model import reference
from whalefall.model.synth import synth

PROMPT = np.random.default_rng(1).integers(2, 250, 150).tolist()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {**FORMS["v3"], "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    return synth(tmp_path_factory.mktemp("wide"), {**shape, "num_nextn_predict_layers": 0}, seed=5)


def test_logits_are_close_to_those_of_a_bf16_cache(model: Path) -> None:
    half, fp8 = (LLM(model, kv=kv).logits(PROMPT) for kv in ("bf16", "fp8"))
    # Random weights, so routers turn on little: 9.8e-3 seen. On text: the last test of this file.
    assert 0 < divergence(half, fp8) < 3e-2
    assert (half.argmax(axis=1) == fp8.argmax(axis=1)).mean() > 0.85


def test_a_row_takes_656_bytes_and_holds_the_published_layout(model: Path) -> None:
    plain, llm = (LLM(model, kv=kv, compute="fp32", num_blocks=4) for kv in ("fp32", "fp8"))
    for one in (plain, llm):
        one.generate([PROMPT[:70]], SamplingParams(max_tokens=1, temperature=0))
    exact, rows = (one.engine.runner.cache.array[0].reshape(256, -1) for one in (plain, llm))
    assert rows.dtype == np.uint8
    assert rows.shape[1] == 656
    used = np.abs(exact).sum(axis=1) > 0
    assert used.sum() == 70
    latent, rope = exact[used, :512], exact[used, 512:]
    cache = np.zeros((2, 64, 1, 656), np.uint8)
    append_latent(latent, rope, cache, np.arange(70, dtype=np.int32), True)
    want = dequantize_kv_cache(cache.reshape(128, 656)[:70]).astype(np.float32)
    got = dequantize_kv_cache(rows[used]).astype(np.float32)
    np.testing.assert_array_equal(got, want)  # the first layer sees the same embeddings


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_change_no_bit(model: Path, chunk: int) -> None:
    llm = LLM(model, kv="fp8")
    assert (llm.logits(PROMPT, chunk=chunk) == llm.logits(PROMPT)).all()


def test_neighbours_and_prefix_hits_change_no_token(model: Path) -> None:
    params = SamplingParams(max_tokens=12, temperature=0, logprobs=1)
    prompts = [PROMPT, PROMPT[:3], PROMPT[:64], PROMPT[5:90]]
    together = LLM(model, kv="fp8").generate(prompts, params)
    alone = LLM(model, kv="fp8")
    for _ in range(2):  # the second time over a cached prefix
        for prompt, beside in zip(prompts, together, strict=True):
            (one,) = alone.generate([prompt], params)
            assert one.outputs[0].token_ids == beside.outputs[0].token_ids
            assert one.outputs[0].logprobs == beside.outputs[0].logprobs


def test_another_width_is_refused() -> None:
    with pytest.raises(ConfigError, match="576"):
        LLM(BUNDLED, kv="fp8")


def test_divergence_on_text_when_latents_are_stored_in_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled model's latent is one tile of 128: the same numerics on real text."""
    llm, ids = LLM(BUNDLED, compute="fp32"), tokens()
    weights, config = llm.engine.weights, llm.engine.model
    exact = reference.forward(ids, weights, config)
    plain = reference.rms_norm

    def stored(x: np.ndarray, weight: np.ndarray, *rest: Any) -> np.ndarray:
        y = plain(x, weight, *rest)
        if y.shape[-1] != config.kv_lora_rank:
            return y
        wide = np.zeros((len(y), 512), np.float32)
        wide[:, :128] = y
        cache = np.zeros((len(y), 1, 1, 656), np.uint8)
        places = np.arange(len(y), dtype=np.int32)
        append_latent(wide, np.zeros((len(y), 64), np.float32), cache, places, True)
        rows = dequantize_kv_cache(cache.reshape(-1, 656)[: len(y)]).astype(np.float64)
        return rows[:, :128]

    monkeypatch.setattr(reference, "rms_norm", stored)
    ours = reference.forward(ids, weights, config)
    kl, same = divergence(exact, ours), (exact.argmax(1) == ours.argmax(1)).mean()
    print(f"fp8 latents: KL {kl:.2e}, top-1 {same:.3f}")
    assert 0 < kl < 1e-2
    assert same > 0.95
