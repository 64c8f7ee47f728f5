"""Engine room: one answer as it grows: text, stop conditions, draws.

In: tokens one by one. Out: what may be shown, and whether the answer has ended. Text that might be
the beginning of a stop string is held back, since the stop string is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Items

import numpy as np

from whalefall.engine.core import Sequence
from whalefall.engine.outputs import Delta
from whalefall.engine.sampling import SampleRow, TokenLogprobs, penalised, uniform
from whalefall.engine.sampling_params import SamplingParams
from whalefall.engine.structured import Matcher
from whalefall.model import Tokenizer

__all__ = ["Answer"]


class Answer:
    """Answer `index` of a request.

    Attributes:
        seq: its tokens and blocks, shared with the scheduler.
        finish_reason: None while it goes on.
    """

    def __init__(
        self,
        request_id: str,
        index: int,
        seq: Sequence,
        params: SamplingParams,
        seed: int,
        tokenizer: Tokenizer | None,
        eos_token_ids: tuple[int, ...],
        max_model_len: int,
        matcher: Matcher | None = None,
    ) -> None:
        """Start an answer; `tokenizer` None: tokens only, no text; `matcher`: follows its form."""
        self._matcher = matcher
        self.request_id = request_id
        self.index = index
        self.seq = seq
        self.params = params
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self._seed = seed
        self._detokenizer = tokenizer.detokenizer(params.skip_special_tokens) if tokenizer else None
        self._held = ""
        self._eos = () if params.ignore_eos else eos_token_ids
        self._limit = max_model_len - seq.num_prompt
        if params.max_tokens is not None:
            self._limit = min(self._limit, params.max_tokens)
        seq.max_tokens = seq.num_prompt + self._limit
        self._seen: Counter[int] = Counter()
        if penalised(params):
            self._seen.update(dict.fromkeys(seq.tokens, 0))

    @property
    def num_generated(self) -> int:
        """Tokens generated so far."""
        return len(self.seq.tokens) - self.seq.num_prompt

    def sample_row(self, logits: np.ndarray, ahead: Items[int] | None = None) -> SampleRow:
        """What the sampler needs for the next token; `ahead`: for a draft, if these came first."""
        params, count = self.params, self.num_generated + len(ahead or ())
        seen = self._seen
        if ahead and penalised(params):
            seen = self._seen.copy()
            seen.update(ahead)
        banned: tuple[int, ...] = ()
        if count < params.min_tokens:
            banned = (*self._eos, *params.stop_token_ids)
        draw = uniform(self._seed, self.index, count) if params.temperature else 0.0
        allowed = self._matcher.allowed(ahead or ()) if self._matcher else None
        return SampleRow(logits, params, seen, banned, draw, allowed, report=ahead is None)

    def push(self, token: int) -> str:
        """Take a sampled token; returns the text it adds."""
        self.seq.tokens.append(token)
        if penalised(self.params):
            self._seen[token] += 1
        if self._matcher is not None:
            self._matcher.push(token)
        return self._advance(token)

    def _advance(self, token: int) -> str:
        params = self.params
        is_eos, is_stop = token in self._eos, token in params.stop_token_ids
        past_minimum = self.num_generated >= params.min_tokens
        if is_eos or is_stop:
            self.finish_reason = "stop"
            self.stop_reason = token if is_stop else None
            return self._rest()
        text = self._take_text(token)
        if past_minimum and (found := self._find_stop(text)) is not None:
            return found
        if self._matcher is not None and self._matcher.is_done:
            self.finish_reason = "cancelled" if self._matcher.error else "stop"
            return self._release(text) + self._rest()
        if self.num_generated >= self._limit:
            self.finish_reason = "length"
            return text + self._rest() if not params.stop else self._release(text) + self._rest()
        return self._release(text)

    def _take_text(self, token: int) -> str:
        return self._detokenizer.push(token) if self._detokenizer else ""

    def _rest(self) -> str:
        held, self._held = self._held, ""
        return held + (self._detokenizer.flush() if self._detokenizer else "")

    def _find_stop(self, text: str) -> str | None:
        """The text before the first stop string, if one is complete now."""
        whole = self._held + text
        found = [(whole.find(stop), stop) for stop in self.params.stop if stop in whole]
        if not found:
            return None
        place, stop = min(found)
        self.finish_reason, self.stop_reason, self._held = "stop", stop, ""
        return whole[: place + len(stop) * self.params.include_stop_str_in_output]

    def _release(self, text: str) -> str:
        """Text that can no longer become part of a stop string; the rest is held back."""
        whole = self._held + text
        keep = max((_overlap(whole, stop) for stop in self.params.stop), default=0)
        self._held = whole[len(whole) - keep :]
        return whole[: len(whole) - keep]

    def cancel(self) -> Delta:
        """End the answer; shows what was held back."""
        self.finish_reason = "cancelled"
        return self.delta([], self._rest(), None)

    def delta(self, tokens: list[int], text: str, logprobs: list[TokenLogprobs] | None) -> Delta:
        """A `Delta` of this answer."""
        return Delta(
            request_id=self.request_id,
            index=self.index,
            token_ids=tokens,
            text=text,
            logprobs=logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            num_prompt_tokens=self.seq.num_prompt,
            num_cached_tokens=self.seq.num_cached,
        )


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without completing it."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
