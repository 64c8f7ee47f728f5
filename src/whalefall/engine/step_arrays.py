"""Engine room: the arrays of a model's step out of tokens of sequences."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import accumulate

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
    tables = [span.seq.blocks + [0] * (width - len(span.seq.blocks)) for span in spans]
    tokens = [token for span in spans for token in span.tokens]
    positions = [p for span in spans for p in range(span.start, span.end)]
    return StepBatch(
        tokens=np.array(tokens, np.int32),
        positions=np.array(positions, np.int32),
        starts=np.array([0, *accumulate(len(span.tokens) for span in spans)], np.int32),
        block_tables=np.array(tables, np.int32).reshape(len(spans), width),
        logit_rows=np.asarray(logit_rows, np.int32),
        in_prompt=in_prompt,
    )


def step_batch(items: Items[Scheduled], in_prompt: bool, logit_rows: np.ndarray) -> StepBatch:
    """The arrays of a step out of scheduled tokens of one phase."""
    spans = [Span(i.seq, i.start, i.seq.tokens[i.start : i.start + i.count]) for i in items]
    return span_batch(spans, in_prompt, logit_rows)
