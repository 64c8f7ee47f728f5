"""Engine room: what comes out of a step, of a request, and of the engine as a whole."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from whalefall.engine.sampling import TokenLogprobs

__all__ = ["Completion", "Delta", "EngineStats", "RequestOutput"]


@dataclass(frozen=True)
class Delta:
    """What a step added to one answer of a request.

    Attributes:
        request_id: as given to `Engine.add`.
        index: which of the `n` answers.
        token_ids: the new tokens.
        text: the new text; held back while it may be part of a stop string or of a character.
        logprobs: one entry a token, where the request asked for them.
        finish_reason: None while the answer goes on, then "stop", "length" or "cancelled".
        stop_reason: the stop string or stop id that ended the answer (None for EOS).
        num_prompt_tokens: length of the prompt.
        num_cached_tokens: how much of it came from the prefix cache.
    """

    request_id: str
    index: int
    token_ids: list[int]
    text: str
    logprobs: list[TokenLogprobs] | None
    finish_reason: str | None
    stop_reason: str | int | None
    num_prompt_tokens: int
    num_cached_tokens: int


@dataclass(frozen=True)
class EngineStats:
    """Counters since the start, and the present load.

    Attributes:
        kv_used, kv_total: blocks of 64 tokens.
        prefix_queries, prefix_hits: prompt tokens looked up in, and found in, the prefix cache.
        expert_load: [layers, experts], how often each expert was chosen.
        spec_drafted, spec_accepted: tokens drafted by the MTP layer, and found right.
        disk_hits: prompt tokens that came from the disk's prefix cache.
        disk_failures: reads and writes of it that went wrong.
        communication_s, overlapped_s: time that tokens travelled between ranks, and the part of it
            under compute; units alone have any.
    """

    running: int
    waiting: int
    kv_used: int
    kv_total: int
    prefix_queries: int
    prefix_hits: int
    prompt_tokens: int
    generated_tokens: int
    preemptions: int
    expert_load: np.ndarray
    spec_drafted: int = 0
    spec_accepted: int = 0
    disk_hits: int = 0
    disk_failures: int = 0
    communication_s: float = 0.0
    overlapped_s: float = 0.0


@dataclass
class Completion:
    """One finished answer."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass
class RequestOutput:
    """A request's answers; `text`, `token_ids`, … are those of the first."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: list[Completion]
    num_cached_tokens: int = 0

    @property
    def text(self) -> str:
        """Text of the first answer."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        """Tokens of the first answer."""
        return self.outputs[0].token_ids

    @property
    def logprobs(self) -> list[TokenLogprobs] | None:
        """Log-probabilities of the first answer."""
        return self.outputs[0].logprobs

    @property
    def finish_reason(self) -> str | None:
        """Why the first answer ended."""
        return self.outputs[0].finish_reason
