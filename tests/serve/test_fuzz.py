"""Requests that follow the API's schema, and some that do not: no crash, and the server lives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serve.conftest import Running, served
from whalefall import jit
from whalefall.engine import Engine, EngineConfig
from whalefall.serve import Settings
from whalefall.serve.commands import bundled_path

POSTS = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")
WORDS = st.sampled_from(
    ["", "a", "tar", "user", "assistant", "tool", "system", "type", "function", "name", "text",
     "json_object", "json_schema", "schema", "required", "none", "auto", "content", "role",
     "</think>", "\ud7ff", "\0", "é😀", "object", "string", "properties", "[a-z]+", "(",
     'root ::= "a"']
)  # fmt: skip
NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([0, 1, 2**31, 2**63, -(2**63), 1e-9, 0.5, 1e300, -1.0]),
    st.just(float("nan")),
    st.just(float("inf")),
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=8,
)
ROLES = st.sampled_from(["user", "assistant", "system", "developer", "tool"])
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": ROLES, "content": WORDS}), min_size=1, max_size=3
)
ODD_MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": ROLES}, optional={"content": VALUES, "tool_calls": VALUES, "name": WORDS}
    ),
    max_size=3,
)
TOKENS = st.lists(st.integers(0, 2047), min_size=1, max_size=5)
NEEDED: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "/v1/chat/completions": st.fixed_dictionaries({"messages": MESSAGES | ODD_MESSAGES}),
    "/v1/completions": st.fixed_dictionaries({"prompt": WORDS | TOKENS | VALUES}),
    "/tokenize": st.fixed_dictionaries({"prompt": WORDS})
    | st.fixed_dictionaries({"messages": MESSAGES | ODD_MESSAGES}),
    "/detokenize": st.fixed_dictionaries({"tokens": TOKENS | VALUES}),
}
FORMS = st.one_of(
    st.fixed_dictionaries({"response_format": st.fixed_dictionaries(
        {"type": st.sampled_from(["json_schema", "json_object", "text"])},
        optional={"json_schema": st.fixed_dictionaries({"schema": VALUES}) | VALUES},
    )}),
    st.fixed_dictionaries({"guided_json": VALUES}),
    st.fixed_dictionaries({"guided_regex": WORDS}),
    st.fixed_dictionaries({"guided_grammar": WORDS}),
    st.fixed_dictionaries({"guided_choice": st.lists(WORDS, max_size=2)}),
    st.fixed_dictionaries({"structured_outputs": st.dictionaries(
        st.sampled_from(["json", "regex", "choice", "grammar", "json_object"]), VALUES, max_size=2
    )}),
    st.just({}),
)  # fmt: skip


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    before = jit.get_num_threads()
    jit.set_num_threads(1)
    config = EngineConfig(num_blocks=16, speculative=True)
    with served(Engine(bundled_path(), config), Settings("fuzzed")) as server:
        yield server
    jit.set_num_threads(before)


def strategy(schema: dict[str, Any], components: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that a field's schema allows, roughly."""
    if "anyOf" in schema:
        return st.one_of([strategy(each, components) for each in schema["anyOf"]])
    if "$ref" in schema:
        return strategy(components[schema["$ref"].rsplit("/", 1)[1]], components)
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kind = schema.get("type")
    if kind == "integer":
        low = schema.get("minimum", -2)
        return st.integers(low, max(low, min(schema.get("maximum", 20), 20)))
    if kind == "number":
        low, high = schema.get("minimum", -2), schema.get("maximum", 2)
        return st.floats(low, high)
    if kind == "array":
        return st.lists(strategy(schema.get("items", {}), components), max_size=3)
    plain = {"string": WORDS, "boolean": st.booleans(), "null": st.none()}
    return plain.get(kind or "", VALUES)


