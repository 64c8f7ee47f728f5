"""The JSON of answers: chat and text completions, whole and as chunks, with usage."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from whalefall.serve.split import Piece

__all__ = ["Answer", "usage"]

MAX_NEGATIVE = -9999.0  # JSON has no -inf


def usage(prompt: int, completion: int, cached: int, reasoning: int = 0) -> dict[str, Any]:
    """Token counts in OpenAI's shape, with DeepSeek's two fields."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
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
        pieces: Sequence[Piece],
        logprobs: Any,
        finish_reason: str,
        stop_reason: int | str | None,
    ) -> dict[str, Any]:
        """A finished choice of a response that is sent whole."""
        content: dict[str, Any] = {"text": "".join(piece.text for piece in pieces)}
        if self.chat:
            content = {"message": _message(pieces)}
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
        piece: Piece | None,
        logprobs: Any,
        finish_reason: str | None,
        stop_reason: int | str | None = None,
    ) -> dict[str, Any]:
        """A choice of a streamed chunk, with a piece or without."""
        content: dict[str, Any] = {"text": piece.text if piece else ""}
        if self.chat:
            content = {"delta": _delta(piece) if piece else {}}
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}
        if finish_reason is not None:
            choice["stop_reason"] = stop_reason
        return choice

    def first_choice(self, index: int) -> dict[str, Any]:
        """The chunk that opens a chat choice: its role, and no text yet."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _call_id(piece: Piece) -> str:
    return piece.call_id or f"call_{uuid.uuid4().hex[:24]}"


def _delta(piece: Piece) -> dict[str, Any]:
    """A piece as a streamed message's delta; reasoning under the names of vLLM and of DeepSeek."""
    if piece.kind == "reasoning":
        return {"reasoning": piece.text, "reasoning_content": piece.text}
    if piece.kind == "content":
        return {"content": piece.text}
    call: dict[str, Any] = {"index": piece.call, "function": {"arguments": piece.text}}
    if piece.kind == "call":
        call |= {"id": _call_id(piece), "type": "function"}
        call["function"] = {"name": piece.text, "arguments": ""}
    return {"tool_calls": [call]}


def _message(pieces: Sequence[Piece]) -> dict[str, Any]:
    """The message of a whole answer; content is null where there are only calls or reasoning."""
    texts = {"reasoning": "", "content": ""}
    calls: list[dict[str, Any]] = []
    for piece in pieces:
        if piece.kind == "call":
            function = {"name": piece.text, "arguments": ""}
            calls.append({"id": _call_id(piece), "type": "function", "function": function})
        elif piece.kind == "arguments":
            calls[piece.call]["function"]["arguments"] += piece.text
        else:
            texts[piece.kind] += piece.text
    empty = (calls or texts["reasoning"]) and not texts["content"].strip()
    message: dict[str, Any] = {
        "role": "assistant", "content": None if empty else texts["content"], "refusal": None,
    }  # fmt: skip
    if texts["reasoning"]:
        message |= {"reasoning": texts["reasoning"], "reasoning_content": texts["reasoning"]}
    if calls:
        message["tool_calls"] = calls
    return message
