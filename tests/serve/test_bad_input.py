"""Every bad request gets a 4xx in OpenAI's shape that names the field, and the server stays up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from tests.serve.conftest import served
from tests.serve.fake import EchoEngine
from whalefall.errors import ConfigError
from whalefall.serve import Settings
from whalefall.serve.commands import listen, warn_of_tokenizer


@pytest.fixture
def client(shared_client: httpx.Client) -> httpx.Client:
    return shared_client


HELLO = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in body["error"]["message"]
    result: dict[str, Any] = body["error"]
    return result


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"temperature": float("1e9")}, "temperature", "less than or equal to 2"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": "many"}, "max_tokens", "got many"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hi"}, "messages", "got hi"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages", "'wizard'"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages", "is int"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages",
            "'image_url' is not supported",
        ),
        ({"stop": [""]}, "stop", "none empty"),
        ({"stop": ["x"] * 17}, "stop", "got 17"),
        ({"logit_bias": {"abc": 1}}, "logit_bias", "'abc'"),
        ({"logit_bias": {"256": 1}}, "logit_bias", "below 256"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"tools": [TOOL]}, "tools", "template knows no tools"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"response_format": {"type": "xml"}}, "response_format", "wanted text, json_object"),
        ({"reasoning_effort": "enormous"}, "reasoning_effort", "Input should be"),
    ],
)
def test_a_bad_field_is_named(
    client: httpx.Client, fields: dict[str, Any], param: str, words: str
) -> None:
    body = {"messages": HELLO} | fields
    failure = error(client.post("/v1/chat/completions", json=body), 400)
    assert failure["param"] == param
    assert words in failure["message"]
    assert client.post("/v1/chat/completions", json={"messages": HELLO}).status_code == 200


def test_unknown_fields_and_tools_that_are_switched_off_are_accepted(client: httpx.Client) -> None:
    body = {"messages": HELLO, "tools": [TOOL], "tool_choice": "none", "service_tier": "auto"}
    assert client.post("/v1/chat/completions", json=body).status_code == 200


@pytest.mark.parametrize("body", [b"", b"{", b"[1", b"\xff\xfe", b'"text"', b"null"])
def test_malformed_json_is_a_400(client: httpx.Client, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    error(client.post("/v1/chat/completions", content=body, headers=headers), 400)


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", ""])
def test_json_under_another_name_is_told_the_right_one(client: httpx.Client, kind: str) -> None:
    body = b'{"messages": [{"role": "user", "content": "hello"}]}'
    headers = {"Content-Type": kind} if kind else {}
    failure = error(client.post("/v1/chat/completions", content=body, headers=headers), 400)
    assert failure["message"] == f"Content-Type is {kind or 'missing'}, wanted application/json"


def test_a_prompt_longer_than_the_context_says_both_numbers(client: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "x" * 65}]}
    failure = error(client.post("/v1/chat/completions", json=body), 400)
    assert failure["code"] == "context_length_exceeded"
    assert "context is 64 tokens; the prompt has 65" in failure["message"]
    body = {"messages": HELLO, "max_tokens": 60}
    failure = error(client.post("/v1/chat/completions", json=body), 400)
    assert "has 5 and 60 new ones" in failure["message"]


@pytest.mark.parametrize("prompt", ["", [], [[]], [256], [-1], [["a", 1]]])
def test_bad_prompts_are_refused(client: httpx.Client, prompt: Any) -> None:
    error(client.post("/v1/completions", json={"prompt": prompt}), 400)


def test_wrong_paths_and_methods_are_in_the_same_shape(client: httpx.Client) -> None:
    error(client.get("/v1/nothing"), 404)
    error(client.get("/v1/chat/completions"), 405)
    assert error(client.get("/v1/models/gpt"), 404)["code"] == "model_not_found"


def test_an_oversized_body_is_refused_by_length_and_by_stream() -> None:
    with served(EchoEngine(), Settings("echo", max_request_bytes=2048)) as server:
        with server.client() as client:
            big = b'{"messages": "' + b"x" * 4096 + b'"}'
            error(client.post("/v1/completions", content=big), 413)
            chunks = (big[i : i + 512] for i in range(0, len(big), 512))
            error(client.post("/v1/completions", content=chunks), 413)
            assert client.get("/health").status_code == 200


def test_a_public_address_needs_a_key() -> None:
    with pytest.raises(ConfigError, match=r"--host 0\.0\.0\.0 .* needs --api-key"):
        Settings("echo", host="0.0.0.0")
    assert Settings("echo", host="::1").api_key is None


HALF = "\\ud800"  # as JSON writes it


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", '{"messages": [{"role": "user", "content": "%s"}]}', "messages"),
        (
            "/v1/chat/completions",
            '{"messages": [{"role": "system", "content": "%s"}, {"role": "user", "content": ""}]}',
            "messages",
        ),
        (
            "/v1/chat/completions",
            '{"stream": true, "messages": [{"role": "user", "content": "a%sb"}]}',
            "messages",
        ),
        ("/v1/completions", '{"prompt": "%s"}', "prompt"),
        ("/v1/completions", '{"prompt": ["good", "%s"]}', "prompt"),
        ("/v1/completions", '{"prompt": "a", "stop": "%s"}', "stop"),
        ("/v1/completions", '{"prompt": "a", "temperature": "%s"}', "temperature"),
        ("/tokenize", '{"prompt": "%s"}', "prompt"),
        ("/tokenize", '{"messages": [{"role": "user", "content": "%s"}]}', "messages"),
        ("/detokenize", '{"tokens": ["%s"]}', "tokens"),
    ],
)
def test_half_a_surrogate_pair_is_a_400(
    client: httpx.Client, path: str, body: str, param: str
) -> None:
    headers = {"Content-Type": "application/json"}
    failure = error(client.post(path, content=body % HALF, headers=headers), 400)
    assert failure["param"] == param
    assert f"{param}: holds U+D800" in failure["message"]
    error(client.post(path, content=f'"{HALF}"', headers=headers), 400)
    good = client.post("/tokenize", content='{"prompt": "\\ud83d\\ude00"}', headers=headers)
    assert good.json()["count"] == 4


@pytest.mark.parametrize(("ids", "warns"), [(100, True), (229, True), (231, False), (256, False)])
def test_a_tokenizer_much_smaller_than_the_vocabulary_gets_one_warning(
    ids: int, warns: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = SimpleNamespace(vocab_size=ids)
    warn_of_tokenizer(SimpleNamespace(tokenizer=tokenizer, model=EchoEngine.model))
    said = capsys.readouterr().err
    assert said.startswith(f"warning: the tokenizer has {ids} ids, the model 256:") == warns
    assert said.count("\n") == warns


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("max_queue", 0, "--max-queue is 0, wanted a whole number >= 1; pass such an int"),
        (
            "max_request_bytes",
            1023,
            "--max-request-bytes is 1023, wanted a whole number >= 1024; pass such an int",
        ),
        ("node_hour", -0.5, "--node-hour is -0.5, wanted a finite number >= 0"),
        ("drain_s", float("inf"), "--drain-seconds is inf, wanted a finite number >= 0"),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value: float, words: str) -> None:
    with pytest.raises(ConfigError, match=f"^serve: {words}$"):
        Settings("echo", **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_cannot_be_is_refused(port: int) -> None:
    with pytest.raises(ConfigError, match=f"--port is {port}, wanted a whole number from 0 to 6"):
        listen("127.0.0.1", port)
