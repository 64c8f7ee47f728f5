"""Train room: routed experts, balanced by a bias instead of an auxiliary loss.

In: normed tokens [R, L, H]. Out: what their experts and the shared expert make of them. With an
`ep.Buffer` the experts are spread over the ranks of its group and tokens travel in BF16.
Source: DeepSeek-V3 report, 2.1.2: sigmoid gate, group limit, bias updates, sequence-wise loss.

# R rows, L length, H hidden, T = R·L tokens, E experts, K experts a token
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whalefall.ep.torch import Buffer, combine, dispatch
from whalefall.errors import ConfigError
from whalefall.model.config import ModelConfig
from whalefall.train.functions import with_loss
from whalefall.train.layers import MLP, Maker, Named
from whalefall.train.products import Precision

__all__ = ["MoE", "moved_bias", "select", "sequence_loss"]


def select(scores_TE: Tensor, bias_E: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """The experts of each token, chosen by score + bias within the best groups.

    Returns: ids [T, K] int64; weights [T, K] of the scores alone, normed and scaled.
    """
    chosen_by = scores_TE.detach() + bias_E
    if config.n_group > 1:
        groups = chosen_by.view(len(chosen_by), config.n_group, -1)
        best = groups.topk(2, dim=-1).values.sum(-1).topk(config.topk_group, dim=-1).indices
        allowed = torch.zeros(groups.shape[:2], dtype=torch.bool).scatter_(1, best, True)
        chosen_by = groups.masked_fill(~allowed[:, :, None], float("-inf")).flatten(1)
    topk_idx = chosen_by.topk(config.num_experts_per_tok, dim=-1).indices
    weight = scores_TE.gather(1, topk_idx)
    if config.norm_topk_prob:
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
    return topk_idx, weight * config.routed_scaling_factor


def sequence_loss(scores_RLE: Tensor, topk_idx_RLK: Tensor, valid_RL: Tensor) -> Tensor:
    """Σ over rows of Σ_e f_e·P_e: how unevenly each row's tokens use the experts; 1 a row if even.

    f_e: the share of the row's choices that are e, times E; P_e: e's mean share of a token's score.
    """
    rows, _, experts = scores_RLE.shape
    valid = valid_RL.to(scores_RLE.dtype)
    tokens = valid.sum(1).clamp(min=1.0)
    share = scores_RLE / (scores_RLE.sum(-1, keepdim=True) + 1e-20)
    mean_RE = torch.einsum("rle,rl->re", share, valid) / tokens[:, None]
    k = topk_idx_RLK.shape[-1]
    counts_RE = scores_RLE.new_zeros(rows, experts).scatter_add_(
        1, topk_idx_RLK.flatten(1), valid.repeat_interleave(k, dim=1)
    )
    return (counts_RE * experts / (k * tokens[:, None]) * mean_RE).sum()


def moved_bias(bias: Tensor, load: Tensor, speed: float) -> Tensor:
    """The bias after a step: down where an expert had more than the mean load, up where less."""
    return bias + speed * (load.mean(-1, keepdim=True) - load).sign()


def _padded(counts: list[int], multiple: int) -> tuple[Tensor | None, list[int]]:
    """Where sorted rows lie if each group is filled up to a multiple, and the groups' sizes then.

    The place is None where nothing is filled up.
    """
    if multiple == 1:
        return None, counts
    padded = [-(-count // multiple) * multiple for count in counts]
    gaps = torch.tensor([p - c for p, c in zip(padded, counts, strict=True)])
    before = gaps.cumsum(0) - gaps  # empty slots before each group
    place = torch.arange(sum(counts)) + before.repeat_interleave(torch.tensor(counts))
    return place, padded


class MoE(nn.Module):
    """Routed experts and the shared one.

    Args:
        name: published prefix, "model.layers.3.mlp".
        buffer: of the expert-parallel group; None: all experts are here.
    Attributes:
        bias: [E], added to the scores for the choice alone; moved by `moved_bias`.
        load: [E] tokens that chose each expert since it was last cleared.
        sequence_weight: what a row's `sequence_loss` counts in the step's loss; 0: not computed.
        sequence_sum: that loss, added up since it was last cleared (for reports).
    """

    bias: Tensor
    load: Tensor

    def __init__(
        self, config: ModelConfig, name: str, precision: Precision, make: Maker, gain: float,
        buffer: Buffer | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config, self.buffer = config, buffer
        experts, ranks = config.num_experts, buffer.group_size if buffer is not None else 1
        if experts % ranks:
            raise ConfigError(f"train: {experts} experts on {ranks} ranks, wanted a multiple")
        first = (buffer.rank if buffer is not None else 0) * (experts // ranks)
        self.local = range(first, first + experts // ranks)
        self.gate = make.linear(f"{name}.gate", experts, config.hidden_size)
        width, names = config.moe_intermediate_size, self._names(name)
        self.experts = MLP(config, names, width, precision, make, gain)
        self.shared = None
        if config.num_shared_experts:
            wide = width * config.num_shared_experts
            self.shared = MLP(config, [f"{name}.shared_experts"], wide, precision, make, gain)
        self.register_buffer("bias", torch.zeros(experts))
        self.register_buffer("load", torch.zeros(experts), persistent=False)
        self.sequence_weight, self.sequence_sum = 0.0, 0.0

    def _names(self, name: str) -> list[str]:
        return [f"{name}.experts.{e}" for e in self.local]

    def forward(self, x_RLH: Tensor, valid_RL: Tensor) -> Tensor:
        """valid: false where a token is padding, which counts for no balance."""
        rows, length, hidden = x_RLH.shape
        x = x_RLH.reshape(-1, hidden)
        scores = F.linear(x, self.gate).sigmoid()
        topk_idx, weight = select(scores, self.bias, self.config)
        if torch.is_grad_enabled():
            x = self._counted(x, scores, topk_idx, valid_RL)
        routed = self._here(x, topk_idx, weight) if self.buffer is None else self._spread(
            x, topk_idx, weight, self.buffer
        )  # fmt: skip
        if self.shared is not None:
            routed = routed + self.shared(x)
        return routed.view(rows, length, hidden)

    def _counted(self, x: Tensor, scores: Tensor, topk_idx: Tensor, valid_RL: Tensor) -> Tensor:
        chosen = topk_idx[valid_RL.flatten()]
        self.load += chosen.flatten().bincount(minlength=len(self.load))
        if not self.sequence_weight:
            return x
        shape = valid_RL.shape
        loss = sequence_loss(scores.view(*shape, -1), topk_idx.view(*shape, -1), valid_RL)
        self.sequence_sum += float(loss.detach())
        return with_loss(x, loss * self.sequence_weight)

    def _here(self, x: Tensor, expert_idx: Tensor, weight: Tensor) -> Tensor:
        """Local experts on x [N, H]; ids are local, −1: elsewhere. Their weighted sum, [N, H]."""
        flat = expert_idx.flatten()
        order = flat.argsort(stable=True)
        order = order[int((flat < 0).sum()) :]
        counts = flat[order].bincount(minlength=len(self.local)).tolist()
        row, share = order // expert_idx.shape[1], weight.flatten().index_select(0, order)
        place, padded = _padded(counts, self.experts.products.multiple)
        if place is None:
            rows = x.index_select(0, row)
        else:  # slots in between take the row of zeros
            slots = torch.full((sum(padded),), len(x)).index_copy_(0, place, row)
            rows = F.pad(x, (0, 0, 0, 1)).index_select(0, slots)
        made = self.experts(rows, padded)
        made = made if place is None else made.index_select(0, place)
        return torch.zeros_like(x, dtype=made.dtype).index_add(0, row, made * share[:, None])

    def _spread(self, x: Tensor, topk_idx: Tensor, weight: Tensor, buffer: Buffer) -> Tensor:
        experts = self.config.num_experts
        rows, ids, weights, _, handle = dispatch(buffer, x.bfloat16(), topk_idx, weight, experts)
        made = self._here(rows.float(), ids, weights)
        return combine(buffer, made.bfloat16(), handle).float()

    def published(self, name: str) -> Iterator[Named]:
        """Its tensors under published names; the bias is `bias_name`'s."""
        yield Named(f"{name}.gate.weight", self.gate)
        yield from self.experts.published(self._names(name))
        if self.shared is not None:
            yield from self.shared.published([f"{name}.shared_experts"])