def bodies(app: Any, path: str) -> st.SearchStrategy[dict[str, Any]]:
    document = app.openapi()
    components = document["components"]["schemas"]
    content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    fields = components[content["schema"]["$ref"].rsplit("/", 1)[1]]["properties"]
    good = {name: strategy(schema, components) for name, schema in fields.items()}
    good["model"] = st.sampled_from(["fuzzed", "fuzzed", None, "other"])
    noise = st.dictionaries(st.sampled_from(sorted(fields)), VALUES, min_size=1, max_size=2)
    picked = st.lists(st.sampled_from(sorted(good)), max_size=3, unique=True)
    some = picked.flatmap(lambda names: st.fixed_dictionaries({n: good[n] for n in names}))
    seldom = [st.just({})] * 3
    parts = [NEEDED[path], some, st.one_of(*seldom, noise)]
    if "guided_json" in fields:
        limit = st.fixed_dictionaries({"max_tokens": st.integers(1, 6)})
        parts += [limit, st.one_of(*seldom, FORMS)]
    return st.tuples(*parts).map(lambda given: {k: v for each in given for k, v in each.items()})


@pytest.mark.parametrize("path", POSTS)
def test_no_request_crashes_the_server(path: str, running: Running) -> None:
    served_well = 0
    with running.client() as client:

        @settings(
            max_examples=150, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(bodies(running.app, path))
        def send(body: dict[str, Any]) -> None:
            nonlocal served_well
            try:
                data = json.dumps(body).encode()
            except (ValueError, UnicodeEncodeError):
                return
            answer = client.post(path, content=data, headers={"Content-Type": "application/json"})
            assert answer.status_code in (200, 400, 404), (answer.status_code, answer.text, body)
            served_well += answer.status_code == 200
            if answer.status_code != 200:
                error = answer.json()["error"]
                assert error["message"]
                assert "\n" not in error["message"]
            elif not body.get("stream"):
                answer.json()
            else:
                assert "server_error" not in answer.text, (answer.text, body)

        send()
        assert served_well >= 12  # else it says little
        alive = client.post("/v1/completions", json={"prompt": "tar", "max_tokens": 2})
        assert alive.status_code == 200
        for _ in range(100):
            if not client.get("/health").json()["requests"]:
                break
        assert running.engine.stats().kv_used == 0


TINY = 5e-324


EXTREMES: list[dict[str, float]] = [
    {"repetition_penalty": TINY},
    {"temperature": TINY},
    {"temperature": 1e-30, "top_p": 0.5},
    {"top_p": TINY},
    {"min_p": 1.0},
    {"temperature": 2.0, "top_p": TINY},
]


@pytest.mark.parametrize("fields", EXTREMES)
def test_extreme_values_harm_nobody(fields: dict[str, float], running: Running) -> None:
    """Found by a longer run: infinite logits led to a NaN that ended everybody's answers."""
    with running.client() as client:
        body = {"prompt": "The file", "max_tokens": 4, **fields}
        assert client.post("/v1/completions", json=body).status_code in (200, 400)
        if "temperature" in fields and fields["temperature"] < 1:
            cold = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
            body["temperature"] = 0
            assert cold == client.post("/v1/completions", json=body).json()["choices"][0]["text"]


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"messages": 1e999}',
                                  b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}"])  # fmt: skip
def test_what_is_no_request_is_refused(data: bytes, running: Running) -> None:
    with running.client() as client:
        for path in POSTS:
            headers = {"Content-Type": "application/json"}
            answer = client.post(path, content=data, headers=headers)
            assert answer.status_code == 400, (path, answer.status_code, answer.text)
            assert answer.json()["error"]["message"]


def test_other_methods_and_paths(running: Running) -> None:
    with running.client() as client:
        for path in (*POSTS, "/nowhere", "/v1/models/x"):
            for method in ("PUT", "DELETE", "PATCH"):
                answer: httpx.Response = client.request(method, path)
                assert answer.status_code in (404, 405)
                assert answer.json()["error"]["message"]
