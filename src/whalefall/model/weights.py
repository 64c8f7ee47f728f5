"""Model room: the weights of a checkpoint by their place in the architecture, in place.

In: a `Checkpoint` and its `ModelConfig`. Out: `Weights`: views on the mapped files, each linear
layer with its FP8 block scales; nothing is unpacked. Names: the published classic ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from whalefall.errors import ShapeError, UnsupportedError
from whalefall.model.checkpoint import Checkpoint
from whalefall.model.config import ModelConfig

__all__ = ["Attention", "Experts", "Layer", "Linear", "Mlp", "MtpLayer", "Weights", "load_weights"]

_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_KEPT = (_E4M3, np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32))


@dataclass(frozen=True)
class Linear:
    """y = x · weightᵀ: weight [N, K] in E4M3 (with scale [⌈N/128⌉, ⌈K/128⌉] fp32), BF16 or fp32."""

    weight: np.ndarray
    scale: np.ndarray | None = None

    def dequantize(self, dtype: type = np.float32) -> np.ndarray:
        """The weight in fp32 (or float64), blocks scaled by global row // 128 and column // 128."""
        weight: np.ndarray = self.weight.astype(np.float32).astype(dtype)
        if self.scale is None:
            return weight
        rows, columns = weight.shape
        scale = np.repeat(np.repeat(self.scale, 128, axis=0)[:rows], 128, axis=1)[:, :columns]
        return weight * scale.astype(dtype)


@dataclass(frozen=True)
class Attention:
    """MLA projections and the norms of the compressed query and latent."""

    q: Linear | None  # [heads · (nope + rope), hidden], where there is no q_lora
    q_a: Linear | None  # [q_lora, hidden]
    q_a_norm: np.ndarray | None
    q_b: Linear | None  # [heads · (nope + rope), q_lora]
    kv_a: Linear  # [kv_lora + rope, hidden]
    kv_a_norm: np.ndarray
    kv_b: Linear  # [heads · (nope + v), kv_lora]
    o: Linear  # [hidden, heads · v]


@dataclass(frozen=True)
class Mlp:
    """down(silu(gate x) · up x)."""

    gate: Linear
    up: Linear
    down: Linear


@dataclass(frozen=True)
class Experts:
    """Gate (router) weight [experts, hidden] and bias, routed experts, shared expert."""

    gate_weight: Linear
    gate_bias: np.ndarray | None
    experts: tuple[Mlp, ...]
    shared: Mlp | None


@dataclass(frozen=True)
class Layer:
    """One decoder layer; `mlp` is dense or has experts."""

    input_norm: np.ndarray
    attention: Attention
    post_norm: np.ndarray
    mlp: Mlp | Experts


@dataclass(frozen=True)
class MtpLayer:
    """A multi-token prediction layer: h' = eh_proj([enorm(embedding), hnorm(hidden)])."""

    enorm: np.ndarray
    hnorm: np.ndarray
    eh_proj: Linear
    layer: Layer
    norm: np.ndarray
    head: Linear


@dataclass(frozen=True)
class Weights:
    """All weights of the main model, and its MTP layers."""

    embed: np.ndarray
    layers: tuple[Layer, ...]
    norm: np.ndarray
    head: Linear
    mtp: tuple[MtpLayer, ...] = ()


