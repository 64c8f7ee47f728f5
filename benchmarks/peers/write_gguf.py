"""Writes a checkpoint as GGUF in Q8_0, for llama.cpp and ik_llama.cpp: the same weights, rounded.

`python benchmarks/peers/write_gguf.py CHECKPOINT FILE.gguf`. Names and fields are those that
llama.cpp's converter gives a DeepSeek model (arch deepseek2, kv_b split into k_b and v_b).
"""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np

from whalefall.model import Checkpoint, ModelConfig, load_config, load_weights
from whalefall.model.weights import Experts, Layer, Linear, Mlp

Q8 = gguf.GGMLQuantizationType.Q8_0


def add_fields(writer: gguf.GGUFWriter, c: ModelConfig) -> None:
    """The hyperparameters."""
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_heads)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope.theta)
    writer.add_rope_dimension_count(c.qk_rope_head_dim)
    writer.add_vocab_size(c.vocab_size)
    writer.add_leading_dense_block_count(c.first_k_dense)
    if c.q_lora_rank:
        writer.add_q_lora_rank(c.q_lora_rank)
    writer.add_kv_lora_rank(c.kv_lora_rank)
    writer.add_key_length(c.latent_dim)
    writer.add_value_length(c.kv_lora_rank)
    writer.add_key_length_mla(c.qk_head_dim)
    writer.add_value_length_mla(c.v_head_dim)
    writer.add_expert_feed_forward_length(c.moe_intermediate_size)
    writer.add_expert_count(c.num_experts)
    writer.add_expert_used_count(c.num_experts_per_tok)
    writer.add_expert_shared_count(c.num_shared_experts)
    writer.add_expert_weights_scale(c.routed_scaling_factor)
    writer.add_expert_weights_norm(c.norm_topk_prob)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"t{i}" for i in range(c.vocab_size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * c.vocab_size)
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


class Tensors:
    """Adds tensors to the file: matrices in Q8_0, vectors and gates in fp32."""

    def __init__(self, writer: gguf.GGUFWriter, config: ModelConfig) -> None:
        self.writer, self.config = writer, config

    def plain(self, name: str, array: np.ndarray) -> None:
        self.writer.add_tensor(name, np.ascontiguousarray(array.astype(np.float32)))

    def q8(self, name: str, array: np.ndarray) -> None:
        data = gguf.quants.quantize(np.ascontiguousarray(array, np.float32), Q8)
        self.writer.add_tensor(name, data, raw_dtype=Q8)

    def linear(self, name: str, weights: Linear) -> None:
        self.q8(f"{name}.weight", weights.dequantize())

    def mlp(self, name: str, mlp: Mlp, suffix: str = "") -> None:
        for part, weights in (("gate", mlp.gate), ("up", mlp.up), ("down", mlp.down)):
            self.linear(f"{name}.ffn_{part}{suffix}", weights)

    def layer(self, index: int, layer: Layer) -> None:
        c, a, name = self.config, layer.attention, f"blk.{index}"
        self.plain(f"{name}.attn_norm.weight", layer.input_norm)
        self.plain(f"{name}.ffn_norm.weight", layer.post_norm)
        if a.q is not None:
            self.linear(f"{name}.attn_q", a.q)
        else:
            assert a.q_a is not None and a.q_a_norm is not None and a.q_b is not None
            self.linear(f"{name}.attn_q_a", a.q_a)
            self.plain(f"{name}.attn_q_a_norm.weight", a.q_a_norm)
            self.linear(f"{name}.attn_q_b", a.q_b)
        self.linear(f"{name}.attn_kv_a_mqa", a.kv_a)
        self.plain(f"{name}.attn_kv_a_norm.weight", a.kv_a_norm)
        kv_b = a.kv_b.dequantize().reshape(c.num_heads, -1, c.kv_lora_rank)
        k_b, v_b = np.split(kv_b, [c.qk_nope_head_dim], axis=1)
        self.q8(f"{name}.attn_k_b.weight", k_b.transpose(0, 2, 1))
        self.q8(f"{name}.attn_v_b.weight", v_b)
        self.linear(f"{name}.attn_output", a.o)
        if not isinstance(layer.mlp, Experts):
            self.mlp(name, layer.mlp)
            return
        self.plain(f"{name}.ffn_gate_inp.weight", layer.mlp.gate_weight.weight)
        assert layer.mlp.gate_bias is not None
        self.plain(f"{name}.exp_probs_b.bias", layer.mlp.gate_bias)
        for part in ("gate", "up", "down"):
            all_experts = [getattr(e, part).dequantize() for e in layer.mlp.experts]
            self.q8(f"{name}.ffn_{part}_exps.weight", np.stack(all_experts))
        if layer.mlp.shared is not None:
            self.mlp(name, layer.mlp.shared, "_shexp")


def write_gguf(folder: Path, path: Path) -> None:
    """Write checkpoint `folder` to `path`, under a temporary name until complete."""
    config = load_config(folder)
    weights = load_weights(Checkpoint(folder), config)
    temporary = path.with_suffix(".tmp")
    writer = gguf.GGUFWriter(temporary, "deepseek2", use_temp_file=True)
    add_fields(writer, config)
    tensors = Tensors(writer, config)
    tensors.q8("token_embd.weight", weights.embed.astype(np.float32))
    for index, layer in enumerate(weights.layers):
        tensors.layer(index, layer)
    tensors.plain("output_norm.weight", weights.norm)
    tensors.linear("output", weights.head)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    temporary.rename(path)


if __name__ == "__main__":
    write_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
