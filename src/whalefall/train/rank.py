"""Train room: what one rank holds and does in a step.

In: a recipe and this rank's place. Out: stages, optimizer, steps whose numbers do not depend on the
layout of ranks (but for rounding). `trainer.py` is the loop around it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from whalefall.ep.torch import Buffer
from whalefall.errors import WhalefallError
from whalefall.pipeline.torch import (
    DualPipe,
    DualPipeV,
    Pipeline,
    set_p2p_tensor_dtype,
    set_p2p_tensor_shapes,
    sync_mirrors,
)
from whalefall.train.data import Batch, Rows
from whalefall.train.experts import MoE, moved_bias
from whalefall.train.layers import Maker, Named
from whalefall.train.layout import Groups
from whalefall.train.optimizer import Flat, Optimizer
from whalefall.train.products import Precision
from whalefall.train.recipe import Recipe
from whalefall.train.stage import Build, Scales, Stage, cut, shifted_labels

__all__ = ["DivergedError", "Rank", "Report"]

EP_BUFFER_BYTES = 64 << 20


class DivergedError(WhalefallError, ArithmeticError):
    """A loss, gradient or activation became NaN or infinite; the run has stopped."""


@dataclass(frozen=True)
class Report:
    """One step's numbers, the same on every rank.

    Attributes:
        loss, mtp: mean cross entropy a label of the main head, of the MTP layer (None: left out).
        norm: of all gradients together, before clipping.
        balance: mean, over MoE layers, of the busiest expert's load / the mean load.
        worst: the largest of these.
        sequence: mean sequence-wise loss of a row and layer (1: even).
        tokens: tokens of the step, padding included.
    """

    step: int
    loss: float
    mtp: float | None
    norm: float
    balance: float
    worst: float
    sequence: float
    tokens: int


class Rank:
    """One process of a run; the default process group must be there.

    Args:
        recipe: of the run.
    Attributes:
        stages: the modules held here, in the pipeline's order.
        step: optimizer steps done.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.config = recipe, recipe.config
        parallel = recipe.parallel
        self.groups = Groups.make(parallel)
        self.rows = Rows(recipe)
        self.shard = self.groups.place.shard(parallel)
        self.precision = Precision(recipe.run.precision)
        self.scales = Scales()
        buffer = None
        if parallel.expert > 1:
            buffer = Buffer(self.groups.expert, EP_BUFFER_BYTES)
        self.build = Build(
            self.config, self.precision, recipe.data.length, Maker(recipe.run.seed), buffer
        )
        self.stages = self._stages()
        self.pipe = self._pipe()
        self.optimizer = self._optimizer()
        self.moe_names = [
            f"model.layers.{n}" for n in range(self.config.num_layers + self.config.num_mtp_layers)
            if self.config.is_moe(n)
        ]  # fmt: skip
        self.step = 0

    # ---- what is held

    def _stages(self) -> list[Stage]:
        parallel, rank = self.recipe.parallel, self.groups.place.pipeline
        ranks = parallel.pipeline
        two = parallel.schedule in ("dualpipe", "dualpipev")
        total = 2 * ranks if parallel.schedule == "dualpipev" else ranks
        numbers = [rank, total - 1 - rank] if two else [rank]
        layers = cut(self.config, total)
        return [Stage(self.build, layers, n, self.scales) for n in numbers]

    def _pipe(self) -> Pipeline:
        parallel = self.recipe.parallel
        rows = self.recipe.rows // (parallel.shards * parallel.chunks)
        stream = (rows, self.recipe.data.length)
        set_p2p_tensor_shapes([(*stream, self.config.hidden_size), stream])
        set_p2p_tensor_dtype(torch.float32)
        group = self.groups.pipeline
        if parallel.schedule == "dualpipe":
            return DualPipe((self.stages[0], self.stages[1]), process_group=group)
        if parallel.schedule == "dualpipev":
            return DualPipeV((self.stages[0], self.stages[1]), process_group=group)
        return Pipeline(self.stages, parallel.schedule, process_group=group)

    def _optimizer(self) -> Optimizer:
        """Buffers by how many ranks hold the same values; a second embedding counts on none."""
        parallel = self.recipe.parallel
        mirrors = 2 if parallel.schedule == "dualpipe" else 1
        shared = parallel.shards * mirrors
        own = [p for s in self.stages for p in _experts(s)]
        seconds = [s.embed_tokens for s in self.stages if not s.is_first]
        second = [p for p in seconds if p is not None]
        known = {id(p) for p in [*own, *second]}
        rest = [p for s in self.stages for p in s.parameters() if id(p) not in known]
        self.dense = [
            Flat.of([p for p in rest if p.dim() > 1], shared),
            Flat.of(second, 1 << 62),
        ]
        self.vectors = [Flat.of([p for p in rest if p.dim() == 1], shared)]
        self.expert = [Flat.of(own, parallel.data * mirrors)]
        return Optimizer([*self.dense, *self.expert], self.vectors, self.recipe.optimizer)

    def named(self) -> Iterator[Named]:
        """The published parameters held here."""
        for stage in self.stages:
            yield from stage.published()

    def state(self) -> dict[str, Tensor]:
        """Every tensor of a checkpoint that this rank holds, as views to save or to load into."""
        kinds = self.optimizer.state_of()
        tensors: dict[str, Tensor] = {}
        for named in self.named():
            tensors.setdefault(named.name, named.of(named.parameter.detach()))
            for kind, views in kinds.items():
                tensors.setdefault(f"{kind}.{named.name}", named.of(views[named.parameter]))
        for stage in self.stages:
            tensors.update(stage.biases())
        return tensors

    def loaded(self, step: int) -> None:
        """Go on after `state`'s tensors were filled with those of a checkpoint at `step`.

        What is held twice here was filled once.
        """
        self.step = step
        self.optimizer.set_steps(step)
        kinds = self.optimizer.state_of()
        first: dict[str, Named] = {}
        for named in self.named():
            source = first.setdefault(named.name, named)
            if source is not named:
                named.of(named.parameter.data).copy_(source.of(source.parameter.data))
                for views in kinds.values():
                    named.of(views[named.parameter]).copy_(source.of(views[source.parameter]))
        self.precision.forget()

    # ---- a step

    def train_step(self) -> Report:
        """Forward, backward, one optimizer step; collective over all ranks.

        Raises: DivergedError on every rank if something was not finite on any; the weights are then
            still those of before the step.
        """
        batch = self.rows.batch(self.step, self.shard)
        totals = self._label_counts(batch)
        setting, progress = self.recipe.loss, self.step / self.recipe.run.steps
        use_mtp = self.config.num_mtp_layers and self.step % setting.mtp_every == 0
        weight = setting.mtp if progress < setting.late else setting.mtp_late
        self.scales.main = 1.0 / max(1.0, totals[0])
        self.scales.mtp = weight / max(1.0, totals[1]) if use_mtp else 0.0
        for _, moe in self._moe():
            moe.sequence_weight = setting.sequence / self.recipe.rows
        self._forward_backward(batch)
        self._stop_if_broken()
        self._add_up()
        report = self._measure(totals, bool(self.scales.mtp), batch.tokens.numel())
        self.optimizer.step(self.step, self.recipe.run.steps, report.norm)
        self.precision.forget()
        self.step += 1
        return report

    def _label_counts(self, batch: Batch) -> list[float]:
        """Labels of the main head and the MTP layer in the whole step."""
        counts = torch.tensor(
            [float((shifted_labels(*batch, by=by) >= 0).sum()) for by in (1, 2)],
            dtype=torch.float64,
        )
        dist.all_reduce(counts, group=self.groups.shards)
        found: list[float] = counts.tolist()
        return found

    def _forward_backward(self, batch: Batch) -> None:
        parallel, pipe = self.recipe.parallel, self.pipe
        first, last = pipe.is_first_rank, pipe.is_last_rank
        given, wanted = batch, batch
        enters, ends = first, last
        if parallel.schedule == "dualpipe":  # half of the rows enter at each end
            half = len(batch.tokens) // 2
            mine, other = batch.part(slice(0, half)), batch.part(slice(half, None))
            given, wanted = (mine, other) if first else (other, mine)
            enters = ends = first or last
        elif parallel.schedule == "dualpipev":
            ends = first
        pipe.step(
            *((given.tokens, given.document) if enters else ()),
            num_chunks=parallel.chunks,
            criterion=self._criterion if ends else None,
            labels=[wanted.tokens, wanted.learnt] if ends else [],
        )

    def _criterion(self, *outputs: Any) -> Tensor:
        last = next(stage for stage in self.stages if stage.is_last)
        return last.criterion(*outputs)

    def _moe(self) -> Iterator[tuple[str, MoE]]:
        for stage in self.stages:
            yield from stage.moe_layers()

    # ---- all ranks together

    def _add_up(self) -> None:
        """Sum gradients over the ranks that hold the same weights."""
        for flat in self.optimizer.flats:
            flat.attach()
        for flat in [*self.dense, *self.vectors]:
            dist.all_reduce(flat.gradients, group=self.groups.shards)
        for flat in self.expert:
            dist.all_reduce(flat.gradients, group=self.groups.copies)
        if isinstance(self.pipe, DualPipe):
            sync_mirrors(self.pipe)
            for flat in self.optimizer.flats:
                flat.attach()
        self._add_embeddings()

    def _add_embeddings(self) -> None:
        """The first stage's table and the copy that the MTP layer uses get the sum of both."""
        if self.recipe.parallel.schedule in ("dualpipe", "dualpipev"):
            tables = [s.embed_tokens for s in self.stages if s.embed_tokens is not None]
            if len(tables) == 2:
                total = tables[0].grad + tables[1].grad
                tables[0].grad.copy_(total)
                tables[1].grad.copy_(total)
        elif self.recipe.parallel.pipeline > 1 and self.config.num_mtp_layers:
            stage = self.stages[0]
            if stage.embed_tokens is not None:
                dist.all_reduce(stage.embed_tokens.grad, group=self.groups.ends)

    def _stop_if_broken(self) -> None:
        """Raise on every rank if anything was not finite on one, naming where it began."""
        found = self._broken()
        flag = torch.tensor([0.0 if found is None else 1.0])
        dist.all_reduce(flag)
        if not float(flag):
            return
        every: list[tuple[int, int, str] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(every, found)
        _, rank, text = min((e[:2], r, e[2]) for r, e in enumerate(every) if e is not None)
        self.optimizer.clear()
        raise DivergedError(
            f"train: step {self.step}: rank {rank}: {text} is NaN or infinite; the weights are as "
            "they were before this step"
        )

    def _broken(self) -> tuple[int, int, str] | None:
        """What is not finite here, after how early it must have been so: 0 forward, 1 backward."""
        outputs = [(0, s.number, text) for s in self.stages if (text := s.broken()) is not None]
        if outputs:
            return min(outputs)
        if all(bool(torch.isfinite(_square(f))) for f in self.optimizer.flats):
            return None
        for stage in reversed(self.stages):
            for named in reversed(list(stage.published())):
                if not bool(torch.isfinite(named.of(named.parameter.grad)).all()):
                    return 1, -stage.number, f"gradient of {named.name}"
        return 1, 0, "the squared norm of all gradients"

    def _measure(self, totals: list[float], with_mtp: bool, tokens: int) -> Report:
        """One sum over all ranks gives every number of the step, and moves the biases."""
        experts, names = max(1, self.config.num_experts), self.moe_names
        load = torch.zeros(len(names), experts, dtype=torch.float64)
        sequence = 0.0
        for name, moe in self._moe():
            load[names.index(name)] += moe.load
            sequence += moe.sequence_sum
            moe.load.zero_()
            moe.sequence_sum = 0.0
        sums = self.scales.sums
        head = [sums["main"], sums["mtp"], sequence, self.optimizer.square_sum()]
        vector = torch.cat([torch.tensor(head, dtype=torch.float64), load.flatten()])
        dist.all_reduce(vector)
        self.scales.sums = {"main": 0.0, "mtp": 0.0}
        load = vector[4:].view(load.shape)
        self._balance(load)
        used = load[load.sum(1) > 0]
        ratio = used.amax(1) / used.mean(1) if len(used) else torch.ones(1)
        layers = len(used) * self.recipe.rows
        return Report(
            self.step,
            float(vector[0]) / max(1.0, totals[0]),
            float(vector[1]) / max(1.0, totals[1]) if with_mtp else None,
            math.sqrt(float(vector[3])),
            float(ratio.mean()),
            float(ratio.max()),
            float(vector[2]) / layers if layers else 0.0,
            tokens * self.recipe.parallel.shards,
        )

    def _balance(self, load: Tensor) -> None:
        setting = self.recipe.loss
        if self.step >= setting.bias_until * self.recipe.run.steps:
            return
        for name, moe in self._moe():
            counts = load[self.moe_names.index(name)]
            if float(counts.sum()):
                moe.bias.copy_(moved_bias(moe.bias, counts.float(), setting.bias_speed))


def _experts(stage: Stage) -> list[nn.Parameter]:
    """The parameters that expert parallelism spreads."""
    return [p for _, moe in stage.moe_layers() for p in moe.experts.parameters()]


def _square(flat: Flat) -> Tensor:
    return torch.dot(flat.gradients, flat.gradients)


def set_threads(recipe: Recipe) -> int:
    """Give this process its share of the cores; gives their number."""
    from whalefall import jit

    cores = len(os.sched_getaffinity(0))
    threads = recipe.run.threads or max(1, cores // recipe.parallel.ranks)
    torch.set_num_threads(threads)
    jit.set_num_threads(threads)
    return threads