class _Reader:
    """Fetches tensors of a checkpoint and checks their shapes."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig) -> None:
        self.checkpoint = checkpoint
        self.config = config

    def array(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        array = self.checkpoint.array(name)
        if array.shape != shape:
            raise ShapeError(
                f"model: {name} is {list(array.shape)}, wanted {list(shape)} by config.json"
            )
        return array

    def small(self, name: str, size: int) -> np.ndarray:
        """A norm or bias vector as fp32 (a copy of a few kilobytes)."""
        return np.ascontiguousarray(self.array(name, (size,)).astype(np.float32))

    def linear(self, name: str, rows: int, columns: int) -> Linear:
        weight = self.array(f"{name}.weight", (rows, columns))
        if weight.dtype not in _KEPT:
            raise UnsupportedError(
                f"model: {name}.weight is {weight.dtype}, wanted E4M3 with scales, BF16 or F32"
            )
        if weight.dtype != _E4M3:
            return Linear(weight)
        scale = self.array(f"{name}.weight_scale_inv", (-(-rows // 128), -(-columns // 128)))
        return Linear(weight, np.ascontiguousarray(scale.astype(np.float32)))

    def mlp(self, name: str, width: int) -> Mlp:
        hidden = self.config.hidden_size
        return Mlp(
            gate=self.linear(f"{name}.gate_proj", width, hidden),
            up=self.linear(f"{name}.up_proj", width, hidden),
            down=self.linear(f"{name}.down_proj", hidden, width),
        )

    def attention(self, name: str) -> Attention:
        c = self.config
        q_rows = c.num_heads * c.qk_head_dim
        q_lora = c.q_lora_rank
        return Attention(
            q=None if q_lora else self.linear(f"{name}.q_proj", q_rows, c.hidden_size),
            q_a=self.linear(f"{name}.q_a_proj", q_lora, c.hidden_size) if q_lora else None,
            q_a_norm=self.small(f"{name}.q_a_layernorm.weight", q_lora) if q_lora else None,
            q_b=self.linear(f"{name}.q_b_proj", q_rows, q_lora) if q_lora else None,
            kv_a=self.linear(f"{name}.kv_a_proj_with_mqa", c.latent_dim, c.hidden_size),
            kv_a_norm=self.small(f"{name}.kv_a_layernorm.weight", c.kv_lora_rank),
            kv_b=self.linear(
                f"{name}.kv_b_proj",
                c.num_heads * (c.qk_nope_head_dim + c.v_head_dim),
                c.kv_lora_rank,
            ),
            o=self.linear(f"{name}.o_proj", c.hidden_size, c.num_heads * c.v_head_dim),
        )

    def experts(self, name: str) -> Experts:
        c = self.config
        bias = None
        if c.topk_method == "noaux_tc":
            bias = self.small(f"{name}.gate.e_score_correction_bias", c.num_experts)
        width = c.moe_intermediate_size
        return Experts(
            gate_weight=self.linear(f"{name}.gate", c.num_experts, c.hidden_size),
            gate_bias=bias,
            experts=tuple(self.mlp(f"{name}.experts.{e}", width) for e in range(c.num_experts)),
            shared=self.mlp(f"{name}.shared_experts", width * c.num_shared_experts)
            if c.num_shared_experts
            else None,
        )

    def layer(self, index: int) -> Layer:
        name, c = f"model.layers.{index}", self.config
        mlp: Mlp | Experts
        if c.is_moe(index):
            mlp = self.experts(f"{name}.mlp")
        else:
            mlp = self.mlp(f"{name}.mlp", c.intermediate_size)
        return Layer(
            input_norm=self.small(f"{name}.input_layernorm.weight", c.hidden_size),
            attention=self.attention(f"{name}.self_attn"),
            post_norm=self.small(f"{name}.post_attention_layernorm.weight", c.hidden_size),
            mlp=mlp,
        )

    def mtp(self, index: int, head: Linear) -> MtpLayer:
        name, hidden = f"model.layers.{index}", self.config.hidden_size
        own_head = f"{name}.shared_head.head"
        if f"{own_head}.weight" in self.checkpoint:
            head = self.linear(own_head, self.config.vocab_size, hidden)
        return MtpLayer(
            enorm=self.small(f"{name}.enorm.weight", hidden),
            hnorm=self.small(f"{name}.hnorm.weight", hidden),
            eh_proj=self.linear(f"{name}.eh_proj", hidden, 2 * hidden),
            layer=self.layer(index),
            norm=self.small(f"{name}.shared_head.norm.weight", hidden),
            head=head,
        )


def load_weights(checkpoint: Checkpoint, config: ModelConfig) -> Weights:
    """Find every weight of the model; MTP layers only where the file carries them.

    Raises: MissingError for a tensor that is not there, ShapeError for one of another shape.
    """
    read = _Reader(checkpoint, config)
    embed = read.array("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
    if config.tie_word_embeddings:
        head = Linear(embed)
    else:
        head = read.linear("lm_head", config.vocab_size, config.hidden_size)
    first = config.num_layers
    mtp = [
        read.mtp(index, head)
        for index in range(first, first + config.num_mtp_layers)
        if f"model.layers.{index}.eh_proj.weight" in checkpoint
    ]
    return Weights(
        embed=embed,
        layers=tuple(read.layer(index) for index in range(config.num_layers)),
        norm=read.small("model.norm.weight", config.hidden_size),
        head=head,
        mtp=tuple(mtp),
    )
