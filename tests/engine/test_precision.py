"""What the compute modes cost: KL and top-1 of the bundled checkpoint; W8A8 row by row."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import whalefall.model
from whalefall import jit
from whalefall.engine import LLM
from whalefall.jit import machine
from whalefall.model import reference
from whalefall.model.synth import synth
from whalefall.model.weights import Experts, Linear, Mlp

BUNDLED = Path(whalefall.model.__file__).parent / "bundled"
ROOT = Path(__file__).parents[2]


def tokens(count: int = 250) -> list[int]:
    """The licence, then lines that the model knows."""
    tokenizer = LLM(BUNDLED).tokenizer
    assert tokenizer is not None
    lines = (ROOT / "recipes/bundled/names.jsonl").read_text("utf-8").splitlines()[::40]
    known = "\n".join(json.loads(line)["line"] for line in lines)
    return tokenizer.encode((ROOT / "LICENSE").read_text("utf-8") + known)[:count]


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64) - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def divergence(a: np.ndarray, b: np.ndarray) -> float:
    a, b = log_softmax(a), log_softmax(b)
    return float((np.exp(a) * (a - b)).sum(axis=1).mean())


def test_fp32_is_exact() -> None:
    llm, ids = LLM(BUNDLED, compute="fp32"), tokens()
    wanted = reference.forward(ids, llm.engine.weights, llm.engine.model)
    # logits of size 20; fp32 sums over five layers
    np.testing.assert_allclose(llm.logits(ids), wanted, atol=1e-3)


def test_w8a16_is_close_to_fp32() -> None:
    ids = tokens(600)
    exact, ours = (LLM(BUNDLED, compute=c).logits(ids) for c in ("fp32", "w8a16"))
    assert divergence(exact, ours) < 1e-3
    # tiles add in an order of their own: 7 of the 600 differ there, 6 elsewhere
    least = 0.985 if machine.tile_is_fast(jit.best_level()) else 0.99
    assert (exact.argmax(axis=1) == ours.argmax(axis=1)).mean() >= least


def quantised(x: np.ndarray) -> np.ndarray:
    """The published activations: each 128 of a row in E4M3, scale amax / 448, amax >= 1e-4."""
    padded = np.zeros((len(x), -(-x.shape[1] // 128) * 128))
    padded[:, : x.shape[1]] = x
    blocks = padded.reshape(len(x), -1, 128)
    scale = np.maximum(np.abs(blocks).max(axis=2, keepdims=True), 1e-4) / 448
    codes = (blocks / scale).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    return (codes.astype(np.float64) * scale).reshape(padded.shape)[:, : x.shape[1]]


def test_w8a8_follows_the_published_numerics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most rows are those of a float64 model of the numerics, digit by digit.

    The others hold a value that fp32 and float64 round to different codes; such a flip is as large
    as the whole effect, and attention carries it to all later tokens: so prompts are short here.
    """
    llm = LLM(synth(tmp_path / "model"), compute="w8a8", kv="fp32")
    weights, config = llm.engine.weights, llm.engine.model
    prompts = np.random.default_rng(0).integers(0, config.vocab_size - 4, (40, 6)).tolist()
    plain = [reference.forward(ids, weights, config) for ids in prompts]
    kept = {id(layer.attention.kv_b) for layer in weights.layers}  # core attention is not FP8
    routed = {
        id(expert)
        for layer in weights.layers
        if isinstance(layer.mlp, Experts)
        for expert in layer.mlp.experts
    }
    exact_linear, exact_mlp = reference.linear, reference.mlp

    def linear(x: np.ndarray, w: Linear) -> np.ndarray:
        if w.scale is not None and id(w) not in kept:
            x = quantised(x)
        return exact_linear(x, w)

    def mlp(x: np.ndarray, w: Mlp) -> np.ndarray:
        y = exact_mlp(x, w)
        if id(w) in routed:  # rows come back from their experts in bf16
            y = y.astype(np.float32).astype(ml_dtypes.bfloat16).astype(y.dtype)
        return y

    monkeypatch.setattr(reference, "linear", linear)
    monkeypatch.setattr(reference, "mlp", mlp)
    ours = [llm.logits(ids) for ids in prompts]
    published = [reference.forward(ids, weights, config) for ids in prompts]
    off = np.abs(np.concatenate(ours) - np.concatenate(published)).max(axis=1)
    effect = np.abs(np.concatenate(plain) - np.concatenate(published)).max(axis=1)
    assert effect.min() > 1e-2
    assert (off < 1e-5).mean() > 0.8
