"""From a request's messages or prompt to token ids."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from whalefall.errors import WhalefallError
from whalefall.serve.dialects import THINK, tool_format
from whalefall.serve.failures import ApiError
from whalefall.serve.protocol import ChatRequest, CompletionRequest, Sampling, TokenizeRequest

if TYPE_CHECKING:
    from whalefall.model import Tokenizer

__all__ = ["chat_prompt", "completion_prompts", "message_texts"]

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_PROMPTS = 128


def message_texts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with their content as one text; 400 for unknown roles and non-text parts."""
    plain = []
    for position, message in enumerate(messages):
        role = message.get("role")
        where = f"messages[{position}]"
        if role not in ROLES:
            raise ApiError(
                400, f"{where}.role is {role!r}, wanted one of {', '.join(ROLES)}", "messages"
            )
        for field in ("audio", "function_call"):  # of an earlier answer
            if message.get(field) is not None:
                raise ApiError(400, f"{where}.{field} is not supported", "messages")
        content = content_text(message.get("content"), where)
        plain.append({**message, "role": "system" if role == "developer" else role} | content)
    return plain


def content_text(content: Any, where: str) -> dict[str, Any]:
    """{"content": text} of a message's content: a text, null, or a list of text parts."""
    if content is None or isinstance(content, str):
        return {"content": content or ""}
    if not isinstance(content, list):
        raise ApiError(
            400, f"{where}.content is {type(content).__name__}, wanted a text or parts", "messages"
        )
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in ("text", "input_text"):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ApiError(
                400, f"{where}: part {kind!r} is not supported; send text parts", "messages"
            )
        if not isinstance(part.get("text"), str):
            raise ApiError(400, f"{where}: a text part has no text", "messages")
        texts.append(part["text"])
    return {"content": "".join(texts)}


def call_history(message: dict[str, Any], dicts: bool) -> dict[str, Any]:
    """An earlier answer with tool calls as templates want it; `dicts`: arguments as objects."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    try:
        functions = [dict(call["function"]) for call in calls]
        for function in functions:
            if dicts and isinstance(function["arguments"], str):
                function["arguments"] = json.loads(function["arguments"] or "{}")
    except (KeyError, TypeError, ValueError) as problem:
        raise ApiError(
            400, f"tool_calls of an earlier answer are malformed: {problem!r}", "messages"
        ) from None
    calls = [{**call, "function": f} for call, f in zip(calls, functions, strict=True)]
    return {**message, "content": message.get("content") or None, "tool_calls": calls}


def template_options(request: ChatRequest | TokenizeRequest) -> dict[str, Any]:
    """Keyword arguments for the chat template, `thinking` from any of the ways to ask for it."""
    options = dict(request.chat_template_kwargs or {})
    if isinstance(request, ChatRequest):
        wanted = None
        if request.thinking is not None:
            wanted = request.thinking.get("type") == "enabled"
        elif request.reasoning_effort is not None:
            wanted = request.reasoning_effort != "none"
        if wanted is not None:
            for name in ("thinking", "enable_thinking"):  # DeepSeek's name, GLM's
                options.setdefault(name, wanted)
        if request.reasoning_effort is not None:
            options.setdefault("reasoning_effort", request.reasoning_effort)
    for name in ("messages", "tools", "add_generation_prompt"):
        options.pop(name, None)
    return options


def refuse_reasoning(tokenizer: Tokenizer, request: ChatRequest) -> None:
    """400 where reasoning is asked of a model whose template knows none."""
    source = getattr(tokenizer, "template_source", "")
    # V3's strips </think> from earlier answers, and no more: what opens reasoning tells.
    if any(word in source for word in (THINK[0], "thinking", "reasoning_effort")):
        return
    for field, off in (("reasoning_effort", "none"), ("thinking", {"type": "disabled"})):
        if getattr(request, field) not in (None, off):
            raise ApiError(
                400, f"{field}: this model's chat template knows no reasoning; leave it out", field
            )


def chat_prompt(
    tokenizer: Tokenizer,
    request: ChatRequest | TokenizeRequest,
    tools: list[dict[str, Any]] | None = None,
) -> list[int]:
    """The token ids of a chat request's prompt; `tools`: those that it shows."""
    if isinstance(request, ChatRequest):
        refuse_reasoning(tokenizer, request)
    add = request.add_generation_prompt
    dialect = tool_format(tokenizer)
    messages = message_texts(request.messages or [])
    messages = [call_history(m, dialect is not None and dialect.dicts) for m in messages]
    try:
        ids = tokenizer.apply_chat_template(
            messages,
            tools=tools,
            add_generation_prompt=True if add is None else add,
            **template_options(request),
        )
    except WhalefallError as error:
        raise ApiError(400, str(error), "messages") from None
    return truncated(ids, request)


def completion_prompts(
    tokenizer: Tokenizer, vocab: int, request: CompletionRequest
) -> list[list[int]]:
    """The token ids of each prompt of a completions request, all below `vocab`."""
    given = request.prompt
    items: list[Any] = [given]
    if isinstance(given, list) and (not given or not isinstance(given[0], int)):
        items = list(given)
    if not items or len(items) > MAX_PROMPTS:
        raise ApiError(
            400, f"prompt: got {len(items)} prompts, wanted 1 to {MAX_PROMPTS}", "prompt"
        )
    prompts = []
    for item in items:
        ids = tokenizer.encode(item) if isinstance(item, str) else list(item)
        if not ids:
            raise ApiError(400, "prompt: got an empty prompt, wanted at least one token", "prompt")
        worst = max(ids)
        if worst >= vocab or min(ids) < 0:
            raise ApiError(
                400, f"prompt: token id {worst} is outside the vocabulary of {vocab}", "prompt"
            )
        prompts.append(truncated(ids, request))
    return prompts


def truncated(ids: list[int], request: Sampling | TokenizeRequest) -> list[int]:
    """The last `truncate_prompt_tokens` ids where that is asked for."""
    limit = request.truncate_prompt_tokens if isinstance(request, Sampling) else None
    return ids[-limit:] if limit else ids
