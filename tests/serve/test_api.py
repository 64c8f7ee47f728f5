"""The API's shapes, through httpx and through OpenAI's own client."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from tests.serve.conftest import Running, served
from tests.serve.fake import EchoEngine
from whalefall.serve import Settings

HELLO = [{"role": "user", "content": "hello"}]


def chat(client: httpx.Client, **fields: Any) -> httpx.Response:
    return client.post("/v1/chat/completions", json={"messages": HELLO, **fields})


def events(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [part for part in response.text.split("\n\n") if part.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_chat_answer_has_text_reason_and_usage(client: httpx.Client) -> None:
    body = chat(client).json()
    choice = body["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "hello", "refusal": None}
    assert (choice["finish_reason"], choice["index"]) == ("length", 0)
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["usage"]["total_tokens"] == 10
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}
    assert body["usage"]["prompt_cache_miss_tokens"] == 4


def test_a_stream_carries_the_same_text(client: httpx.Client) -> None:
    parts = events(chat(client, stream=True, stream_options={"include_usage": True}))
    assert parts[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    texts = [c["delta"].get("content", "") for p in parts for c in p["choices"]]
    assert "".join(texts) == "hello"
    assert parts[-2]["choices"][0]["finish_reason"] == "length"
    assert parts[-1]["choices"] == []
    assert parts[-1]["usage"]["completion_tokens"] == 5
    assert {p["object"] for p in parts} == {"chat.completion.chunk"}


def test_several_choices_are_kept_apart(client: httpx.Client) -> None:
    body = chat(client, n=3).json()
    assert [c["index"] for c in body["choices"]] == [0, 1, 2]
    assert {c["message"]["content"] for c in body["choices"]} == {"hello"}
    streamed = events(chat(client, n=2, stream=True))
    for index in (0, 1):
        own = [c for p in streamed for c in p["choices"] if c["index"] == index]
        assert "".join(c["delta"].get("content", "") for c in own) == "hello"
        assert own[-1]["finish_reason"] == "length"


def test_completions_take_several_prompts_and_echo(client: httpx.Client) -> None:
    request = {"prompt": ["ab", "cde"], "max_tokens": 2, "echo": True}
    body = client.post("/v1/completions", json=request).json()
    assert [c["text"] for c in body["choices"]] == ["abab", "cdecd"]
    assert body["usage"]["prompt_tokens"] == 5
    ids = client.post("/v1/completions", json={"prompt": [72, 105]}).json()
    assert ids["choices"][0]["text"] == "Hi"


def test_max_completion_tokens_wins_over_max_tokens(client: httpx.Client) -> None:
    body = chat(client, max_tokens=4, max_completion_tokens=2).json()
    assert body["choices"][0]["message"]["content"] == "he"


def test_logprobs_in_both_shapes(client: httpx.Client) -> None:
    content = chat(client, logprobs=True, top_logprobs=1).json()["choices"][0]["logprobs"][
        "content"
    ]
    assert content[0] == {
        "token": "h", "logprob": -0.5, "bytes": [104],
        "top_logprobs": [{"token": "h", "logprob": -0.5, "bytes": [104]}],
    }  # fmt: skip
    request = {"prompt": "abc", "logprobs": 1}
    old = client.post("/v1/completions", json=request).json()["choices"][0]["logprobs"]
    assert old["tokens"] == ["a", "b", "c"]
    assert old["text_offset"] == [0, 1, 2]
    assert old["top_logprobs"][2] == {"c": -0.5}


def test_parts_and_null_content_are_read(client: httpx.Client) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = chat(client, messages=[{"role": "user", "content": parts}]).json()
    assert body["choices"][0]["message"]["content"] == "ab"


def test_the_openai_client_works(server: Running) -> None:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none") as client:
        assert client.models.list().data[0].id == "echo"
        done = client.chat.completions.create(model="echo", messages=HELLO)  # type: ignore[arg-type]
        assert done.choices[0].message.content == "hello"
        stream = client.chat.completions.create(model="echo", messages=HELLO, stream=True)  # type: ignore[call-overload]
        assert "".join(c.choices[0].delta.content or "" for c in stream) == "hello"
        with pytest.raises(openai.NotFoundError, match="'gpt' does not exist; there is 'echo'"):
            client.chat.completions.create(model="gpt", messages=HELLO)  # type: ignore[arg-type]


def test_tokenize_and_detokenize_are_inverse(client: httpx.Client) -> None:
    body = client.post("/tokenize", json={"prompt": "tar"}).json()
    assert body == {"tokens": [116, 97, 114], "count": 3, "max_model_len": 64}
    back = client.post("/detokenize", json={"tokens": body["tokens"]}).json()
    assert back == {"prompt": "tar"}
    assert client.post("/tokenize", json={"messages": HELLO}).json()["count"] == 5


def test_metrics_count_what_was_served(client: httpx.Client) -> None:
    chat(client)
    text = client.get("/metrics").text
    assert "whalefall_generation_tokens_total 5.0" in text
    assert "whalefall_ledger_hit_tokens 1.0" in text
    assert "whalefall_ledger_miss_tokens 4.0" in text
    assert 'whalefall_http_requests_total{path="/v1/chat/completions",status="200"} 1.0' in text
    assert "whalefall_expert_load_max_over_mean 1.5" in text
    assert "whalefall_spec_drafted_tokens_total 8.0" in text
    assert "whalefall_spec_accepted_tokens_total 6.0" in text
    ledger = client.get("/ledger").json()
    assert ledger["revenue_output_dollars"] == pytest.approx(5 * 2.19e-6)


def test_the_page_asks_no_other_host(client: httpx.Client) -> None:
    text = client.get("/").text
    assert "/v1/chat/completions" in text
    assert "http://" not in text
    assert "https://" not in text


def test_a_key_is_wanted_where_one_is_set() -> None:
    with served(EchoEngine(), Settings("echo", api_key="secret")) as server:
        with server.client() as client:
            refused = chat(client)
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_api_key"
            assert client.get("/v1/models").status_code == 401
            assert client.get("/ledger").status_code == 401
            assert client.get("/health").status_code == 200
        with server.client(headers={"Authorization": "Bearer secret"}) as client:
            assert chat(client).status_code == 200
