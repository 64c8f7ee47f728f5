"""Model room: which tensors a checkpoint of a config has, without reading one.

In: a `ModelConfig`. Out: name, shape and kind of every tensor, in the published names.
"""

from __future__ import annotations

from collections.abc import Iterator

from whalefall.model.config import ModelConfig

__all__ = ["tensor_shapes"]


def tensor_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Every tensor of a checkpoint: name, shape, and kind (linear, table, norm, gate, bias)."""
    c, hidden = config, config.hidden_size
    yield "model.embed_tokens.weight", (c.vocab_size, hidden), "table"
    for index in range(c.num_layers + c.num_mtp_layers):
        name = f"model.layers.{index}"
        if index >= c.num_layers:
            for norm in ("enorm", "hnorm", "shared_head.norm"):
                yield f"{name}.{norm}.weight", (hidden,), "norm"
            yield f"{name}.eh_proj.weight", (hidden, 2 * hidden), "kept"
            yield f"{name}.embed_tokens.weight", (c.vocab_size, hidden), "table"
            yield f"{name}.shared_head.head.weight", (c.vocab_size, hidden), "kept"
        yield f"{name}.input_layernorm.weight", (hidden,), "norm"
        yield from _attention_shapes(f"{name}.self_attn", c)
        yield f"{name}.post_attention_layernorm.weight", (hidden,), "norm"
        yield from _mlp_shapes(f"{name}.mlp", c, c.is_moe(index))
    yield "model.norm.weight", (hidden,), "norm"
    if not c.tie_word_embeddings:
        yield "lm_head.weight", (c.vocab_size, hidden), "head"


def _attention_shapes(name: str, c: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], str]]:
    rows = c.num_heads * c.qk_head_dim
    if c.q_lora_rank:
        yield f"{name}.q_a_proj.weight", (c.q_lora_rank, c.hidden_size), "linear"
        yield f"{name}.q_a_layernorm.weight", (c.q_lora_rank,), "norm"
        yield f"{name}.q_b_proj.weight", (rows, c.q_lora_rank), "linear"
    else:
        yield f"{name}.q_proj.weight", (rows, c.hidden_size), "linear"
    yield f"{name}.kv_a_proj_with_mqa.weight", (c.latent_dim, c.hidden_size), "linear"
    yield f"{name}.kv_a_layernorm.weight", (c.kv_lora_rank,), "norm"
    kv_rows = c.num_heads * (c.qk_nope_head_dim + c.v_head_dim)
    yield f"{name}.kv_b_proj.weight", (kv_rows, c.kv_lora_rank), "linear"
    yield f"{name}.o_proj.weight", (c.hidden_size, c.num_heads * c.v_head_dim), "linear"


def _mlp_shapes(name: str, c: ModelConfig, moe: bool) -> Iterator[tuple[str, tuple[int, ...], str]]:
    parts = [(name, c.intermediate_size)]
    if moe:
        yield f"{name}.gate.weight", (c.num_experts, c.hidden_size), "gate"
        if c.topk_method == "noaux_tc":
            yield f"{name}.gate.e_score_correction_bias", (c.num_experts,), "bias"
        width = c.moe_intermediate_size
        parts = [(f"{name}.experts.{e}", width) for e in range(c.num_experts)]
        if c.num_shared_experts:
            parts.append((f"{name}.shared_experts", width * c.num_shared_experts))
    for part, width in parts:
        yield f"{part}.gate_proj.weight", (width, c.hidden_size), "linear"
        yield f"{part}.up_proj.weight", (width, c.hidden_size), "linear"
        yield f"{part}.down_proj.weight", (c.hidden_size, width), "linear"
