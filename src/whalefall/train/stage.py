"""Train room: a DeepSeek-V3 model cut into pipeline stages.

In: tokens (first stage) or the residual stream, and each token's document. Out: the residual
stream; at the last stage the losses. Each stage is a module for `pipeline.torch`.
Source: DeepSeek-V3 report, 2.1 and 2.2 (multi-token prediction), 3.2.1 (stages).

# R rows, L length, H hidden
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whalefall.ep.torch import Buffer
from whalefall.errors import ConfigError, UnsupportedError
from whalefall.model.config import ModelConfig
from whalefall.pipeline.planning import even_cut
from whalefall.train.experts import MoE
from whalefall.train.functions import cross_entropy, linear
from whalefall.train.layers import MLP, Attention, Maker, Named, RMSNorm, Visible
from whalefall.train.products import Precision

__all__ = ["Build", "Layer", "Scales", "Stage", "cut", "shifted_labels"]


@dataclass(frozen=True)
class Build:
    """What all stages of a model are made with.

    Attributes:
        config: of the model; V3's form (sigmoid gate with bias) or without experts.
        precision: of the products; shared, so that one call forgets all prepared weights.
        length: tokens of a row.
        make: of initial weights.
        buffer: of the expert-parallel group; None: all experts on each rank.
    """

    config: ModelConfig
    precision: Precision
    length: int
    make: Maker
    buffer: Buffer | None = None

    def __post_init__(self) -> None:
        c = self.config
        if c.num_experts and (c.scoring, c.topk_method) != ("sigmoid", "noaux_tc"):
            raise UnsupportedError(
                f"train: a gate of {c.scoring}/{c.topk_method}, wanted V3's sigmoid/noaux_tc"
            )
        if c.tie_word_embeddings or c.num_mtp_layers > 1:
            raise UnsupportedError(
                f"train: tied embeddings {c.tie_word_embeddings}, {c.num_mtp_layers} MTP layers; "
                "wanted an untied head and at most 1"
            )

    @property
    def gain(self) -> float:
        """Initial scale of what is added to the residual stream."""
        return float((2 * self.config.num_layers) ** -0.5)


@dataclass
class Scales:
    """What turns sums into a step's loss; the trainer sets it before each step.

    Attributes:
        main: 1 / labels of the main head in the whole step.
        mtp: weight of the MTP loss / its labels; 0: the MTP layer is left out.
        sums: "main" and "mtp", losses summed over labels since they were last cleared.
    """

    main: float = 1.0
    mtp: float = 0.0
    sums: dict[str, float] = field(default_factory=lambda: {"main": 0.0, "mtp": 0.0})


class Layer(nn.Module):
    """Attention, then an MLP or experts, each on the normed stream and added to it."""

    def __init__(self, build: Build, number: int) -> None:
        super().__init__()
        c, name = build.config, f"model.layers.{number}"
        shared = build.precision, build.make, build.gain
        self.name = name
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, f"{name}.self_attn", build.length, *shared)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp: MoE | MLP
        if c.is_moe(number):
            self.mlp = MoE(c, f"{name}.mlp", *shared, buffer=build.buffer)
        else:
            self.mlp = MLP(c, [f"{name}.mlp"], c.intermediate_size, *shared)

    def forward(self, x: Tensor, visible: Visible, valid: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), visible)
        inner = self.post_attention_layernorm(x)
        return x + (self.mlp(inner, valid) if isinstance(self.mlp, MoE) else self.mlp(inner))

    def published(self) -> Iterator[Named]:
        """Its tensors under published names."""
        yield from self.input_layernorm.published(f"{self.name}.input_layernorm")
        yield from self.self_attn.published(f"{self.name}.self_attn")
        yield from self.post_attention_layernorm.published(f"{self.name}.post_attention_layernorm")
        name = f"{self.name}.mlp"
        yield from self.mlp.published(name if isinstance(self.mlp, MoE) else [name])  # type: ignore[arg-type]


class MTP(nn.Module):
    """From h_i and token i + 1 to what predicts token i + 2; shares embedding and head."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        c = build.config
        self.name = f"model.layers.{c.num_layers}"
        self.products = build.precision.table
        self.enorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.hnorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.eh_proj = build.make.linear(f"{self.name}.eh", c.hidden_size, 2 * c.hidden_size)
        self.layer = Layer(build, c.num_layers)
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, h: Tensor, embedded_next: Tensor, visible: Visible, valid: Tensor) -> Tensor:
        joined = torch.cat((self.enorm(embedded_next), self.hnorm(h)), -1)
        x = linear(joined, self.eh_proj, self.products)
        return self.norm(self.layer(x, visible, valid))

    def published(self) -> Iterator[Named]:
        """Its tensors under published names, without those that it shares."""
        yield from self.enorm.published(f"{self.name}.enorm")
        yield from self.hnorm.published(f"{self.name}.hnorm")
        yield Named(f"{self.name}.eh_proj.weight", self.eh_proj)
        yield from self.layer.published()
        yield from self.norm.published(f"{self.name}.shared_head.norm")


def shifted_labels(tokens_RL: Tensor, document_RL: Tensor, learnt_RL: Tensor, by: int) -> Tensor:
    """The token `by` places on, −1 where it is not to be learnt or is of another document."""
    labels = torch.full_like(tokens_RL, -1)
    good = learnt_RL[:, by:].bool() & (document_RL[:, by:] == document_RL[:, :-by])
    labels[:, :-by] = torch.where(good, tokens_RL[:, by:], -1)
    return labels


