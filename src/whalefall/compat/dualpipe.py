"""Compat room: what `import dualpipe` and its modules `comm`, `utils`, … find.

Unlike the original's, `__all__` holds names, so that `from dualpipe import *` works.
Source: DualPipe 3da1bbe.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from whalefall.pipeline.torch import (
    DualPipe,
    DualPipeV,
    WeightGradStore,
    set_p2p_tensor_dtype,
    set_p2p_tensor_shapes,
)
from whalefall.pipeline.torch.p2p import settings

__all__ = [
    "DualPipe",
    "DualPipeV",
    "WeightGradStore",
    "set_p2p_tensor_dtype",
    "set_p2p_tensor_shapes",
]
__version__ = "1.0.0"


def build_from_tensor_shapes() -> list[torch.Tensor]:
    """Empty tensors of the agreed shapes, to receive into."""
    shapes, dtype = settings()
    return [torch.empty(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def append_irecv(ops: list[dist.P2POp], src: int, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """Append receives from group rank `src`; returns the tensors they fill."""
    tensors = build_from_tensor_shapes()
    peer = dist.get_global_rank(group, src)
    ops.extend(dist.P2POp(dist.irecv, tensor.detach(), peer, group) for tensor in tensors)
    return tensors


def append_isend(
    ops: list[dist.P2POp],
    tensors: Sequence[torch.Tensor | None],
    dst: int,
    group: dist.ProcessGroup,
) -> None:
    """Append a send to group rank `dst` for each tensor that is not None."""
    peer = dist.get_global_rank(group, dst)
    ops.extend(dist.P2POp(dist.isend, t.detach(), peer, group) for t in tensors if t is not None)


def run_backward(
    tensors: Sequence[torch.Tensor], grad_tensors: Sequence[torch.Tensor | None]
) -> None:
    """Backward from several tensors at once; the graph is freed."""
    torch.autograd.backward(tuple(tensors), tuple(grad_tensors))


def chunk_tensor(x: torch.Tensor | None, chunks: int, dim: int) -> Sequence[Any]:
    """A tensor in `chunks` parts; None gives as many Nones."""
    return [None] * chunks if x is None else x.tensor_split(chunks, dim=dim)


def cat_tensor(x: Sequence[torch.Tensor | None], dim: int) -> torch.Tensor | None:
    """Parts joined; None if all are, the part itself if it is alone."""
    present = [part for part in x if part is not None]
    if not present:
        return None
    return present[0] if len(x) == 1 else torch.cat(present, dim=dim)


def scatter(inputs: Sequence[torch.Tensor | None], chunks: int, dim: int) -> list[tuple[Any, ...]]:
    """One tuple of parts per chunk; empty tuples without inputs."""
    if not inputs:
        return [()] * chunks
    return list(zip(*(chunk_tensor(x, chunks, dim) for x in inputs), strict=True))


def gather(micro_outputs: Sequence[Sequence[Any]], dim: int) -> tuple[torch.Tensor | None, ...]:
    """One joined tensor per output position."""
    return tuple(cat_tensor(column, dim) for column in zip(*micro_outputs, strict=True))
