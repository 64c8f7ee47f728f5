"""Engine room: drafts tokens with the checkpoint's multi-token prediction (MTP) layer.

In: the hidden states that the main model's steps leave behind. Out: drafts of the sequences that
the scheduler wants some for. Row i of the layer joins hidden state i with token i + 1; its latents
lie in the same pages as the main model's, in one more layer of the cache. Rows wait here until
drafts are wanted or enough are together to read the layer's weights for. Nothing here decides over
an answer: drafts are verified by the main model, and a wrong one costs only time.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np

from whalefall.engine.core import Scheduled, Sequence
from whalefall.engine.kv_cache import KVCache
from whalefall.engine.step_arrays import Span, span_batch
from whalefall.model.step import Step

__all__ = ["Choose", "Drafter"]

_ENOUGH_ROWS = 64  # waiting rows of a sequence that are computed even where no draft is wanted
_MOST_ROWS = 256  # more than these wait for nobody
_MANY_ROWS = 32  # from here on the form of prompts is faster; the bits of drafts may differ

# seq_id, tokens drafted before, logits [vocab] → a token, as the sequence's sampler would choose
Choose = Callable[[Items[tuple[str, list[int], np.ndarray]]], list[int]]


@dataclass
class _Waiting:
    """Hidden states of positions [start, end) not yet joined, in pieces [rows, hidden]."""

    start: int
    end: int
    pieces: list[np.ndarray]

    def put(self, start: int, hidden: np.ndarray) -> None:
        """Add rows from position `start` on; what lay there before gives way."""
        while self.end > start:
            piece = self.pieces.pop()
            self.end -= len(piece)
            if self.end < start:
                self.pieces.append(piece[: start - self.end])
                self.end = start
        self.pieces.append(hidden)
        self.end += len(hidden)

    def cut(self, end: int) -> np.ndarray:
        """Take the rows before position `end` out; the rest stays."""
        rows = np.concatenate(self.pieces)
        count = end - self.start
        self.start, self.pieces = end, [rows[count:]]
        return rows[:count]


@dataclass(frozen=True)
class _Joined:
    span: Span
    hidden: np.ndarray


class Drafter:
    """Keeps each sequence's MTP rows going, and drafts from them.

    Attributes:
        keep_up: whether rows are computed before a draft wants them; set while drafts pay.
    """

    def __init__(self, step: Step, cache: KVCache) -> None:
        """Draft with `step.mtp` over a cache that has one more layer than the model."""
        self.keep_up = True
        self._step = step
        self._cache = cache
        self._waiting: dict[str, _Waiting] = {}
        self._lost: set[str] = set()  # too many rows waited: these are drafted for no more

    def keep(self, seq: Sequence, start: int, hidden: np.ndarray) -> None:
        """Take the hidden states of a step: those of positions start, start + 1, ….

        Rows of drafts are among them; those that turn out wrong are replaced after the next step.
        """
        if seq.seq_id in self._lost:
            return
        known = self._waiting.get(seq.seq_id)
        if known is None or not known.start <= start <= known.end:
            known = self._waiting[seq.seq_id] = _Waiting(start, start, [])
        known.put(start, hidden.copy())
        if not self.keep_up and known.end - known.start > _MOST_ROWS:
            del self._waiting[seq.seq_id]
            self._lost.add(seq.seq_id)

    def drop(self, seq_id: str) -> None:
        """Forget a sequence."""
        self._waiting.pop(seq_id, None)
        self._lost.discard(seq_id)

    def draft(self, items: Items[Scheduled], choose: Choose) -> dict[str, list[int]]:
        """Draft for the items that want drafts.

        Returns: seq_id → at most `num_drafts` tokens; a sequence whose hidden states were computed
        elsewhere gets none yet.
        """
        found = (self._joinable(item.seq, self._enough(item.num_drafts)) for item in items)
        joined = [each for each in found if each is not None]
        if not joined:
            return {}
        wanted = {item.seq.seq_id: item.num_drafts for item in items}
        spans = [each.span for each in joined]
        last = np.cumsum([len(span.tokens) for span in spans]) - 1
        asked = [
            i
            for i, span in enumerate(spans)
            if span.end + 1 == len(span.seq.tokens) and wanted[span.seq.seq_id]
        ]
        hidden = np.concatenate([each.hidden for each in joined])
        logits = self._call(spans, hidden, last[asked])
        return self._chain([spans[i] for i in asked], hidden[last[asked]], logits, wanted, choose)

    def catch_up(self, seq: Sequence) -> None:
        """Compute all rows of a sequence whose next token is known, before its pages leave."""
        joined = self._joinable(seq, 1)
        if joined is not None:
            self._call([joined.span], joined.hidden, np.zeros(0, np.int32))

    def _chain(
        self,
        spans: list[Span],
        hidden: np.ndarray,
        logits: np.ndarray,
        wanted: dict[str, int],
        choose: Choose,
    ) -> dict[str, list[int]]:
        """Choose the drafts that the spans' logits give; further ones by applying the layer again.

        Args:
            hidden: [spans, hidden], the layer's output where each span ends.
        """
        drafts: dict[str, list[int]] = {span.seq.seq_id: [] for span in spans}
        while spans:
            ids = [span.seq.seq_id for span in spans]
            asked = [(i, drafts[i], row) for i, row in zip(ids, logits, strict=True)]
            for seq_id, token in zip(ids, choose(asked), strict=True):
                drafts[seq_id].append(token)
            more = [n for n, i in enumerate(ids) if len(drafts[i]) < wanted[i]]
            left = [spans[n] for n in more]
            spans = [Span(s.seq, s.end, drafts[s.seq.seq_id][-1:]) for s in left]
            if spans:
                hidden = np.ascontiguousarray(hidden[more])
                logits = self._call(spans, hidden, np.arange(len(spans)))
        return drafts

    def _enough(self, num_drafts: int) -> int:
        """How many rows of a sequence are computed together, at least."""
        return 1 if num_drafts else _ENOUGH_ROWS if self.keep_up else _MOST_ROWS + 1

    def _joinable(self, seq: Sequence, enough: int) -> _Joined | None:
        """A sequence's rows whose next token is known, where there are `enough` of them."""
        waiting = self._waiting.get(seq.seq_id)
        if waiting is None:
            return None
        start, end = waiting.start, min(waiting.end, seq.num_computed, len(seq.tokens) - 1)
        if end - start < enough:
            return None
        return _Joined(Span(seq, start, seq.tokens[start + 1 : end + 1]), waiting.cut(end))

    def _call(self, spans: Items[Span], hidden: np.ndarray, rows: np.ndarray) -> np.ndarray:
        batch = span_batch(spans, len(hidden) > _MANY_ROWS, rows)
        return self._step.mtp(batch, self._cache.array, hidden)
