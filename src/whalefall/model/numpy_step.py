"""Model room: the forward step in plain numpy, for machines without a compiler and as a check.

In, out: see `step.Step`. Absorbed MLA over paged latents, fp32; agrees with `reference.forward`.
Slow (weights are dequantised at each use), and its last bits depend on the batch.
"""

from __future__ import annotations

import numpy as np

from whalefall.attention import append_latent, dequantize_kv_cache
from whalefall.model import reference as plain
from whalefall.model.config import ModelConfig
from whalefall.model.gate import choose_experts
from whalefall.model.step import StepBatch
from whalefall.model.weights import Attention, Experts, Layer, Linear, Weights

__all__ = ["NumpyStep"]

# T tokens, H heads, N nope, V value, L latent


class NumpyStep:
    """A `step.Step` in numpy."""

    def __init__(self, weights: Weights, config: ModelConfig, max_positions: int) -> None:
        """Prepare a step over `weights` for positions below `max_positions`."""
        self.weights = weights
        self.config = config
        self.hidden_size = config.hidden_size
        self._cos_sin = config.rope.table(max_positions)
        self.expert_load = np.zeros((config.num_layers, max(config.num_experts, 1)), np.int64)

    def __call__(
        self, batch: StepBatch, kv: np.ndarray, hidden: np.ndarray | None = None
    ) -> np.ndarray:
        """See `step.Step`."""
        c, w = self.config, self.weights
        x = w.embed[batch.tokens].astype(np.float32)
        for index, layer in enumerate(w.layers):
            x, chosen = self._layer(x, layer, batch, kv[index])
            if chosen is not None:
                self.expert_load[index] += np.bincount(chosen.ravel(), minlength=c.num_experts)
        return _logits(plain.rms_norm(x, w.norm, c.rms_norm_eps), w.head, batch, hidden)

    def mtp(self, batch: StepBatch, kv: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        """See `step.Step`."""
        c, w, m = self.config, self.weights, self.weights.mtp[0]
        embedded = w.embed[batch.tokens].astype(np.float32)
        both = [
            plain.rms_norm(embedded, m.enorm, c.rms_norm_eps),
            plain.rms_norm(hidden, m.hnorm, c.rms_norm_eps),
        ]
        x = plain.linear(np.concatenate(both, axis=-1), m.eh_proj)
        x, _ = self._layer(x, m.layer, batch, kv[c.num_layers])
        return _logits(plain.rms_norm(x, m.norm, c.rms_norm_eps), m.head, batch, hidden)

    def _layer(
        self, x: np.ndarray, layer: Layer, batch: StepBatch, kv: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """x after a layer, and the experts it chose."""
        c = self.config
        normed = plain.rms_norm(x, layer.input_norm, c.rms_norm_eps)
        cos_sin = self._cos_sin[batch.positions]
        x = x + self._attention(normed, layer.attention, cos_sin, batch, kv)
        normed = plain.rms_norm(x, layer.post_norm, c.rms_norm_eps)
        if not isinstance(layer.mlp, Experts):
            return x + plain.mlp(normed, layer.mlp), None
        logits = plain.linear(normed, layer.mlp.gate_weight)
        chosen, _ = choose_experts(logits, layer.mlp.gate_bias, c)
        return x + plain.experts(normed, layer.mlp, c), chosen

    def _attention(
        self, x: np.ndarray, w: Attention, cos_sin: np.ndarray, batch: StepBatch, kv: np.ndarray
    ) -> np.ndarray:
        c = self.config
        if w.q is not None:
            q = plain.linear(x, w.q)
        else:
            assert w.q_a is not None and w.q_a_norm is not None and w.q_b is not None
            compressed = plain.rms_norm(plain.linear(x, w.q_a), w.q_a_norm, c.norm_eps_latent)
            q = plain.linear(compressed, w.q_b)
        q = q.reshape(len(x), c.num_heads, c.qk_head_dim)
        q_nope, q_rope = np.split(q, [c.qk_nope_head_dim], axis=-1)
        latent, k_rope = np.split(plain.linear(x, w.kv_a), [c.kv_lora_rank], axis=-1)
        latent = plain.rms_norm(latent, w.kv_a_norm, c.norm_eps_latent)
        k_rope = plain.rotate(k_rope, cos_sin)
        up = w.kv_b.dequantize().reshape(c.num_heads, -1, c.kv_lora_rank)
        k_up_HNL, v_up_HVL = np.split(up, [c.qk_nope_head_dim], axis=1)
        q_latent = np.einsum("thn,hnl->thl", q_nope, k_up_HNL)
        q_full = np.concatenate([q_latent, plain.rotate(q_rope, cos_sin[:, None])], axis=-1)
        out = np.empty((len(x), c.num_heads, c.kv_lora_rank), np.float32)
        for s in range(len(batch.starts) - 1):
            part = slice(batch.starts[s], batch.starts[s + 1])
            positions, table = batch.positions[part], batch.block_tables[s]
            _append(kv, latent[part], k_rope[part], table, positions)
            known = np.arange(positions[-1] + 1)
            keys = kv[table[known // 64], known % 64]
            keys = dequantize_kv_cache(keys) if kv.dtype == np.uint8 else keys
            keys = keys.astype(np.float32)
            scores = np.einsum("thl,kl->htk", q_full[part], keys) * np.float32(c.softmax_scale)
            scores = np.where(known <= positions[:, None], scores, -np.inf)
            p = np.exp(scores - scores.max(axis=-1, keepdims=True))
            p /= p.sum(axis=-1, keepdims=True)
            out[part] = np.einsum("htk,kl->thl", p, keys[:, : c.kv_lora_rank])
        values = np.einsum("thl,hvl->thv", out, v_up_HVL)
        return plain.linear(values.reshape(len(x), -1), w.o)


def _append(
    kv: np.ndarray, latent: np.ndarray, rope: np.ndarray, table: np.ndarray, positions: np.ndarray
) -> None:
    """A sequence's new rows at their places in a cache, rounded to its format."""
    blocks, places = table[positions // 64], positions % 64
    if kv.dtype == np.uint8:
        append_latent(latent, rope, kv[:, :, None], blocks * 64 + places, True)
    else:
        kv[blocks, places] = np.concatenate([latent, rope], axis=-1).astype(kv.dtype)


def _logits(x: np.ndarray, head: Linear, batch: StepBatch, hidden: np.ndarray | None) -> np.ndarray:
    """Logits of the rows asked for, of normed x, which goes to `hidden`."""
    if hidden is not None:
        hidden[:] = x
    return np.ascontiguousarray(plain.linear(x[batch.logit_rows], head))
