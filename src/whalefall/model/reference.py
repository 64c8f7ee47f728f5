"""Model room: the whole architecture in plain numpy, the definition that the kernels follow.

In: `Weights`, `ModelConfig`, token ids of one sequence. Out: logits of every position.
Expanded MLA (keys and values per head), full attention matrix, no cache, one dtype throughout:
float64 for truth, float32 to follow Transformers. Truth of this file: Transformers in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from whalefall.model.config import ModelConfig
from whalefall.model.gate import choose_experts
from whalefall.model.weights import Attention, Experts, Layer, Linear, Mlp, MtpLayer, Weights

__all__ = ["forward", "hidden_states", "mtp_logits"]

# T tokens, H heads, N nope, R rope, V value, L latent, E experts


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x / rms(x) · weight over the last axis."""
    mean = np.mean(x * x, axis=-1, keepdims=True)
    return (x / np.sqrt(mean + eps) * weight).astype(x.dtype)


def rotate(x: np.ndarray, cos_sin: np.ndarray) -> np.ndarray:
    """Rotate pairs (2i, 2i + 1) of the last axis; cos_sin broadcasts as [..., pairs, 2]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos_sin[..., 0], cos_sin[..., 1]
    out = np.empty_like(x)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = odd * cos + even * sin
    return out


def silu(x: np.ndarray) -> np.ndarray:
    """x · sigmoid(x)."""
    return x / (1 + np.exp(-x))


def linear(x: np.ndarray, weights: Linear) -> np.ndarray:
    """x · weightᵀ in the dtype of x."""
    return x @ weights.dequantize(x.dtype.type).T


def attention(x: np.ndarray, w: Attention, c: ModelConfig, cos_sin: np.ndarray) -> np.ndarray:
    """Causal multi-head latent attention over one sequence, x [T, hidden]."""
    T, H = len(x), c.num_heads
    if w.q is not None:
        q = linear(x, w.q)
    else:
        assert w.q_a is not None and w.q_a_norm is not None and w.q_b is not None
        q = linear(rms_norm(linear(x, w.q_a), w.q_a_norm, c.norm_eps_latent), w.q_b)
    q_THD = q.reshape(T, H, c.qk_head_dim)
    q_nope, q_rope = np.split(q_THD, [c.qk_nope_head_dim], axis=-1)
    latent, k_rope = np.split(linear(x, w.kv_a), [c.kv_lora_rank], axis=-1)
    kv = linear(rms_norm(latent, w.kv_a_norm, c.norm_eps_latent), w.kv_b)
    k_nope, v_THV = np.split(kv.reshape(T, H, -1), [c.qk_nope_head_dim], axis=-1)
    q_rope, k_rope = rotate(q_rope, cos_sin[:, None]), rotate(k_rope, cos_sin)
    scores = np.einsum("qhn,khn->hqk", q_nope, k_nope) + np.einsum("qhr,kr->hqk", q_rope, k_rope)
    scores = scores * scores.dtype.type(c.softmax_scale)
    scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    return linear(np.einsum("hqk,khv->qhv", p, v_THV).reshape(T, -1), w.o)


def mlp(x: np.ndarray, w: Mlp) -> np.ndarray:
    """down(silu(gate x) · up x)."""
    return linear(silu(linear(x, w.gate)) * linear(x, w.up), w.down)


def experts(x: np.ndarray, w: Experts, c: ModelConfig) -> np.ndarray:
    """Routed experts weighted by the gate, summed in the gate's order, then the shared expert."""
    logits = linear(x, w.gate_weight).astype(np.float32)
    chosen, weights = choose_experts(logits, w.gate_bias, c)
    rows = np.zeros((*chosen.shape, x.shape[-1]), x.dtype)
    for expert in np.unique(chosen):
        token, place = np.nonzero(chosen == expert)
        rows[token, place] = mlp(x[token], w.experts[expert])
    y = np.einsum("tk,tkd->td", weights.astype(x.dtype), rows)
    return y + mlp(x, w.shared) if w.shared is not None else y


def layer(x: np.ndarray, w: Layer, c: ModelConfig, cos_sin: np.ndarray) -> np.ndarray:
    """One decoder layer: attention and MLP, each with a norm before and a residual around."""
    x = x + attention(rms_norm(x, w.input_norm, c.rms_norm_eps), w.attention, c, cos_sin)
    normed = rms_norm(x, w.post_norm, c.rms_norm_eps)
    return x + (experts(normed, w.mlp, c) if isinstance(w.mlp, Experts) else mlp(normed, w.mlp))


def hidden_states(
    tokens: Sequence[int], w: Weights, c: ModelConfig, dtype: type = np.float64
) -> np.ndarray:
    """The final norm's output of every position, [T, hidden]."""
    x = w.embed[np.asarray(tokens)].astype(dtype)
    cos_sin: np.ndarray = c.rope.table(len(tokens)).astype(dtype)
    for each in w.layers:
        x = layer(x, each, c, cos_sin)
    return rms_norm(x, w.norm, c.rms_norm_eps)


def forward(
    tokens: Sequence[int], w: Weights, c: ModelConfig, dtype: type = np.float64
) -> np.ndarray:
    """Logits [T, vocab] of every position of one sequence."""
    return linear(hidden_states(tokens, w, c, dtype), w.head)


def mtp_logits(
    tokens: Sequence[int], hidden: np.ndarray, m: MtpLayer, w: Weights, c: ModelConfig
) -> np.ndarray:
    """Logits [T − 1, vocab] of an MTP layer: position i predicts token i + 2.

    Args:
        tokens: the sequence; hidden: `hidden_states` of it (after the final norm).
    Source: DeepSeek-V3 report, 2.2; the embedding comes first in eh_proj's input.
    """
    embedded = w.embed[np.asarray(tokens[1:])].astype(hidden.dtype)
    both = [
        rms_norm(embedded, m.enorm, c.rms_norm_eps),
        rms_norm(hidden[:-1], m.hnorm, c.rms_norm_eps),
    ]
    x = linear(np.concatenate(both, axis=-1), m.eh_proj)
    x = layer(x, m.layer, c, c.rope.table(len(x)).astype(x.dtype))
    return linear(rms_norm(x, m.norm, c.rms_norm_eps), m.head)
