"""Engine room: what a request must be, before anything is done for it."""

from __future__ import annotations

from collections.abc import Sequence as Items

from whalefall.engine.sampling_params import SamplingParams
from whalefall.errors import ConfigError, LimitError

__all__ = ["check_request"]


def check_request(
    request_id: str, prompt: Items[int], params: SamplingParams, max_model_len: int, vocab: int
) -> None:
    """Check a prompt and its parameters against a model.

    Raises: LimitError for a prompt that leaves no room for an answer, ConfigError for ids that the
        model does not have.
    """
    if not len(prompt):
        raise ConfigError(f"add: request {request_id!r} has an empty prompt")
    if len(prompt) >= max_model_len:
        raise LimitError(
            f"the prompt has {len(prompt)} tokens, the context holds {max_model_len}"
            " with the answer; shorten it"
        )
    low, high = min(prompt), max(prompt)
    if low < 0 or high >= vocab:
        raise ConfigError(
            f"add: the prompt has token {low if low < 0 else high}, wanted 0 … {vocab - 1}"
        )
    for token in (*params.logit_bias, *params.stop_token_ids):
        if not 0 <= token < vocab:
            raise ConfigError(
                f"add: logit_bias or stop_token_ids has {token}, wanted 0 … {vocab - 1}"
            )
