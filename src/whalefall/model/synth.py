"""Model room: random checkpoints of a named shape, for tests and benchmarks.

In: a shape (or a config.json as a dict), a seed. Out: a folder that any engine can load: config,
safetensors with FP8 blocks or BF16, a byte-level tokenizer. Weights have the published scale
(unit-variance activations), so logits are as spread as those of a trained model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from whalefall.errors import ConfigError
from whalefall.model.checkpoint import ShardWriter
from whalefall.model.config import ModelConfig, parse_config
from whalefall.model.quantize import quantize_blocks
from whalefall.model.shapes import tensor_shapes

__all__ = ["SHAPES", "synth", "write_tokenizer"]

_MID: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 32768,
    "hidden_size": 2048,
    "num_hidden_layers": 6,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": 768,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 16384,
    "num_nextn_predict_layers": 0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_TINY = {
    **_MID,
    "vocab_size": 384,
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 40,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    "intermediate_size": 176,
    "moe_intermediate_size": 72,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "max_position_embeddings": 4096,
}
SHAPES: dict[str, dict[str, Any]] = {"mid": _MID, "tiny": _TINY}
_SPECIAL = ("<|begin|>", "<|end|>", "<|user|>", "<|assistant|>")
_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + ('assistant' if m.role == 'assistant' else"
    " 'user') + '|>' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


class _Normal:
    """Normal weights of variance 1 / columns, quickly: rows of large ones are windows of a pool."""

    _LARGE = 1 << 20

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self._values = self.rng.standard_normal(2 * self._LARGE, np.float32)
        # 5.5 standard deviations at 448: what block scales of amax / 448 come to
        self._codes = np.clip(self._values * (448 / 5.5), -448, 448).astype(ml_dtypes.float8_e4m3fn)

    def _rows(self, pool: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        out = np.empty(shape, pool.dtype)
        starts = self.rng.integers(0, len(pool) - shape[1], shape[0])
        for row, start in zip(out, starts, strict=True):
            row[:] = pool[start : start + shape[1]]
        return out

    def weight(self, shape: tuple[int, ...], std: float) -> np.ndarray:
        """A matrix in fp32."""
        if shape[0] * shape[1] < self._LARGE:
            return self.rng.standard_normal(shape, np.float32) * np.float32(std)
        return self._rows(self._values, shape) * np.float32(std)

    def fp8(self, shape: tuple[int, ...], std: float) -> tuple[np.ndarray, np.ndarray]:
        """E4M3 values and block scales."""
        if shape[0] * shape[1] < self._LARGE:
            return quantize_blocks(self.weight(shape, std))
        blocks = (-(-shape[0] // 128), -(-shape[1] // 128))
        scale = np.float32(std * 5.5 / 448) * self.rng.uniform(0.9, 1.1, blocks)
        return self._rows(self._codes, shape), scale.astype(np.float32)


def _tensors(
    config: ModelConfig, fp8: bool, fp8_head: bool, seed: int
) -> Iterator[tuple[str, np.ndarray]]:
    normal = _Normal(seed)
    for name, shape, kind in tensor_shapes(config):
        if kind in ("norm", "bias"):
            noise = np.float32(0.1) * normal.rng.standard_normal(shape, np.float32)
            yield name, noise if kind == "bias" else (1 + noise).astype(ml_dtypes.bfloat16)
            continue
        std = 1.0 if kind == "table" else float(shape[1] ** -0.5)
        if (kind == "linear" and fp8) or (kind == "head" and fp8_head):
            yield from zip((name, f"{name}_scale_inv"), normal.fp8(shape, std), strict=True)
        else:
            yield name, normal.weight(shape, std).astype(ml_dtypes.bfloat16)


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a byte-level tokenizer of 260 ids (four special tokens first) and a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if vocab_size < 256 + len(_SPECIAL):
        raise ConfigError(f"synth: vocab_size is {vocab_size}, wanted 260 or more")
    names = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={n: i for i, n in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in _SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": _SPECIAL[0],
        "eos_token": _SPECIAL[1],
        "chat_template": _TEMPLATE,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def synth(
    folder: str | Path,
    shape: str | dict[str, Any] = "tiny",
    *,
    fp8: bool = True,
    fp8_head: bool = False,
    seed: int = 0,
) -> Path:
    """Write a checkpoint with random weights.

    Args:
        folder: where to; made if missing.
        shape: a name of `SHAPES`, or the fields of a config.json.
        fp8: linear layers in E4M3 with 128 × 128 scales (as published), else BF16.
        fp8_head: the output head in FP8 too (no published file does; GGUF's Q8_0 does alike).
        seed: of the weights.
    Returns: the folder.
    Raises: ConfigError for an unknown shape.
    """
    if isinstance(shape, str):
        if shape not in SHAPES:
            raise ConfigError(f"synth: no shape {shape!r}, wanted one of {', '.join(SHAPES)}")
        shape = SHAPES[shape]
    fields = dict(shape)
    if fp8:
        fields["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        }
    config = parse_config(fields, "synth")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(folder)
    for name, array in _tensors(config, fp8, fp8 and fp8_head, seed):
        writer.add(name, array)
    writer.close()
    (folder / "config.json").write_text(json.dumps(fields, indent=1), encoding="utf-8")
    write_tokenizer(folder, config.vocab_size)
    return folder
