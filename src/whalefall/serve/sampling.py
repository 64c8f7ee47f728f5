"""From a request's fields to the engine's `SamplingParams`."""

from __future__ import annotations

from typing import TypeVar

from whalefall.engine import SamplingParams, StructuredOutputs
from whalefall.serve.failures import ApiError
from whalefall.serve.protocol import ChatRequest, CompletionRequest, Sampling

__all__ = ["sampling_params"]

MAX_STOPS = 16


def stop_strings(request: Sampling) -> list[str]:
    """The stop strings of a request as a list."""
    stops = [request.stop] if isinstance(request.stop, str) else list(request.stop or [])
    if len(stops) > MAX_STOPS or any(not stop for stop in stops):
        raise ApiError(
            400, f"stop: got {len(stops)}, wanted at most {MAX_STOPS} texts, none empty", "stop"
        )
    return stops


def logit_bias(request: Sampling, vocab_size: int) -> dict[int, float]:
    """The logit bias with its keys as token ids."""
    bias = {}
    for key, value in (request.logit_bias or {}).items():
        if not key.isdigit() or int(key) >= vocab_size or not -100 <= value <= 100:
            raise ApiError(
                400,
                f"logit_bias: got {key!r}: {value}, wanted a token id below {vocab_size} "
                "and a bias from -100 to 100",
                "logit_bias",
            )
        bias[int(key)] = value
    return bias


def num_logprobs(request: Sampling) -> int | None:
    """How many alternatives to report; None: no logprobs at all."""
    if isinstance(request, CompletionRequest):
        return request.logprobs
    if not isinstance(request, ChatRequest) or not request.logprobs:
        if isinstance(request, ChatRequest) and request.top_logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
        return None
    return request.top_logprobs or 0


def max_new_tokens(request: Sampling, prompt_tokens: int, context: int) -> int:
    """The most tokens to generate: what was asked, or what the context leaves.

    Raises: ApiError context_length_exceeded when prompt (and asked tokens) do not fit.
    """
    asked = request.max_tokens
    if isinstance(request, ChatRequest):
        asked = request.max_completion_tokens or asked
    elif asked is None:
        asked = min(16, context - prompt_tokens)  # OpenAI's default for completions
    left = context - prompt_tokens
    if left < 1 or (asked is not None and asked > left):
        wanted = f" and {asked} new ones" if asked is not None and left >= 1 else ""
        raise ApiError(
            400,
            f"this model's context is {context} tokens; the prompt has {prompt_tokens}{wanted}",
            "max_tokens" if wanted else "messages",
            "context_length_exceeded",
        )
    return left if asked is None else asked


T = TypeVar("T")


def given(value: T | None, default: T) -> T:
    """A field's value, or the default where the client left it out or sent null."""
    return default if value is None else value


def sampling_params(
    request: Sampling,
    prompt_tokens: int,
    context: int,
    vocab_size: int,
    form: StructuredOutputs | None = None,
) -> SamplingParams:
    """The engine's parameters for a request whose prompt has `prompt_tokens` tokens.

    Raises: ApiError 400 for values that the engine refuses.
    """
    if form is not None and request.ignore_eos:
        raise ApiError(400, "ignore_eos is not supported with a form of the answer", "ignore_eos")
    return SamplingParams(
        n=given(request.n, 1),
        temperature=given(request.temperature, 1.0),
        top_p=given(request.top_p, 1.0),
        top_k=given(request.top_k, 0),
        min_p=given(request.min_p, 0.0),
        seed=request.seed,
        stop=tuple(stop_strings(request)),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        include_stop_str_in_output=bool(request.include_stop_str_in_output),
        min_tokens=given(request.min_tokens, 0),
        ignore_eos=bool(request.ignore_eos),
        frequency_penalty=given(request.frequency_penalty, 0.0),
        presence_penalty=given(request.presence_penalty, 0.0),
        repetition_penalty=given(request.repetition_penalty, 1.0),
        logit_bias=logit_bias(request, vocab_size),
        skip_special_tokens=given(request.skip_special_tokens, True),
        logprobs=num_logprobs(request),
        max_tokens=max_new_tokens(request, prompt_tokens, context),
        structured_outputs=form,
    )
