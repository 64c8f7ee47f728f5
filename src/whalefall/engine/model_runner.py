"""Engine room: turns scheduled tokens into arrays for the model's step; the only part with arrays.

In: a scheduler's `Batch`. Out: logits of each sequence whose last known token was computed.
Generated tokens and prompt tokens go to the step separately, each in its phase's one form.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np

from whalefall.engine.core import Batch, Scheduled
from whalefall.engine.kv_cache import KVCache
from whalefall.model.step import Step, StepBatch

__all__ = ["ModelRunner"]


class ModelRunner:
    """Runs batches on a step and a KV cache."""

    def __init__(self, step: Step, cache: KVCache) -> None:
        """Join a model's step with the pages it works on."""
        self.step = step
        self.cache = cache

    def run(self, batch: Batch) -> dict[str, np.ndarray]:
        """Compute a batch. Returns: seq_id → logits [vocab] of the sequences to sample."""
        for seq, blocks in batch.swap_out:
            self.cache.swap_out(seq.seq_id, blocks)
        for seq, blocks in batch.swap_in:
            self.cache.swap_in(seq.seq_id, blocks)
        found: dict[str, np.ndarray] = {}
        for in_prompt in (False, True):
            items = [item for item in batch.scheduled if item.in_prompt == in_prompt]
            if items:
                found.update(self._run(items, in_prompt))
        return found

    def _run(self, items: Items[Scheduled], in_prompt: bool) -> dict[str, np.ndarray]:
        last = np.cumsum([item.count for item in items]) - 1
        wanted = [index for index, item in enumerate(items) if item.is_last]
        logits = self.step(step_batch(items, in_prompt, last[wanted]), self.cache.array)
        return {items[index].seq.seq_id: row for index, row in zip(wanted, logits, strict=True)}


def step_batch(items: Items[Scheduled], in_prompt: bool, logit_rows: np.ndarray) -> StepBatch:
    """The arrays of a step out of scheduled tokens of one phase."""
    width = max(len(item.seq.blocks) for item in items)
    tables = np.zeros((len(items), width), np.int32)
    for row, item in zip(tables, items, strict=True):
        row[: len(item.seq.blocks)] = item.seq.blocks
    spans = [range(item.start, item.start + item.count) for item in items]
    return StepBatch(
        tokens=np.array(
            [t for i in items for t in i.seq.tokens[i.start : i.start + i.count]], np.int32
        ),
        positions=np.array([p for span in spans for p in span], np.int32),
        starts=np.cumsum([0, *(item.count for item in items)], dtype=np.int32),
        block_tables=tables,
        logit_rows=np.asarray(logit_rows, np.int32),
        in_prompt=in_prompt,
    )
