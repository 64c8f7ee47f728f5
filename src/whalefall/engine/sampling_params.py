"""Engine room: how an answer's tokens are chosen and when it ends, with vLLM's names and meaning.

In: a user's wishes. Out: a frozen, checked `SamplingParams`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from whalefall.arguments import finite, whole
from whalefall.engine.structured import StructuredOutputs
from whalefall.errors import ConfigError

__all__ = ["MAX_LOGPROBS", "SamplingParams"]

_COLDEST = 1e-5  # as vLLM's
MAX_LOGPROBS = 20  # what the OpenAI API allows


@dataclass(frozen=True)
class SamplingParams:
    """Sampling and stopping of one request.

    Attributes:
        n: how many answers.
        temperature: 0 takes the most likely token (the lowest id among equals); below 1e-5 it is
            taken as 0, since logits divided by it would overflow.
        top_p: keep the fewest tokens whose probability reaches it; 1 keeps all.
        top_k: keep so many tokens; 0 or -1 keeps all.
        min_p: drop tokens less likely than so many times the likeliest.
        repetition_penalty: > 1 discourages tokens of the prompt and the answer.
        frequency_penalty: taken off a token's logit for each time the answer has it.
        presence_penalty: taken off once if the answer has the token.
        logit_bias: token id → what is added to its logit.
        seed: same seed, same answer; None: a fresh one.
        max_tokens: of one answer; None: as many as the context holds.
        min_tokens: before them neither EOS nor a stop id is chosen, nor a stop string heeded.
        stop: strings that end the answer (left out of the text).
        stop_token_ids: ids that end the answer.
        ignore_eos: go on after EOS.
        logprobs: None, or how many of the likeliest tokens to report beside the chosen one.
        skip_special_tokens: leave special tokens out of the text.
        include_stop_str_in_output: leave the stop string in the text.
        structured_outputs: a form that the answer must have.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    structured_outputs: StructuredOutputs | None = None

    def __post_init__(self) -> None:
        """Check the values. Raises: ConfigError with the name, the value and what is wanted."""
        object.__setattr__(self, "stop", _strings(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias or {}))
        whole("n", self.n, 1, 128)
        finite("temperature", self.temperature, 0, 100)
        if self.temperature < _COLDEST:
            object.__setattr__(self, "temperature", 0)
        finite("top_p", self.top_p, 0, 1, above=True)
        whole("top_k", self.top_k, -1, 1 << 31)
        finite("min_p", self.min_p, 0, 1)
        finite(
            "repetition_penalty", self.repetition_penalty, 0.01, 100
        )  # less makes infinities of logits
        finite("frequency_penalty", self.frequency_penalty, -2, 2)
        finite("presence_penalty", self.presence_penalty, -2, 2)
        if self.seed is not None:
            whole("seed", self.seed, -(1 << 63), (1 << 64) - 1)
        if self.max_tokens is not None:
            whole("max_tokens", self.max_tokens, 1, 1 << 31)
        whole("min_tokens", self.min_tokens, 0, 1 << 31)
        if self.logprobs is not None:
            whole("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ConfigError(
                f"min_tokens is {self.min_tokens}, wanted at most max_tokens = {self.max_tokens}"
            )
        if self.structured_outputs is not None and self.ignore_eos:
            raise ConfigError("ignore_eos is True, wanted False with structured outputs: they end")
        self._check_bias()

    def _check_bias(self) -> None:
        for token, bias in self.logit_bias.items():
            if not isinstance(token, int) or token < 0:
                raise ConfigError(f"logit_bias has token {token!r}, wanted a token id")
            if not isinstance(bias, int | float) or not -100 <= bias <= 100:
                raise ConfigError(f"logit_bias[{token}] is {bias!r}, wanted -100 to 100")


def _strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    found = (stop,) if isinstance(stop, str) else tuple(stop or ())
    for text in found:
        if not isinstance(text, str) or not text:
            raise ConfigError(f"stop is {stop!r}, wanted strings that are not empty")
    return found
