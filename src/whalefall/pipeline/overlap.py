"""Pipeline room: dual-batch overlap, the inference system's schedule.

Two micro-batches; while one's tokens travel (DISPATCH, COMBINE), the other computes. In: the number
of MoE layers. Out: one rank's actions; `Task.stage` is the layer, `Task.chunk` the micro-batch.
Source: DeepSeek's inference system overview and profile data (prefill and decode).
"""

from __future__ import annotations

from whalefall.errors import ConfigError
from whalefall.pipeline.actions import Action, Task

__all__ = ["decode_overlap", "prefill_overlap"]


class _Writer:
    """Writes actions of (part, micro-batch, layer)."""

    def __init__(self) -> None:
        self.actions: list[Action] = []

    def run(self, part: str, batch: int, layer: int) -> None:
        self.actions.append(Action(part, Task(layer, batch)))

    def begin(self, part: str, batch: int, layer: int) -> None:
        self.actions.append(Action(part, Task(layer, batch), "begin"))

    def wait(self, part: str, batch: int, layer: int) -> None:
        self.actions.append(Action(part, Task(layer, batch), "wait"))


def _check(num_layers: int) -> None:
    if num_layers < 1:
        raise ConfigError(f"pipeline: an overlap over {num_layers} layers; give at least 1")


def prefill_overlap(num_layers: int) -> tuple[Action, ...]:
    """Per layer: ATTN(1) SHARED(0) ATTN(0) MLP(1) MLP(0) SHARED(1) over COMBINE(0) DISPATCH(1)
    DISPATCH(0) COMBINE(1).

    Micro-batch 0 runs half a layer behind: its COMBINE and SHARED are those of the layer before.

    Raises: ConfigError without layers.
    """
    _check(num_layers)
    w = _Writer()
    for layer in range(num_layers + 1):
        before = layer - 1
        if layer:
            w.begin("COMBINE", 0, before)
        if layer < num_layers:
            w.run("ATTN", 1, layer)
            w.begin("DISPATCH", 1, layer)
        if layer:
            w.run("SHARED", 0, before)
            w.wait("COMBINE", 0, before)
        if layer == num_layers:
            break
        w.run("ATTN", 0, layer)
        w.wait("DISPATCH", 1, layer)
        w.begin("DISPATCH", 0, layer)
        w.run("MLP", 1, layer)
        w.wait("DISPATCH", 0, layer)
        w.begin("COMBINE", 1, layer)
        w.run("MLP", 0, layer)
        w.run("SHARED", 1, layer)
        w.wait("COMBINE", 1, layer)
    return tuple(w.actions)


def decode_overlap(num_layers: int) -> tuple[Action, ...]:
    """Per half layer: SHARED(0) ATTN-0(1) under DISPATCH(0), MLP(0), ATTN-1(1) under COMBINE(0);
    then with the micro-batches swapped.

    ATTN-0: the projections before core attention; ATTN-1: core attention, output projection, gate.

    Raises: ConfigError without layers.
    """
    _check(num_layers)
    w = _Writer()
    w.run("ATTN-0", 0, 0)
    w.run("ATTN-1", 0, 0)
    for half in range(2 * num_layers):
        batch, layer = half % 2, half // 2
        other, after = 1 - batch, layer + batch  # micro-batch 0 is one attention ahead
        more = after < num_layers
        w.begin("DISPATCH", batch, layer)
        w.run("SHARED", batch, layer)
        if more:
            w.run("ATTN-0", other, after)
        w.wait("DISPATCH", batch, layer)
        w.run("MLP", batch, layer)
        w.begin("COMBINE", batch, layer)
        if more:
            w.run("ATTN-1", other, after)
        w.wait("COMBINE", batch, layer)
    return tuple(w.actions)
