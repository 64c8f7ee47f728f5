"""Requests of the chat and completions endpoints, field by field.

A field that would change the answer and that is not supported is refused by name (`UNSUPPORTED`),
never ignored in silence; what changes none (`IGNORED`), and fields nobody knows, are accepted.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from whalefall.serve.failures import ApiError

__all__ = [
    "IGNORED",
    "UNSUPPORTED",
    "ChatRequest",
    "CompletionRequest",
    "DetokenizeRequest",
    "Sampling",
    "TokenizeRequest",
    "refuse_unsupported",
]

# Field → the values besides null that ask for nothing; any other is refused by name. A field that
# one endpoint knows is looked up here for the other.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    # OpenAI's
    "audio": (),
    "best_of": (1,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"], []),
    "moderation": (),
    "prediction": (),
    "suffix": ("",),
    "verbosity": ("medium",),
    "web_search_options": (),  # {} asks for a search with default options
    # of the other endpoint
    "echo": (False,),
    "reasoning_effort": ("none",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    # vLLM's, SGLang's and llama.cpp's
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "beam_width": (1,),
    "chat_template": ("",),
    "documents": ([],),
    "ebnf": ("",),
    "grammar": ("",),
    "guided_whitespace_pattern": ("",),
    "json_schema": (),
    "kv_transfer_params": (),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "lora_request": (),
    "mirostat": (0,),
    "prompt_embeds": ([],),
    "prompt_logprobs": (),
    "regex": ("",),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "typical_p": (1.0,),
    "use_beam_search": (False,),
}
# OpenAI's fields that change no answer here: they name a customer, a purpose, a price or a cache
# that works by itself.
IGNORED = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)

Count = Annotated[int, Field(ge=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class Body(BaseModel):
    """Any request's body: unknown fields are kept, and every text in it is Unicode."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="before")
    @classmethod
    def all_is_unicode(cls, body: Any) -> Any:
        """Refuse half a surrogate pair, which JSON can write and no tokenizer can read."""
        for name, value in body.items() if isinstance(body, dict) else ():
            field = name.encode("ascii", "backslashreplace").decode()
            try:
                json.dumps([name, value], ensure_ascii=False).encode()  # the whole tree, in C
            except UnicodeEncodeError as problem:
                half = f"U+{ord(problem.object[problem.start]):04X}"
                raise ApiError(
                    400, f"{field}: holds {half}, half a surrogate pair, wanted Unicode", field
                ) from None
            except RecursionError:
                raise ApiError(400, f"{field}: is nested too deeply", field) from None
        return body


class Sampling(Body):
    """What chat and completions share: OpenAI's fields and vLLM's additions."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    logit_bias: dict[str, float] | None = None
    skip_special_tokens: bool | None = None
    truncate_prompt_tokens: Count | None = None
    cache_salt: str | None = None
    priority: int | None = None
    max_tokens: Count | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    user: str | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )
    thinking: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None


class TokenizeRequest(Body):
    """POST /tokenize: a prompt, or messages through the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


def refuse_unsupported(request: Sampling) -> None:
    """Raise a 400 for a field that would change the answer and that this server cannot honour."""
    for name, value in (request.model_extra or {}).items():
        if value is None or name not in UNSUPPORTED or value in UNSUPPORTED[name]:
            continue
        if name == "best_of" and value == request.n:
            continue  # the best n of n
        raise ApiError(400, f"{name} is not supported yet", param=name)
    if not isinstance(request, ChatRequest):
        return
    if request.continue_final_message:
        raise ApiError(
            400, "continue_final_message is not supported yet", param="continue_final_message"
        )
