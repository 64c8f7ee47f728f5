"""The latent KV cache in FP8 rows of 656 bytes, against bf16 and against its own definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.engine.test_precision import BUNDLED, divergence, tokens
from tests.model.forms import FORMS
from tests.no_compiler import no_compiler
from whalefall import LLM, SamplingParams
from whalefall.attention import append_latent, dequantize_kv_cache
from whalefall.errors import ConfigError
from whalefall.model import Checkpoint, load_config, load_weights, reference
from whalefall.model.native_step import NativeStep
from whalefall.model.numpy_step import NumpyStep
from whalefall.model.step import Step, StepBatch
from whalefall.model.synth import synth

PROMPT = np.random.default_rng(1).integers(2, 250, 150).tolist()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {**FORMS["v3"], "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    return synth(tmp_path_factory.mktemp("wide"), {**shape, "num_nextn_predict_layers": 0}, seed=5)


def published_row(values: np.ndarray) -> np.ndarray:
    """What 656 bytes keep of 576 columns, in float64: 128 codes a scale, then bf16."""
    tiles = values[:, :512].reshape(len(values), 4, 128)
    most = np.abs(tiles).max(axis=2, keepdims=True)
    scale = np.exp2(np.ceil(np.log2(np.maximum(most / 448, 1e-4))))
    codes = (tiles / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    rope = values[:, 512:].astype(ml_dtypes.bfloat16).astype(np.float64)
    return np.concatenate([(codes * scale).reshape(len(values), 512), rope], axis=1)


class Cached:
    """The reference's latents and rotated keys replaced by the rows of a cache, layer by layer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, weights: Any, rows: np.ndarray) -> None:
        self.rows, self.exact = rows, np.zeros_like(rows)
        layers = {id(layer.attention.kv_a_norm): i for i, layer in enumerate(weights.layers)}
        norm, rotate = reference.rms_norm, reference.rotate
        now = 0

        def latent(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
            nonlocal now
            if id(weight) not in layers:
                return norm(x, weight, eps)
            now = layers[id(weight)]
            self.exact[now, :, :512] = norm(x, weight, eps)
            return rows[now, :, :512]

        def rope(x: np.ndarray, cos_sin: np.ndarray) -> np.ndarray:
            if x.ndim == 3:
                return rotate(x, cos_sin)  # of queries
            self.exact[now, :, 512:] = rotate(x, cos_sin)
            return rows[now, :, 512:]

        monkeypatch.setattr(reference, "rms_norm", latent)
        monkeypatch.setattr(reference, "rotate", rope)


# fp32: as close as without FP8. w8a16 rounds queries, weights and activations to bf16: without FP8
# its KL from float64 on this model is 1.5e-5, and its rows differ in more codes for that reason.
@pytest.mark.parametrize(
    ("compute", "atol", "kl", "differing"),
    [("fp32", 2e-5, 1e-11, 1e-3), ("w8a16", 0.1, 4e-5, 0.2)],
)
def test_a_step_over_fp8_rows_is_float64_attention_over_the_published_rows(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    compute: str,
    atol: float,
    kl: float,
    differing: float,
) -> None:
    shape = {**FORMS["v3"], "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    shape |= {"num_nextn_predict_layers": 0, "first_k_dense_replace": 3}  # no router to tip over
    checkpoint = Checkpoint(synth(tmp_path / "dense", shape, seed=5))
    config = load_config(tmp_path / "dense")
    weights = load_weights(checkpoint, config)
    kv = np.zeros((config.num_layers, 3, 64, 656), np.uint8)
    step = NativeStep(weights, config, compute, 256)
    every = np.arange(len(PROMPT), dtype=np.int32)
    pages = np.array([[2, 0, 1]], np.int32)
    ends = np.array([0, len(PROMPT)], np.int32)
    logits = step(StepBatch(np.array(PROMPT, np.int32), every, ends, pages, every, True), kv)

    rows = dequantize_kv_cache(kv[:, pages[0]]).astype(np.float64)
    cached = Cached(monkeypatch, weights, rows.reshape(len(kv), -1, 576)[:, : len(PROMPT)])
    want = reference.forward(PROMPT, weights, config)
    np.testing.assert_allclose(logits, want, atol=atol)
    assert divergence(want, logits) < kl
    for kept, exact in zip(cached.rows, cached.exact, strict=True):
        published = published_row(exact)
        # a value between two codes may go either way
        assert (kept != published).mean() < differing


def test_numpy_steps_over_fp8_rows_where_no_compiler_is(model: Path) -> None:
    config = load_config(model)
    weights = load_weights(Checkpoint(model), config)
    pages = np.array([[2, 0, 1]], np.int32)
    asked, ends = np.arange(75, dtype=np.int32), np.array([0, 75], np.int32)

    def run(step: Step, row: int = 656, dtype: type = np.uint8) -> tuple[np.ndarray, np.ndarray]:
        kv, logits = np.zeros((config.num_layers, 3, 64, row), dtype), []
        for first in (0, 75):  # the second part reads what the first wrote
            ids = np.array(PROMPT[first : first + 75], np.int32)
            batch = StepBatch(ids, first + asked, ends, pages, asked, True)
            logits.append(step(batch, kv))
        return np.concatenate(logits), kv

    want, stored = run(NativeStep(weights, config, "fp32", 256))
    with no_compiler():
        found, rows = run(NumpyStep(weights, config, 256))
        plain, _ = run(NumpyStep(weights, config, 256), 576, np.float32)
    assert (rows[0] != stored[0]).mean() < 1e-3  # later layers are as far apart as the steps are
    assert divergence(want, found) < 2e-5 < divergence(want, plain) / 5


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
