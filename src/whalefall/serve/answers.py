"""The JSON of answers: chat and text completions, whole and as chunks, with usage."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Answer", "usage"]

MAX_NEGATIVE = -9999.0  # JSON has no -inf


def usage(prompt: int, completion: int, cached: int) -> dict[str, Any]:
    """Token counts in OpenAI's shape, with DeepSeek's two fields."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": 0},
        "prompt_cache_hit_tokens": cached,
        "prompt_cache_miss_tokens": prompt - cached,
    }


@dataclass
class Answer:
    """One response's identity, and the shapes of its parts.

    Attributes:
        chat: chat completion, else text completion.
        model: the model's name.
    """

    chat: bool
    model: str
    fingerprint: str
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + uuid.uuid4().hex

    def envelope(self, choices: list[dict[str, Any]], chunk: bool) -> dict[str, Any]:
        """The object around choices."""
        kind = "text_completion"
        if self.chat:
            kind = "chat.completion.chunk" if chunk else "chat.completion"
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }

    def whole_choice(
        self,
        index: int,
        text: str,
        logprobs: Any,
        finish_reason: str,
        stop_reason: int | str | None,
    ) -> dict[str, Any]:
        """A finished choice of a response that is sent whole."""
        content: dict[str, Any] = {"text": text}
        if self.chat:
            content = {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {
            "index": index,
            **content,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
        }

    def chunk_choice(
        self,
        index: int,
        text: str,
        logprobs: Any,
        finish_reason: str | None,
        stop_reason: int | str | None = None,
    ) -> dict[str, Any]:
        """A choice of a streamed chunk."""
        content: dict[str, Any] = {"text": text}
        if self.chat:
            content = {"delta": {"content": text} if text else {}}
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}
        if finish_reason is not None:
            choice["stop_reason"] = stop_reason
        return choice

    def first_choice(self, index: int) -> dict[str, Any]:
        """The chunk that opens a chat choice: its role, and no text yet."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
