"""Log probabilities in the two shapes of OpenAI's API."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from whalefall.engine import TokenLogprobs

__all__ = ["chat_logprobs", "completion_logprobs"]

LOWEST = -9999.0  # JSON has no -inf
Piece = Callable[[int], str]


def entry(piece: Piece, token_id: int, logprob: float) -> dict[str, Any]:
    """{token, logprob, bytes} of one token."""
    text = piece(token_id)
    return {"token": text, "logprob": max(logprob, LOWEST), "bytes": list(text.encode())}


def chat_logprobs(tokens: Sequence[TokenLogprobs], piece: Piece) -> dict[str, Any]:
    """The `logprobs` object of a chat choice.

    Args:
        tokens: one item a token.
        piece: the text of a token id.
    """
    content = []
    for token in tokens:
        item = entry(piece, token.token_id, token.logprob)
        item["top_logprobs"] = [entry(piece, i, p) for i, p in token.top]
        content.append(item)
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokens: Sequence[TokenLogprobs], piece: Piece, first_offset: int
) -> dict[str, Any]:
    """The `logprobs` object of a text completion; `first_offset`: characters before the first."""
    names, values, tops, offsets = [], [], [], []
    offset = first_offset
    for token in tokens:
        name = piece(token.token_id)
        names.append(name)
        values.append(max(token.logprob, LOWEST))
        tops.append({piece(i): max(p, LOWEST) for i, p in token.top})
        offsets.append(offset)
        offset += len(name)
    return {
        "tokens": names,
        "token_logprobs": values,
        "top_logprobs": tops,
        "text_offset": offsets,
    }
