"""Engine room: what one step gives to one answer, and how its sampler drafts."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import numpy as np

from whalefall.engine.answer import Answer
from whalefall.engine.sampling import TokenLogprobs, sample

__all__ = ["Turn", "draft"]


@dataclass
class Turn:
    """What a step gives to one answer: logits [1 + drafts, vocab], and the tokens out of them."""

    answer: Answer
    logits: np.ndarray
    drafts: Items[int]
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_accepted: int = 0

    @property
    def next_logits(self) -> np.ndarray:
        row: np.ndarray = self.logits[len(self.tokens)]
        return row


def draft(answers: dict[str, Answer], rows: Items[tuple[str, list[int], np.ndarray]]) -> list[int]:
    """Draft as each answer's own sampler would choose, with the draw it will use there.

    Where the layer's distribution is near the model's, the same draw gives the same token.
    """
    found = sample([answers[name].sample_row(logits, ahead) for name, ahead, logits in rows])
    return [token for token, _ in found]
