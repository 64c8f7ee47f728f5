"""Pipeline room: `DualPipe`, `DualPipeV`, and any other schedule, as torch modules.

In: this rank's stages; per step inputs, labels, a criterion. Out: losses, outputs, gradients.
Source: DualPipe (`DualPipe`, `DualPipeV`); the caller sums mirror stages: `sync_mirrors`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from whalefall.errors import ConfigError, ShapeError
from whalefall.pipeline import schedules
from whalefall.pipeline.actions import Schedule
from whalefall.pipeline.executor import execute
from whalefall.pipeline.torch.p2p import Link, settings
from whalefall.pipeline.torch.store import WeightGradStore
from whalefall.pipeline.torch.worker import StepWorker

__all__ = ["DualPipe", "DualPipeV", "Pipeline"]

make = functools.lru_cache(maxsize=64)(schedules.make)
forward_only = functools.lru_cache(maxsize=64)(schedules.forward_only)


class Pipeline(nn.Module):
    """A model cut into stages over the ranks of a group, trained by a schedule.

    Args:
        modules: this rank's stages, in the order of `Schedule.stages_of(rank)`.
        schedule: a name of `schedules.NAMES`.
        batch_dim: the dimension along which inputs and labels are cut into chunks.
        process_group: the pipeline's ranks; None: the default group.
        rank_mapping: pipeline rank of each group rank; None: the same.
    """

    def __init__(
        self, modules: Sequence[nn.Module], schedule: str, batch_dim: int = 0,
        process_group: dist.ProcessGroup | None = None, rank_mapping: list[int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.module = nn.ModuleList(modules)
        self.schedule_name = schedule
        self.batch_dim = batch_dim
        self.link = Link(process_group, rank_mapping)
        self.group = self.link.group
        self.num_ranks = self.link.size
        self.rank = self.link.rank
        self.is_first_rank = self.rank == 0
        self.is_last_rank = self.rank == self.num_ranks - 1
        places = self.link.group_rank
        self.prev_rank = None if self.is_first_rank else places[self.rank - 1]
        self.next_rank = None if self.is_last_rank else places[self.rank + 1]

    def schedule(self, num_chunks: int) -> Schedule:
        """The schedule of a step with so many chunks; ConfigError where there is none."""
        per_rank = len(self.module)
        return make(self.schedule_name, self.num_ranks, num_chunks, stages_per_rank=per_rank)

    def step(
        self, *inputs: torch.Tensor | None, num_chunks: int = 0,
        criterion: Callable[..., torch.Tensor] | None = None,
        labels: Sequence[torch.Tensor | None] = (), return_outputs: bool = False,
    ) -> tuple[torch.Tensor | None, Any]:  # fmt: skip
        """Run one step: forward and backward, or forward alone under `torch.no_grad()`.

        Args:
            inputs: on ranks where chunks enter; None or nothing elsewhere.
            num_chunks: micro-batches, all directions together.
            criterion: (*outputs, *labels) → a scalar, on ranks where chunks end.
            labels: on ranks where chunks end.
            return_outputs: give back the last stage's outputs, too.
        Returns: (loss, outputs) on ranks where chunks end: loss [their chunks], one value each,
            neither averaged nor scaled; outputs joined along `batch_dim`, a tuple if several, None
            unless asked for. (None, None) elsewhere. Gradients add up in the parameters.
        Raises: ConfigError, ShapeError; RankFailure naming a rank that left.
        """
        settings()
        schedule = self.schedule(num_chunks)
        held = schedule.stages_of(self.rank)
        if len(held) != len(self.module):
            raise ConfigError(
                f"pipeline: {schedule.name} puts {len(held)} stages on a rank, got "
                f"{len(self.module)} modules"
            )
        grad = torch.is_grad_enabled()
        share = num_chunks // len(schedule.routes)
        enter = _chunks_of(schedule, 0, self.rank, share)
        end = _chunks_of(schedule, -1, self.rank, share)
        if grad and end and criterion is None:
            raise ConfigError(
                f"pipeline: rank {self.rank} ends chunks and needs a criterion; or torch.no_grad()"
            )
        worker = StepWorker(
            schedule, dict(zip(held, self.module, strict=True)), self.link,
            self._cut(inputs, enter, "inputs"), self._cut(labels, end, "labels"),
            criterion if end else None, return_outputs,
        )  # fmt: skip
        WeightGradStore.clear()
        chosen = schedule if grad else forward_only(schedule)
        execute(chosen.ranks[self.rank], worker)
        WeightGradStore.clear()
        return self._results(worker, end)

    def _cut(
        self, tensors: Sequence[torch.Tensor | None], chunks: range, what: str
    ) -> dict[int, tuple[Any, ...]]:
        """chunk → its part of each tensor; a None stays None."""
        if not chunks:
            return {}
        columns: list[Sequence[Any]] = []
        for tensor in tensors:
            if tensor is None:
                columns.append([None] * len(chunks))
                continue
            size = tensor.shape[self.batch_dim]
            if size % len(chunks):
                raise ShapeError(
                    f"pipeline: {what} have {size} rows in dimension {self.batch_dim}; rank "
                    f"{self.rank} cuts them into {len(chunks)} equal chunks"
                )
            columns.append(tensor.tensor_split(len(chunks), dim=self.batch_dim))
        return {chunk: tuple(column[n] for column in columns) for n, chunk in enumerate(chunks)}

    def _results(self, worker: StepWorker, end: range) -> tuple[torch.Tensor | None, Any]:
        loss = torch.stack([worker.losses[c] for c in end]) if worker.losses else None
        if not worker.outputs:
            return loss, None
        columns = zip(*(worker.outputs[chunk] for chunk in end), strict=True)
        joined = tuple(torch.cat(column, dim=self.batch_dim) for column in columns)
        return loss, joined[0] if len(joined) == 1 else joined


def _chunks_of(schedule: Schedule, place: int, rank: int, share: int) -> range:
    """The chunks whose first (0) or last (−1) stage is on a rank."""
    for number, route in enumerate(schedule.routes):
        if route[place] == rank:
            return range(number * share, (number + 1) * share)
    return range(0)


class DualPipe(Pipeline):
    """Bidirectional pipeline: rank r of P holds stage r and its mirror P − 1 − r.

    P is even, chunks are even and at least 2P. Half of them enter at each end; the losses and
    outputs of one end's inputs, and the labels for them, are the other end's. Each stage lives on
    two ranks: `sync_mirrors` adds their gradients up.

    Args:
        modules: (stage r, stage P − 1 − r).
        batch_dim, process_group, rank_mapping: as `Pipeline`.
    Source: DualPipe `DualPipe`.
    """

    def __init__(
        self, modules: tuple[nn.Module, nn.Module], batch_dim: int = 0,
        process_group: dist.ProcessGroup | None = None, rank_mapping: list[int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(modules, "dualpipe", batch_dim, process_group, rank_mapping)
        if self.num_ranks % 2:
            raise ConfigError(f"DualPipe needs an even number of ranks, not {self.num_ranks}")
        self.first_rank, self.last_rank = self.link.group_rank[0], self.link.group_rank[-1]
        half = self.num_ranks // 2
        self.is_in_second_half = self.rank >= half
        self.is_middle_rank = self.rank in (half - 1, half)
        self.overlapped_forward_backward = _has_hook(modules)

    def sync_mirrors(self) -> None:
        """Add up the gradients of each stage's two copies, on both ranks, with the same bits."""
        from whalefall.pipeline.torch.mirrors import sync_mirrors

        sync_mirrors(self)


class DualPipeV(Pipeline):
    """DualPipe folded into a V: rank r of P holds stages r and 2P − 1 − r, one copy of each.

    Any P; at least 2P chunks. Inputs, labels, losses and outputs are all rank 0's.

    Args:
        modules: (stage r, stage 2P − 1 − r).
        batch_dim, process_group, rank_mapping: as `Pipeline`.
    Source: DualPipe `DualPipeV`.
    """

    def __init__(
        self, modules: tuple[nn.Module, nn.Module], batch_dim: int = 0,
        process_group: dist.ProcessGroup | None = None, rank_mapping: list[int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(modules, "dualpipev", batch_dim, process_group, rank_mapping)
        self.overlapped_forward_backward = _has_hook(modules)


def _has_hook(modules: Sequence[nn.Module]) -> bool:
    """Whether both stages have the very same type, with the hook."""
    first, second = modules
    return type(first) is type(second) and hasattr(type(first), "overlapped_forward_backward")
