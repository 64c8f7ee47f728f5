"""Model room: a forward step whose routed experts are spread over the ranks of a group.

In: a rank's own tokens and KV cache (attention is data-parallel), an `ep.Engine`, a placement of
expert replicas. Out: a `step.Step` with the bits of `NativeStep`, whatever the number of ranks:
one row travels per selection, is rounded as in one process, and rows are added in top-k order.
Under w8a8 rows go to the experts as E4M3 with scales, as published: quantised once, by the sender.
Every rank calls it for every step, those without tokens too.
Source: DeepSeek-V3/R1 inference system (large-scale expert parallelism, dual-batch overlap).
"""

# T tokens of this rank, K top-k, N rows received, L MoE layers, E experts, P slots, X replicas

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from whalefall import ep, eplb, pipeline, trace
from whalefall.errors import ShapeError
from whalefall.gemm.linear import (
    ExpertWeights,
    expert_structs,
    fused_experts,
    quantize_rows,
)
from whalefall.model.config import ModelConfig
from whalefall.model.micro_batches import OverlapClock, split
from whalefall.model.native_step import STEP_ACTIVATIONS, NativeStep, StepParts
from whalefall.model.step import StepBatch
from whalefall.model.weights import Experts, Mlp, Weights
from whalefall.pipeline import Action

__all__ = ["ExpertParallelStep", "even_placement"]

_GOLDEN = 0.6180339887498949


