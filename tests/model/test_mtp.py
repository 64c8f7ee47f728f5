"""The MTP layer against Transformers' own decoder layer, put together as the V3 report says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.model import truth
from tests.model.forms import FORMS
from whalefall.model import Checkpoint, load_config, load_weights, reference
from whalefall.model.native_step import NativeStep
from whalefall.model.numpy_step import NumpyStep
from whalefall.model.step import StepBatch
from whalefall.model.synth import synth

PROMPT = 70  # beyond a page


class Truth:
    """Transformers' model with the MTP layer as one decoder layer more, in fp32."""

    def __init__(self, folder: Path, scratch: Path) -> None:
        main = truth.load_transformers(folder, scratch / "main")
        self.hidden_of = lambda t: main(t, output_hidden_states=True).hidden_states[-1]
        deeper = truth.dequantized_copy(folder, scratch / "deeper")
        config = json.loads((deeper / "config.json").read_text())
        self.index = config["num_hidden_layers"]
        config |= {"num_hidden_layers": self.index + 1, "num_nextn_predict_layers": 0}
        (deeper / "config.json").write_text(json.dumps(config))
        self.model = truth.transformers.AutoModelForCausalLM.from_pretrained(
            deeper, dtype=torch.float32, attn_implementation="eager"
        ).model
        checkpoint = Checkpoint(deeper)
        self.tensor: Callable[[str], torch.Tensor] = lambda name: torch.tensor(
            checkpoint.array(f"model.layers.{self.index}.{name}.weight")
        )
        self.embed = torch.tensor(checkpoint.array("model.embed_tokens.weight"))
        self.eps = config["rms_norm_eps"]

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], self.tensor(name), self.eps)

    def join(self, tokens: list[int], hidden: torch.Tensor) -> torch.Tensor:
        both = [self.norm(self.embed[tokens], "enorm"), self.norm(hidden, "hnorm")]
        return torch.cat(both, dim=-1) @ self.tensor("eh_proj").T

    def layer(self, x: torch.Tensor) -> torch.Tensor:
        """The layer and its norm over rows x [T, hidden]."""
        count = len(x)
        mask = torch.full((1, 1, count, count), -torch.inf).triu(1)
        angles = self.model.rotary_emb(x[None], torch.arange(count)[None])
        out = self.model.layers[self.index](x[None], mask, position_embeddings=angles)
        return self.norm(out[0], "shared_head.norm")

    def logits(self, hidden: torch.Tensor) -> np.ndarray:
        found: np.ndarray = (hidden @ self.tensor("shared_head.head").T).numpy()
        return found


def rows(tokens: list[int], start: int, in_prompt: bool) -> StepBatch:
    return StepBatch(
        tokens=np.array(tokens, np.int32),
        positions=np.arange(start, start + len(tokens), dtype=np.int32),
        starts=np.array([0, len(tokens)], np.int32),
        block_tables=np.array([[1, 0]], np.int32),
        logit_rows=np.arange(len(tokens), dtype=np.int32),
        in_prompt=in_prompt,
    )


@pytest.mark.parametrize("make", ["native", "numpy"])
@torch.no_grad()
def test_logits_of_every_position_and_of_a_draft_upon_a_draft(make: str, tmp_path: Path) -> None:
    folder = synth(tmp_path / "model", FORMS["v3"], seed=3)
    config = load_config(folder)
    weights = load_weights(Checkpoint(folder), config)
    peer = Truth(folder, tmp_path)
    tokens = np.random.default_rng(5).integers(0, config.vocab_size, PROMPT).tolist()
    known = peer.hidden_of(torch.tensor([tokens]))[0]
    joined = peer.join(tokens[1:], known[:-1])
    first = peer.layer(joined)
    chained = peer.layer(torch.cat([joined, peer.join([7], first[-1:])]))[-1:]

    step: Any = NumpyStep(weights, config, 128)
    if make == "native":
        step = NativeStep(weights, config, "fp32", 128)
    kv = np.full((config.num_layers + 1, 2, 64, config.latent_dim), np.nan, np.float32)
    hidden = np.empty((PROMPT, config.hidden_size), np.float32)
    logits = step(rows(tokens, 0, True), kv, hidden)
    np.testing.assert_allclose(hidden, known, atol=1e-4)
    assert np.isnan(kv[-1]).all()
    main = kv[:-1].copy()
    hidden = hidden[:-1].copy()
    # a prompt's rows, then one generated one, as the engine's steps come
    head, tail = hidden[:-1].copy(), hidden[-1:].copy()
    ours = [
        step.mtp(rows(tokens[1:-1], 0, True), kv, head),
        step.mtp(rows(tokens[-1:], PROMPT - 2, False), kv, tail),
    ]
    np.testing.assert_allclose(np.concatenate(ours), peer.logits(first), atol=1e-4)
    np.testing.assert_allclose(np.concatenate([head, tail]), first, atol=1e-4)
    again = step.mtp(rows([7], PROMPT - 1, False), kv, tail)
    np.testing.assert_allclose(again, peer.logits(chained), atol=1e-4)
    np.testing.assert_array_equal(kv[:-1], main)  # the main model's latents stay as they are
    assert logits.shape == (PROMPT, config.vocab_size)

    plain = reference.mtp_logits(
        tokens, reference.hidden_states(tokens, weights, config), weights.mtp[0], weights, config
    )
    np.testing.assert_allclose(plain, peer.logits(first), atol=2e-5)
