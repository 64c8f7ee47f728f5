"""Engine room: the arrays of a model's step out of tokens of sequences."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np

from whalefall.engine.core import Scheduled, Sequence
from whalefall.model.step import StepBatch

__all__ = ["Span", "span_batch", "step_batch"]


@dataclass(frozen=True)
class Span:
    """Tokens of a sequence at positions start, start + 1, …."""

    seq: Sequence
    start: int
    tokens: Items[int]

    @property
    def end(self) -> int:
        """The position after the last."""
        return self.start + len(self.tokens)


def span_batch(spans: Items[Span], in_prompt: bool, logit_rows: np.ndarray) -> StepBatch:
    """The arrays of a step over spans of one phase."""
    width = max((len(span.seq.blocks) for span in spans), default=1)
    tables = np.zeros((len(spans), width), np.int32)
    for row, span in zip(tables, spans, strict=True):
        row[: len(span.seq.blocks)] = span.seq.blocks
    counts = [len(span.tokens) for span in spans]
    return StepBatch(
        tokens=np.array([token for span in spans for token in span.tokens], np.int32),
        positions=np.array(
            [p for s, n in zip(spans, counts, strict=True) for p in range(s.start, s.start + n)],
            np.int32,
        ),
        starts=np.cumsum([0, *counts], dtype=np.int32),
        block_tables=tables,
        logit_rows=np.asarray(logit_rows, np.int32),
        in_prompt=in_prompt,
    )


def step_batch(items: Items[Scheduled], in_prompt: bool, logit_rows: np.ndarray) -> StepBatch:
    """The arrays of a step out of scheduled tokens of one phase."""
    spans = [Span(i.seq, i.start, i.seq.tokens[i.start : i.start + i.count]) for i in items]
    return span_batch(spans, in_prompt, logit_rows)
