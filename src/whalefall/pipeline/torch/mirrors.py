"""Pipeline room: the gradients of DualPipe's two copies of each stage, added up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from whalefall.errors import RankFailure, ShapeError

if TYPE_CHECKING:
    from whalefall.pipeline.torch.dual import DualPipe

__all__ = ["sync_mirrors"]


def sync_mirrors(pipe: DualPipe) -> None:
    """Add up the gradients of each stage's two copies, in one exchange with the mirror rank.

    Both ranks add in the same order, so both get the same bits. A gradient that is None counts as
    zero, and stays None where both are.

    Raises: ShapeError if the copies differ in size; RankFailure if the mirror rank left.
    """
    mirror = pipe.num_ranks - 1 - pipe.rank
    peer = dist.get_global_rank(pipe.group, pipe.link.group_rank[mirror])
    own = [_flat(module) for module in pipe.module]
    sizes = torch.tensor([len(flat) for flat in own])
    theirs = torch.empty_like(sizes)
    _exchange(pipe, [sizes], [theirs], peer, mirror)
    if sizes.tolist() != theirs.tolist()[::-1]:
        raise ShapeError(
            f"pipeline: rank {pipe.rank} holds stages of {sizes.tolist()} gradient values, its "
            f"mirror rank {mirror} of {theirs.tolist()}; stage r must mirror stage r"
        )
    # the mirror's second module is this rank's first stage
    received = [torch.empty_like(flat) for flat in own]
    _exchange(pipe, own, received[::-1], peer, mirror)
    for module, mine, other in zip(pipe.module, own, received, strict=True):
        total = mine + other if pipe.rank < mirror else other + mine
        _unflat(module, total)


def _exchange(
    pipe: DualPipe, out: list[torch.Tensor], into: list[torch.Tensor], peer: int, mirror: int
) -> None:
    works = []
    for tag, (mine, theirs) in enumerate(zip(out, into, strict=True)):
        works.append(dist.irecv(theirs, peer, pipe.group, tag))
        works.append(dist.isend(mine, peer, pipe.group, tag))
    try:
        for work in works:
            if work is not None:
                work.wait()
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        raise RankFailure(
            f"pipeline: mirror rank {mirror} failed or left: {first}", rank=mirror
        ) from error


def _flat(module: nn.Module) -> torch.Tensor:
    """Whether each gradient is there, then all gradients, as one vector."""
    parameters = list(module.parameters())
    there = torch.tensor([0.0 if p.grad is None else 1.0 for p in parameters])
    grads = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
    return torch.cat([there.to(grads[0].dtype), *grads]) if grads else there


def _unflat(module: nn.Module, total: torch.Tensor) -> None:
    parameters = list(module.parameters())
    place = len(parameters)
    for number, parameter in enumerate(parameters):
        size = parameter.numel()
        if total[number] > 0:
            parameter.grad = total[place : place + size].view_as(parameter).clone()
        place += size
