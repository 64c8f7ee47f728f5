"""Compat room: what `import eplb` finds.

The helpers give the published algorithm's own answers; `rebalance_experts` places at least as well.
Source: EPLB d52c72d.
"""

from __future__ import annotations

import torch

from whalefall.eplb import published
from whalefall.eplb.placement import rebalance_experts

__all__ = ["rebalance_experts"]

Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def balanced_packing(weight: torch.Tensor, num_packs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `whalefall.eplb.published.balanced_packing`, on tensors."""
    pack, rank = published.balanced_packing(weight.float().cpu().numpy(), num_packs)
    return torch.from_numpy(pack), torch.from_numpy(rank)


def replicate_experts(weight: torch.Tensor, num_phy: int) -> Three:
    """As `whalefall.eplb.published.replicate_experts`, on tensors."""
    slots, rank, count = published.replicate_experts(weight.float().cpu().numpy(), num_phy)
    return torch.from_numpy(slots), torch.from_numpy(rank), torch.from_numpy(count)


def rebalance_experts_hierarchical(
    weight: torch.Tensor, num_physical_experts: int, num_groups: int, num_nodes: int, num_gpus: int
) -> Three:
    """As `whalefall.eplb.published.rebalance_experts_hierarchical`, on tensors."""
    slots, rank, count = published.rebalance_experts_hierarchical(
        weight.float().cpu().numpy(), num_physical_experts, num_groups, num_nodes, num_gpus
    )
    return torch.from_numpy(slots), torch.from_numpy(rank), torch.from_numpy(count)