class Stage(nn.Module):
    """Some consecutive layers; the first stage embeds, the last has head, MTP layer and losses.

    Args:
        layers: of all stages, as `cut` gives them.
        number: of this stage.
        scales: shared by a rank's stages.
    """

    def __init__(self, build: Build, layers: list[range], number: int, scales: Scales) -> None:
        super().__init__()
        self.number = number
        first, last = number == 0, number == len(layers) - 1
        c, make = build.config, build.make
        self.scales, self.products = scales, build.precision.table
        self.layers = nn.ModuleList(Layer(build, layer) for layer in layers[number])
        self.is_first, self.is_last = first, last
        self.mtp = MTP(build) if last and c.num_mtp_layers else None
        self.embed_tokens: nn.Parameter | None = None
        if first or self.mtp is not None:  # at the last stage a copy: their gradients are added up
            table = make.normal("embed", c.vocab_size, c.hidden_size, std=0.1)
            self.embed_tokens = nn.Parameter(table)
        if last:
            self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
            self.lm_head = make.linear("lm_head", c.vocab_size, c.hidden_size)
        self.watched: list[tuple[str, Tensor]] = []

    def forward(self, x: Tensor, document_RL: Tensor) -> tuple[Tensor, Tensor]:
        """x: tokens [R, L] int64 at the first stage, else the stream [R, L, H].

        document: [R, L] floats, −1 for padding.
        Returns: the stream after these layers, and `document` for the next stage.
        """
        if self.is_first:
            x = F.embedding(x, self.embed_tokens)
        visible, valid = Visible.of(document_RL.detach()), document_RL.detach() >= 0
        for layer in self.layers:
            x = layer(x, visible, valid)
            self.watch(f"output of {layer.name}", x)
        return x, document_RL.detach()

    def watch(self, name: str, x: Tensor) -> None:
        """Remember a sum that is NaN or infinite where x is: see `broken`."""
        self.watched.append((name, x.detach().sum()))

    def broken(self) -> str | None:
        """The first watched tensor since the last call that was not finite."""
        found = [name for name, total in self.watched if not torch.isfinite(total)]
        self.watched.clear()
        return found[0] if found else None

    def criterion(
        self, x: Tensor, document_RL: Tensor, tokens_RL: Tensor, learnt_RL: Tensor
    ) -> Tensor:
        """A chunk's share of the step's loss, from the last stage's outputs and its labels."""
        h = self.norm(x)
        labels = shifted_labels(tokens_RL, document_RL, learnt_RL, 1).flatten()
        main = cross_entropy(h.flatten(0, 1), self.lm_head, labels, self.products)
        self.watch("loss of the main head", main)
        self.scales.sums["main"] += float(main.detach())
        loss = main * self.scales.main
        if self.mtp is not None and self.scales.mtp:
            ahead = self._mtp(h, document_RL, tokens_RL, learnt_RL)
            self.scales.sums["mtp"] += float(ahead.detach())
            loss = loss + ahead * self.scales.mtp
        return loss

    def _mtp(self, h: Tensor, document: Tensor, tokens: Tensor, learnt: Tensor) -> Tensor:
        assert self.mtp is not None
        embedded = F.embedding(tokens.roll(-1, 1), self.embed_tokens)
        out = self.mtp(h, embedded, Visible.of(document), document >= 0)
        labels = shifted_labels(tokens, document, learnt, 2).flatten()
        loss = cross_entropy(out.flatten(0, 1), self.lm_head, labels, self.products)
        self.watch("loss of the MTP layer", loss)
        return loss

    def moe_layers(self) -> list[tuple[str, MoE]]:
        """Name and experts of every layer that has them, the MTP layer's last."""
        every = [*self.layers, *([self.mtp.layer] if self.mtp is not None else [])]
        return [(layer.name, layer.mlp) for layer in every if isinstance(layer.mlp, MoE)]

    def published(self) -> Iterator[Named]:
        """Its parameters under published names."""
        if self.embed_tokens is not None:
            yield Named("model.embed_tokens.weight", self.embed_tokens)
        for layer in self.layers:
            yield from layer.published()
        if self.is_last:
            yield from self.norm.published("model.norm")
            yield Named("lm_head.weight", self.lm_head)
        if self.mtp is not None:
            yield from self.mtp.published()

    def biases(self) -> Iterator[tuple[str, Tensor]]:
        """Every gate's bias under its published name."""
        for name, moe in self.moe_layers():
            yield f"{name}.mlp.gate.e_score_correction_bias", moe.bias


def cut(config: ModelConfig, num_stages: int) -> list[range]:
    """Layers of each stage, costs as even as whole layers allow.

    The head, and the MTP layer with it, count for what they compute.
    Raises: ConfigError for more stages than layers.
    """
    if config.num_layers < num_stages:
        raise ConfigError(
            f"train: {config.num_layers} layers cannot make {num_stages} stages; "
            "use fewer pipeline ranks"
        )
    c = config
    attention = c.hidden_size * (c.num_heads * (c.qk_head_dim + c.v_head_dim) + c.latent_dim)
    attention += c.kv_lora_rank * c.num_heads * (c.qk_nope_head_dim + c.v_head_dim)

    def cost(layer: int) -> float:
        width = c.intermediate_size
        if c.is_moe(layer):
            width = c.moe_intermediate_size * (c.num_experts_per_tok + c.num_shared_experts)
        return float(attention + 3 * c.hidden_size * width)

    costs = [cost(layer) for layer in range(c.num_layers)]
    costs[-1] += (1 + c.num_mtp_layers) * c.vocab_size * c.hidden_size
    if c.num_mtp_layers:
        costs[-1] += cost(c.num_layers) + 2 * c.hidden_size**2
    ranges, start = [], 0
    for count in even_cut(costs, num_stages):
        ranges.append(range(start, start + count))
        start += count
    return ranges