def even_placement(config: ModelConfig, ranks: int, redundant: int = 0) -> eplb.Placement:
    """Experts over ranks before anything is known of their loads.

    Args:
        config: of the model.
        ranks: of the unit.
        redundant: replicas beside one of each expert; rounded up so that ranks hold equally many.
    """
    slots = -(-(config.num_experts + redundant) // ranks) * ranks
    layers = config.num_layers - config.first_k_dense
    return eplb.rebalance(np.ones((layers, config.num_experts)), slots, 1, 1, ranks)


class ExpertParallelStep:
    """A `step.Step` over the ranks of a group.

    Args:
        weights, config, compute, max_positions: as `step.make_step`.
        ranks: this rank's end of the group.
        placement: of the MoE layers' experts; the same on all ranks.
        overlap: two micro-batches, one computing while the other's tokens travel.
    Attributes:
        expert_load: [layers, experts] int64, this rank's selections so far.
        clock: how much communication lay under compute.
    Raises: ShapeError for a placement of another shape.
    """

    def __init__(
        self,
        weights: Weights,
        config: ModelConfig,
        compute: str,
        max_positions: int,
        ranks: ep.Engine,
        placement: eplb.Placement,
        overlap: bool = False,
    ) -> None:
        self._parts = NativeStep(weights, config, compute, max_positions)
        self._config, self._ranks, self.overlap = config, ranks, overlap
        self.expert_load = self._parts.expert_load
        self.hidden_size = config.hidden_size
        self._first, self._layers = config.first_k_dense, config.num_layers - config.first_k_dense
        self._rows_dtype = "float32" if compute == "fp32" else "bfloat16"
        self._activations = STEP_ACTIVATIONS[compute]
        if self._activations == "e4m3" and config.weight_block is None:
            self._activations = "keep"
        self._experts = [
            expert_structs([_expert(mlp) for mlp in layer.mlp.experts])
            for layer in weights.layers
            if isinstance(layer.mlp, Experts)
        ]
        self.clock = OverlapClock()
        self.place(placement)

    def place(self, placement: eplb.Placement) -> None:
        """Use another placement from the next step on; every rank must, between the same steps.

        On one host experts lie in memory that all ranks map: nothing is copied.
        """
        wanted = (self._layers, self._config.num_experts)
        if placement.logcnt.shape != wanted or placement.num_gpus != self._ranks.num_ranks:
            raise ShapeError(
                f"model: a placement of {list(placement.logcnt.shape)} over {placement.num_gpus} "
                f"ranks, wanted {list(wanted)} over {self._ranks.num_ranks}"
            )
        self.placement = placement
        self._slots = placement.phy2log.shape[1]
        each = self._slots // self._ranks.num_ranks
        mine = placement.phy2log[:, self._ranks.rank * each : (self._ranks.rank + 1) * each]
        self._held = []
        for experts, held in zip(self._experts, mine, strict=True):
            structs = (type(experts[0]) * each)()
            for slot, expert in enumerate(held.tolist()):
                structs[slot] = experts[expert]
            self._held.append(structs)
        share_LP = np.concatenate([placement.share, np.zeros((self._layers, 1))], axis=1)
        share = np.take_along_axis(
            share_LP, placement.log2phy.reshape(self._layers, -1), axis=1
        ).reshape(placement.log2phy.shape)
        self._upto = np.cumsum(share, axis=2)  # [L, E, X]
        self._upto[..., -1] = 2.0  # whatever rounding left is the last one's

    def slots_of(self, layer: int, index: np.ndarray) -> np.ndarray:
        """The slots [T, K] that tokens go to for experts `index` [T, K] of MoE layer `layer`.

        An expert's tokens are dealt to its replicas in proportion to their shares.
        """
        number = np.arange(len(index)) + 1 + self._ranks.rank
        draw = number * _GOLDEN % 1.0
        replica = (draw[:, None, None] >= self._upto[layer][index]).sum(2)
        count = self.placement.logcnt[layer][index]
        slot: np.ndarray = self.placement.log2phy[layer][index, np.minimum(replica, count - 1)]
        return slot

    def mtp(self, batch: StepBatch, kv: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        """See `step.Step`; each rank by itself, since a layer's experts are few to read."""
        return self._parts.mtp(batch, kv, hidden)

    def __call__(
        self, batch: StepBatch, kv: np.ndarray, hidden: np.ndarray | None = None
    ) -> np.ndarray:
        """See `step.Step`; collective. Raises: RankFailure naming a rank that failed."""
        if self.overlap:
            return self._overlapped(batch, kv, hidden)
        rows = _Rows(self, self._parts.parts(batch, kv, hidden), batch.in_prompt)
        rows.parts.run("EMBED")
        for layer in range(self._config.num_layers):
            rows.attention(layer)
            if layer < self._first:
                rows.dense(layer)
                continue
            rows.dispatch(layer)()
            rows.mlp(layer)
            wait = rows.combine(layer)
            rows.parts.run("SHARED", layer)
            wait()
        rows.parts.run("LOGITS")
        return rows.parts.logits

    def _overlapped(
        self, batch: StepBatch, kv: np.ndarray, hidden: np.ndarray | None
    ) -> np.ndarray:
        first, second, order = split(batch)
        head = len((second if batch.in_prompt else first).tokens)
        outs = [None if hidden is None else hidden[part] for part in (np.s_[:head], np.s_[head:])]
        if batch.in_prompt:
            outs.reverse()
        both = [
            _Rows(self, self._parts.parts(half, kv, out), batch.in_prompt)
            for half, out in zip((first, second), outs, strict=True)
        ]
        for rows in both[::-1] if batch.in_prompt else both:
            rows.parts.run("EMBED")
        for layer in range(self._first):
            for rows in both[::-1] if batch.in_prompt else both:
                rows.attention(layer)
                rows.dense(layer)
        schedule = pipeline.prefill_overlap if batch.in_prompt else pipeline.decode_overlap
        with trace.span("prefill step" if batch.in_prompt else "decode step", "step"):
            pipeline.execute(schedule(self._layers), _Overlap(self, both))
        self.clock.close()
        for rows in both:
            rows.parts.run("LOGITS")
        return np.concatenate([rows.parts.logits for rows in both])[order]


def _expert(mlp: Mlp) -> ExpertWeights:
    return ExpertWeights(
        mlp.gate.weight, mlp.up.weight, mlp.down.weight,
        mlp.gate.scale, mlp.up.scale, mlp.down.scale,
    )  # fmt: skip


@dataclass
class _Moved:
    """Tokens of one micro-batch on their way to the experts and back."""

    received: ep.Received
    rows: np.ndarray | None = None


class _Rows:
    """One (micro-)batch in the pieces that a schedule orders; waits are returned as calls."""

    def __init__(self, step: ExpertParallelStep, parts: StepParts, in_prompt: bool) -> None:
        self.step, self.parts, self.form = step, parts, "many" if in_prompt else "few"
        self.moved: _Moved

    def attention(self, layer: int) -> None:
        self.parts.run("ATTN-0", layer)
        self.parts.run("ATTN-1", layer)

    def dense(self, layer: int) -> None:
        self.parts.run("SHARED", layer)
        self.parts.run("FINISH", layer)

    def dispatch(self, layer: int) -> Callable[[], tuple[int, int]]:
        step, parts = self.step, self.parts
        slots = step.slots_of(layer - step._first, parts.index)
        rows = parts.normed
        if step._activations == "e4m3":  # as the experts would make them, in a quarter of the bytes
            rows = quantize_rows(rows)
        received, event = step._ranks.begin_dispatch_selections(rows, slots, step._slots)
        self.moved = _Moved(received)

        def wait() -> tuple[int, int]:
            event.wait()
            return event.took_ns

        return wait

    def mlp(self, layer: int) -> None:
        step, received = self.step, self.moved.received
        assert received.per_expert is not None
        if not len(received.x):
            dtype = np.float32 if step._rows_dtype == "float32" else ml_dtypes.bfloat16
            self.moved.rows = np.empty((0, step.hidden_size), dtype)
            return
        slot = np.repeat(np.arange(len(received.per_expert), dtype=np.int32), received.per_expert)
        self.moved.rows = fused_experts(
            received.x,
            step._held[layer - step._first],
            slot[:, None],
            self.form,  # type: ignore[arg-type]
            quantize_activations=step._activations == "e4m3",
            half_activations=step._activations == "half",
            out_dtype=step._rows_dtype,
        )[:, 0]

    def combine(self, layer: int) -> Callable[[], tuple[int, int]]:
        moved, parts = self.moved, self.parts
        assert moved.rows is not None
        routed, event = self.step._ranks.begin_combine_selections(
            moved.rows, moved.received.handle, parts.weight
        )

        def wait() -> tuple[int, int]:
            event.wait()
            parts.run("FINISH", layer, routed)
            return event.took_ns

        return wait


class _Overlap:
    """What `pipeline.execute` drives: two micro-batches through the MoE layers."""

    def __init__(self, step: ExpertParallelStep, both: list[_Rows]) -> None:
        self.step, self.both = step, both

    def run(self, action: Action) -> None:
        rows, layer = self.both[action.task.chunk], action.task.stage + self.step._first
        with self.step.clock.compute():
            if action.kind == "MLP":
                rows.mlp(layer)
            elif action.kind == "ATTN":
                rows.attention(layer)
            else:
                rows.parts.run(action.kind, layer)

    def begin(self, action: Action) -> Callable[[], Any]:
        rows, layer = self.both[action.task.chunk], action.task.stage + self.step._first
        wait = rows.dispatch(layer) if action.kind == "DISPATCH" else rows.combine(layer)

        def finish() -> tuple[int, int]:
            took = wait()
            self.step.clock.communicated(*took)
            return took

        return finish
