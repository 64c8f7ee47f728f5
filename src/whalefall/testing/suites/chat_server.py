"""What a server of OpenAI's chat API must do, at its edges too."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

import pytest

__all__ = ["ChatServerSuite"]

ASK = [{"role": "user", "content": "What does tar do?"}]


class ChatServerSuite:
    """Give `url` (http://HOST:PORT) of a running server whose temperature 0 is deterministic."""

    @pytest.fixture
    def url(self) -> str:
        """Where the server listens."""
        raise NotImplementedError("a subclass of ChatServerSuite gives the fixture `url`")

    @pytest.fixture
    def model(self, url: str) -> str:
        """Which model is asked: the server's first."""
        return str(_get(f"{url}/v1/models")["data"][0]["id"])

    def test_a_streamed_answer_is_the_whole_one(self, url: str, model: str) -> None:
        whole = _post(url, model, max_tokens=16)
        events = _stream(url, model, max_tokens=16, stream_options={"include_usage": True})
        choices = [c for event in events for c in event["choices"]]
        text = "".join(c["delta"].get("content") or "" for c in choices)
        assert text == (whole["choices"][0]["message"]["content"] or "")
        reasons = [c["finish_reason"] for c in choices if c.get("finish_reason")]
        assert reasons == [whole["choices"][0]["finish_reason"]]
        assert [e["usage"] for e in events if e.get("usage")][-1]["completion_tokens"] == (
            whole["usage"]["completion_tokens"]
        )

    def test_usage_adds_up_and_max_tokens_holds(self, url: str, model: str) -> None:
        answer = _post(url, model, max_tokens=3)
        usage = answer["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert usage["completion_tokens"] <= 3
        if usage["completion_tokens"] == 3:
            assert answer["choices"][0]["finish_reason"] in ("length", "stop")

    def test_several_answers_have_their_numbers(self, url: str, model: str) -> None:
        answer = _post(url, model, max_tokens=4, n=3, temperature=1.0, seed=1)
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]

    def test_a_stop_string_is_not_in_the_answer(self, url: str, model: str) -> None:
        whole = _post(url, model, max_tokens=16)["choices"][0]["message"]["content"]
        stop = whole[2:5]
        answer = _post(url, model, max_tokens=16, stop=[stop])["choices"][0]
        assert answer["message"]["content"] == whole[: whole.index(stop)]
        assert answer["finish_reason"] == "stop"

    @pytest.mark.parametrize(
        "bad",
        [
            {"messages": []}, {"messages": "hello"}, {"max_tokens": -1}, {"temperature": 9},
            {"top_p": 2}, {"n": 0}, {"stop": 7}, {"messages": [{"role": "pope", "content": "x"}]},
        ],
        ids=str,
    )  # fmt: skip
    def test_a_bad_request_is_a_400_in_openais_shape(
        self, url: str, model: str, bad: dict[str, Any]
    ) -> None:
        with pytest.raises(urllib.error.HTTPError) as found:
            _post(url, model, **bad)
        with found.value as refusal:
            error = json.load(refusal)["error"]
        assert found.value.code in (400, 422)
        assert error["message"] and "type" in error

    def test_an_unknown_model_is_a_404(self, url: str) -> None:
        with pytest.raises(urllib.error.HTTPError) as found:
            _post(url, "no such model")
        found.value.close()
        assert found.value.code == 404


def _get(address: str) -> Any:
    with urllib.request.urlopen(address, timeout=120) as reply:
        return json.load(reply)


def _open(url: str, model: str, fields: dict[str, Any]) -> Any:
    body = {"model": model, "messages": ASK, "temperature": 0} | fields
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    return urllib.request.urlopen(request, timeout=120)


def _post(url: str, model: str, **fields: Any) -> Any:
    with _open(url, model, fields) as reply:
        return json.load(reply)


def _stream(url: str, model: str, **fields: Any) -> list[Any]:
    with _open(url, model, fields | {"stream": True}) as reply:
        lines = [line[5:].strip() for line in reply if line.startswith(b"data:")]
    assert lines.pop() == b"[DONE]"
    return [json.loads(line) for line in lines]
