"""Train room: the parts of a DeepSeek-V3 layer that have no experts: norm, MLA, SwiGLU.

In: the residual stream [R, L, H] fp32 and who may see whom. Out: the same shape. Weights carry the
published checkpoints' layout and names (`published`). Truth: Transformers' `DeepseekV3ForCausalLM`.
Source: DeepSeek-V3 report, 2.1.1 (multi-head latent attention).

# R rows (sequences), L their length, H hidden, A heads, D a head's width
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whalefall.model.config import ModelConfig
from whalefall.train.functions import linear, swiglu
from whalefall.train.products import Precision

__all__ = ["MLP", "Attention", "Maker", "Named", "RMSNorm", "Visible"]


class Named(NamedTuple):
    """A published tensor: its name, and the part of a parameter that it is."""

    name: str
    parameter: nn.Parameter
    part: tuple[int | slice, ...] = ()

    def of(self, tensor: Tensor) -> Tensor:
        """The part of a tensor shaped as the parameter (a gradient, a moment), as a view."""
        return tensor[self.part] if self.part else tensor


class Maker:
    """Makes weights whose values depend on the seed and their published name alone.

    So every layout of ranks starts from the same model.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def normal(self, name: str, *shape: int, std: float | None = None) -> Tensor:
        """Normal values; std None: 1 / sqrt(inputs)."""
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        return torch.randn(*shape, generator=generator) * (
            shape[-1] ** -0.5 if std is None else std
        )

    def linear(self, name: str, out: int, inside: int, gain: float = 1.0) -> nn.Parameter:
        """A weight [out, in] of standard deviation gain / sqrt(in)."""
        return nn.Parameter(self.normal(name, out, inside, std=gain * inside**-0.5))


class Visible(NamedTuple):
    """Who may see whom: `mask` [R, 1, L, L] bool, or None for plain causal rows."""

    mask: Tensor | None

    @classmethod
    def of(cls, document_RL: Tensor) -> Visible:
        """Causal within each document; rows of one document need no mask."""
        if bool((document_RL == document_RL[:, :1]).all()):
            return cls(None)
        same = document_RL[:, None, :, None] == document_RL[:, None, None, :]
        length = document_RL.shape[1]
        return cls(same & torch.ones(length, length, dtype=torch.bool).tril())


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learnt scale."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)

    def published(self, name: str) -> Iterator[Named]:
        """Its tensors under published names."""
        yield Named(f"{name}.weight", self.weight)


def _rotated(x: Tensor, table_LD2: Tensor) -> Tensor:
    """Pairs (2i, 2i + 1) of the last dimension turned by their position; positions second last."""
    cos, sin = table_LD2[..., 0], table_LD2[..., 1]
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


