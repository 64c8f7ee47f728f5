"""Engine room: turns scheduled tokens into arrays for the model's step; the only part with arrays.

In: a scheduler's `Batch`. Out: logits of each sequence whose last known token was computed, and of
the drafts after it. Generated tokens (drafts are such) and prompt tokens go to the step separately,
each in its phase's one form.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np

from whalefall.engine.core import Batch, Scheduled
from whalefall.engine.drafter import Choose, Drafter
from whalefall.engine.kv_cache import KVCache
from whalefall.engine.step_arrays import Span, span_batch
from whalefall.model.step import Step

__all__ = ["ModelRunner"]


class ModelRunner:
    """Runs batches on a step and a KV cache."""

    def __init__(self, step: Step, cache: KVCache, drafter: Drafter | None = None) -> None:
        """Join a model's step with the pages it works on; `drafter`: where tokens are drafted."""
        self.step = step
        self.cache = cache
        self.drafter = drafter

    def run(self, batch: Batch, choose: Choose | None = None) -> dict[str, np.ndarray]:
        """Compute a batch; with `choose`, draft first, into `batch.drafts`.

        Returns: seq_id → logits [1 + drafts, vocab] of the sequences to sample.
        """
        self.prepare(batch, choose)
        found: dict[str, np.ndarray] = {}
        for in_prompt in (False, True):
            items = [item for item in batch.scheduled if item.in_prompt == in_prompt]
            if items:
                found.update(self.run_phase(items, in_prompt, batch.drafts))
        return found

    def prepare(self, batch: Batch, choose: Choose | None) -> None:
        """Move what a batch swaps; with `choose`, draft for it."""
        self.swap(batch)
        if self.drafter is not None and choose is not None:
            batch.drafts = self.drafter.draft(batch.scheduled, choose)

    def forget(self, seq_id: str) -> None:
        """Let go of what is kept for a sequence that ended."""
        self.cache.drop(seq_id)
        if self.drafter is not None:
            self.drafter.drop(seq_id)

    def swap(self, batch: Batch) -> None:
        """Move what a batch swaps out and in."""
        for seq, blocks in batch.swap_out:
            self.cache.swap_out(seq.seq_id, blocks)
        for seq, blocks in batch.swap_in:
            self.cache.swap_in(seq.seq_id, blocks)

    def run_phase(
        self, items: Items[Scheduled], in_prompt: bool, drafts: dict[str, list[int]]
    ) -> dict[str, np.ndarray]:
        """Compute the items of one phase. Returns: as `run`."""
        spans: list[Span] = []
        rows: list[int] = []
        asked: list[tuple[str, int]] = []
        end = 0
        for item in items:
            own = drafts.get(item.seq.seq_id, [])
            known = item.seq.tokens[item.start : item.start + item.count]
            spans.append(Span(item.seq, item.start, known + own))
            end += len(known) + len(own)
            if item.is_last:
                rows += range(end - 1 - len(own), end)
                asked.append((item.seq.seq_id, 1 + len(own)))
        batch = span_batch(spans, in_prompt, np.array(rows, np.int32))
        hidden = None
        if self.drafter is not None:
            hidden = np.empty((end, self.step.hidden_size), np.float32)
        logits = self.step(batch, self.cache.array, hidden)
        if self.drafter is not None and hidden is not None:
            for span, first in zip(spans, batch.starts, strict=False):
                self.drafter.keep(span.seq, span.start, hidden[first : first + len(span.tokens)])
        found, first = {}, 0
        for seq_id, count in asked:
            found[seq_id] = logits[first : first + count]
            first += count
        return found
