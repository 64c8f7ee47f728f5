"""Each field of OpenAI's schema is honoured, ignored because it changes nothing, or refused."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as TextParams

from tests.serve.test_bad_input import HELLO, TOOL, error
from whalefall.serve.protocol import IGNORED, UNSUPPORTED, ChatRequest, CompletionRequest

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BODIES: dict[str, dict[str, Any]] = {CHAT: {"messages": HELLO}, TEXT: {"prompt": "hello"}}
KNOWN = {CHAT: set(ChatRequest.model_fields), TEXT: set(CompletionRequest.model_fields)}

# What a client sends that wants the feature.
WANTED: dict[str, Any] = {
    "audio": {"voice": "alloy", "format": "wav"},
    "best_of": 3,
    "function_call": {"name": "f"},
    "functions": [{"name": "f", "parameters": {}}],
    "modalities": ["text", "audio"],
    "moderation": {},
    "prediction": {"type": "content", "content": "hello"},
    "suffix": "the end",
    "verbosity": "low",
    "web_search_options": {},
    "echo": True,
    "reasoning_effort": "high",
    "tool_choice": "required",
    "tools": [TOOL],
    "allowed_token_ids": [1],
    "bad_words": ["no"],
    "beam_width": 4,
    "chat_template": "{{ messages }}",
    "documents": [{"title": "a", "text": "b"}],
    "ebnf": 'root ::= "a"',
    "grammar": 'root ::= "a"',
    "guided_whitespace_pattern": " ",
    "json_schema": {},
    "kv_transfer_params": {},
    "length_penalty": 0.0,
    "logits_processors": ["a.b"],
    "lora_request": {"name": "a"},
    "mirostat": 2,
    "prompt_embeds": "AAAA",
    "prompt_logprobs": 0,
    "regex": "a*",
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
    "typical_p": 0.5,
    "use_beam_search": True,
}


@pytest.fixture
def client(shared_client: httpx.Client) -> httpx.Client:
    return shared_client


@pytest.mark.parametrize(("params", "path"), [(ChatParams, CHAT), (TextParams, TEXT)])
def test_every_field_of_the_installed_client_is_known_here(params: Any, path: str) -> None:
    assert set(params.__annotations__) <= KNOWN[path] | set(UNSUPPORTED) | IGNORED
    assert not set(UNSUPPORTED) & IGNORED


def test_each_refused_field_has_its_example() -> None:
    assert set(WANTED) == set(UNSUPPORTED)


@pytest.mark.parametrize(
    ("path", "name"),
    [(path, name) for path in (CHAT, TEXT) for name in WANTED if name not in KNOWN[path]],
)
def test_a_field_that_would_change_the_answer_is_refused_by_name(
    client: httpx.Client, path: str, name: str
) -> None:
    failure = error(client.post(path, json=BODIES[path] | {name: WANTED[name]}), 400)
    assert failure["message"] == f"{name} is not supported yet"
    assert failure["param"] == name
    for off in (None, *UNSUPPORTED[name]):
        assert client.post(path, json=BODIES[path] | {name: off}).status_code == 200, off


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("name", sorted(IGNORED - {"user"}))
@pytest.mark.parametrize("value", ["a", {"a": "b"}, True])
def test_a_field_that_changes_nothing_is_accepted(
    client: httpx.Client, path: str, name: str, value: Any
) -> None:
    plain = client.post(path, json=BODIES[path]).json()["choices"]
    assert client.post(path, json=BODIES[path] | {name: value}).json()["choices"] == plain


def test_the_best_n_of_n_are_all_of_them(client: httpx.Client) -> None:
    answer = client.post(TEXT, json=BODIES[TEXT] | {"best_of": 2, "n": 2})
    assert len(answer.json()["choices"]) == 2


@pytest.mark.parametrize(
    ("field", "value"), [("audio", {"id": "a"}), ("function_call", {"name": "f", "arguments": ""})]
)
def test_an_earlier_answer_of_another_kind_is_refused(
    client: httpx.Client, field: str, value: Any
) -> None:
    messages = [*HELLO, {"role": "assistant", "content": None, field: value}, *HELLO]
    failure = error(client.post(CHAT, json={"messages": messages}), 400)
    assert failure["message"] == f"messages[1].{field} is not supported"


def test_the_openai_client_hears_of_a_search_that_will_not_be(client: httpx.Client) -> None:
    own = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError, match="web_search_options is not supported") as told:
        own.chat.completions.create(
            model="echo", messages=[{"role": "user", "content": "hi"}], web_search_options={}
        )
    assert told.value.param == "web_search_options"