class Attention(nn.Module):
    """Multi-head latent attention in its expanded form.

    Args:
        name: published prefix, "model.layers.3.self_attn".
        length: the longest row.
        gain: of the output projection's initial values.
    """

    table: Tensor

    def __init__(
        self, config: ModelConfig, name: str, length: int, precision: Precision, make: Maker,
        gain: float,
    ) -> None:  # fmt: skip
        super().__init__()
        c, self.config, self.products = config, config, precision.linear
        queries, eps = c.num_heads * c.qk_head_dim, c.norm_eps_latent
        if c.q_lora_rank:
            self.q_a_proj = make.linear(f"{name}.q_a", c.q_lora_rank, c.hidden_size)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank, eps)
            self.q_b_proj = make.linear(f"{name}.q_b", queries, c.q_lora_rank)
        else:
            self.q_proj = make.linear(f"{name}.q", queries, c.hidden_size)
        self.kv_a_proj = make.linear(f"{name}.kv_a", c.latent_dim, c.hidden_size)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, eps)
        wide = c.num_heads * (c.qk_nope_head_dim + c.v_head_dim)
        self.kv_b_proj = make.linear(f"{name}.kv_b", wide, c.kv_lora_rank)
        self.o_proj = make.linear(f"{name}.o", c.hidden_size, c.num_heads * c.v_head_dim, gain)
        self.register_buffer("table", torch.from_numpy(c.rope.table(length)), persistent=False)

    def forward(self, x_RLH: Tensor, visible: Visible) -> Tensor:
        c, products = self.config, self.products
        rows, length, _ = x_RLH.shape
        table = self.table[:length]
        q = self._queries(x_RLH).view(rows, length, c.num_heads, -1).transpose(1, 2)
        latent = linear(x_RLH, self.kv_a_proj, products)
        compressed, k_rope = latent.split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        kv = linear(self.kv_a_layernorm(compressed), self.kv_b_proj, products)
        kv = kv.view(rows, length, c.num_heads, -1).transpose(1, 2)
        k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], -1)
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        q = torch.cat((q_nope, _rotated(q_rope, table)), -1)
        k_rope = _rotated(k_rope[:, None], table).expand(-1, c.num_heads, -1, -1)
        out = F.scaled_dot_product_attention(
            q, torch.cat((k_nope, k_rope), -1), v, attn_mask=visible.mask,
            is_causal=visible.mask is None, scale=c.softmax_scale,
        )  # fmt: skip
        return linear(out.transpose(1, 2).reshape(rows, length, -1), self.o_proj, products)

    def _queries(self, x: Tensor) -> Tensor:
        if not self.config.q_lora_rank:
            return linear(x, self.q_proj, self.products)
        compressed = self.q_a_layernorm(linear(x, self.q_a_proj, self.products))
        return linear(compressed, self.q_b_proj, self.products)

    def published(self, name: str) -> Iterator[Named]:
        """Its tensors under published names."""
        if self.config.q_lora_rank:
            yield Named(f"{name}.q_a_proj.weight", self.q_a_proj)
            yield from self.q_a_layernorm.published(f"{name}.q_a_layernorm")
            yield Named(f"{name}.q_b_proj.weight", self.q_b_proj)
        else:
            yield Named(f"{name}.q_proj.weight", self.q_proj)
        yield Named(f"{name}.kv_a_proj_with_mqa.weight", self.kv_a_proj)
        yield from self.kv_a_layernorm.published(f"{name}.kv_a_layernorm")
        yield Named(f"{name}.kv_b_proj.weight", self.kv_b_proj)
        yield Named(f"{name}.o_proj.weight", self.o_proj)


class MLP(nn.Module):
    """SwiGLU of one or several experts: `gate_up` [G, 2I, H], `down` [G, H, I].

    Args:
        names: published prefix of each expert.
        width: I.
    """

    def __init__(
        self, config: ModelConfig, names: list[str], width: int, precision: Precision,
        make: Maker, gain: float,
    ) -> None:  # fmt: skip
        super().__init__()
        hidden, self.width, self.products = config.hidden_size, width, precision.linear
        gate_up = [make.normal(f"{name}.gate_up", 2 * width, hidden) for name in names]
        down = [make.normal(f"{n}.down", hidden, width, std=gain * width**-0.5) for n in names]
        self.gate_up = nn.Parameter(torch.stack(gate_up))
        self.down = nn.Parameter(torch.stack(down))

    def forward(self, x: Tensor, counts: list[int] | None = None) -> Tensor:
        """x [..., H]; with several experts x is [T, H], sorted, and counts[g] rows are g's."""
        flat = x.reshape(-1, x.shape[-1])
        out = swiglu(flat, self.gate_up, self.down, counts or (len(flat),), self.products)
        return out.view(x.shape)

    def published(self, names: list[str]) -> Iterator[Named]:
        """Its tensors under published names."""
        gate, up = slice(0, self.width), slice(self.width, None)
        for g, name in enumerate(names):
            yield Named(f"{name}.gate_proj.weight", self.gate_up, (g, gate))
            yield Named(f"{name}.up_proj.weight", self.gate_up, (g, up))
            yield Named(f"{name}.down_proj.weight", self.down, (g,))
