"""Tool calls, reasoning and forms of answers through the API.

An echo engine shows how answers are read; the bundled model, under templates of two families, that
forms are kept by a model which would write something else.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.serve.conftest import Running, served
from tests.serve.fake import EchoEngine, FakeTokenizer
from tests.serve.test_split import CALLS, written
from whalefall.engine import Engine, EngineConfig
from whalefall.serve import Settings
from whalefall.serve.commands import bundled_path
from whalefall.serve.dialects import FORMATS, tool_format

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Oslo", "Rome"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
OTHER = {"type": "function", "function": {"name": "news"}}
SOURCES = {
    "deepseek_v3": "tools <｜tool▁calls▁begin｜> ```json </think>",
    "deepseek_v31": "tools <｜tool▁calls▁begin｜> </think>",
    "kimi_k2": "tools <|tool_calls_section_begin|> </think>",
    "glm": "tools <tool_call> <arg_key> </think> enable_thinking",
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_family_is_known_by_its_template(name: str) -> None:
    assert tool_format(FakeTokenizer(SOURCES[name])) is FORMATS[name]  # type: ignore[arg-type]
    assert tool_format(FakeTokenizer(SOURCES[name].replace("tools ", ""))) is None  # type: ignore[arg-type]


def echo(name: str, opens: str = "") -> EchoEngine:
    engine = EchoEngine(tokenizer=FakeTokenizer(SOURCES[name], opens))
    engine.max_model_len = 4096  # type: ignore[misc]
    return engine


def ask(client: httpx.Client, text: str, **fields: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": text}], **fields}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def refused(client: httpx.Client, words: str, **fields: Any) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], **fields}
    response = client.post("/v1/chat/completions", json=body)
    assert (response.status_code, words in response.text) == (400, True), response.text


@pytest.mark.parametrize("name", FORMATS)
def test_calls_whole_and_streamed(name: str) -> None:
    text = "Just a moment. " + written(FORMATS[name], CALLS)
    with served(echo(name)) as server, server.client() as client:
        choice = ask(client, text, tools=[TOOL, OTHER])["choices"][0]
        message = choice["message"]
        assert message["content"] == "Just a moment. "
        calls = message["tool_calls"]
        assert [c["function"]["name"] for c in calls] == ["weather", "news"]
        assert [json.loads(c["function"]["arguments"]) for c in calls] == [a for _, a in CALLS]
        assert len({c["id"] for c in calls}) == 2
        # the fake ends by length; an answer that is nothing but calls has no content
        alone = ask(client, written(FORMATS[name], CALLS), tools=[TOOL, OTHER])["choices"][0]
        assert alone["message"]["content"] is None
        with openai.OpenAI(base_url=server.url + "/v1", api_key="none") as official:
            names, arguments, content = {}, {0: "", 1: ""}, ""
            stream = official.chat.completions.create(
                model="echo", messages=[{"role": "user", "content": text}], stream=True,
                tools=[TOOL, OTHER],
            )  # type: ignore[call-overload]  # fmt: skip
            for chunk in stream:
                delta = chunk.choices[0].delta
                content += delta.content or ""
                for call in delta.tool_calls or ():
                    if call.function.name:
                        names[call.index] = call.function.name
                    arguments[call.index] += call.function.arguments or ""
        assert (names, content) == ({0: "weather", 1: "news"}, "Just a moment. ")
        assert [json.loads(a) for a in arguments.values()] == [a for _, a in CALLS]
        off = ask(client, text, tools=[TOOL], tool_choice="none")["choices"][0]["message"]
        assert off["content"] == text
        one = ask(client, text, tools=[TOOL, OTHER], parallel_tool_calls=False)["choices"][0]
        assert len(one["message"]["tool_calls"]) == 1


def test_reasoning_under_both_names_and_counted() -> None:
    text = "I wonder.</think>Yes."
    with served(echo("deepseek_v31", opens="<think>")) as server, server.client() as client:
        # the fake echoes what opens the reasoning too, after the answer
        body = ask(client, text)
        message = body["choices"][0]["message"]
        assert message["reasoning"] == message["reasoning_content"] == "I wonder."
        assert message["content"] == "Yes.<think>"
        assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == len(
            "I wonder.</think>"
        )
        request = {"messages": [{"role": "user", "content": text}], "stream": True}
        events = client.post("/v1/chat/completions", json=request).text.split("\n\n")
        deltas = [
            json.loads(e[6:])["choices"][0]["delta"] for e in events if e.startswith("data: {")
        ]
        assert "".join(d.get("reasoning", "") for d in deltas) == "I wonder."
        assert "".join(d.get("content") or "" for d in deltas) == "Yes.<think>"
        unended = ask(client, "hm")["choices"][0]["message"]
        assert (unended["content"], unended["reasoning"]) == (None, "hm<think>")


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"reasoning_effort": "high"}, True),
        ({"reasoning_effort": "none"}, False),
        ({"thinking": {"type": "enabled"}}, True),
        ({"thinking": {"type": "disabled"}, "reasoning_effort": "high"}, False),
    ],
)
def test_reasoning_is_asked_of_the_template_under_each_familys_name(
    fields: dict[str, Any], wanted: bool
) -> None:
    with served(echo("glm")) as server, server.client() as client:
        ask(client, "hello", **fields)
        shown = server.engine.tokenizer.shown
        assert shown["thinking"] is shown["enable_thinking"] is wanted
    with served(EchoEngine()) as server, server.client() as client:  # knows no reasoning
        if wanted:
            refused(client, "knows no reasoning", **fields)
        elif len(fields) == 1:
            ask(client, "hello", **fields)
    engine = EchoEngine()
    engine.tokenizer.template_source = "{{ content.split('</think>')[-1] }}"  # V3's, and ours
    with served(engine) as server, server.client() as client:
        if wanted:
            refused(client, "knows no reasoning", **fields)


def test_tools_and_earlier_calls_reach_the_template() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "42"},
    ]
    for name, arguments in (("deepseek_v31", '{"x": 1}'), ("glm", {"x": 1})):
        engine = echo(name)
        with served(engine) as server, server.client() as client:
            ask(client, "", messages=messages, tools=[TOOL])
            shown = engine.tokenizer.shown
            assert shown["tools"] == [TOOL]
            assert shown["messages"][1]["content"] is None
            assert shown["messages"][1]["tool_calls"][0]["function"]["arguments"] == arguments
            assert shown["messages"][2]["content"] == "42"
            broken = {**call, "function": {"name": "f"}} if name == "glm" else {"id": "b"}
            refused(
                client, "malformed",
                messages=[{"role": "assistant", "tool_calls": [broken]}, *messages], tools=[TOOL],
            )  # fmt: skip


def test_combinations_that_are_not_supported_say_so() -> None:
    form = {"type": "json_object"}
    with served(echo("deepseek_v31", "<think>")) as server, server.client() as client:
        refused(client, "together with a form", tools=[TOOL], response_format=form)
        refused(client, "guided_regex and response_format together", guided_regex="a",
                response_format=form)  # fmt: skip
        refused(client, "together with reasoning", response_format=form)
        refused(client, "tool_choice names 'x', there is weather", tools=[TOOL],
                tool_choice={"type": "function", "function": {"name": "x"}})  # fmt: skip
        refused(client, "wanted none, auto, required", tools=[TOOL], tool_choice="sometimes")
        for allowed, words in (
            ({"mode": "auto", "tools": []}, "wants a mode"),
            ({"mode": "none", "tools": [named("weather")]}, "wants a mode"),
            ("weather", "wants a mode"),
            ({"mode": "auto", "tools": ["weather"]}, "wanted none, auto, required"),
            ({"mode": "auto", "tools": [named("x")]}, "allows 'x', there is weather"),
        ):
            choice = {"type": "allowed_tools", "allowed_tools": allowed}
            refused(client, words, tools=[TOOL], tool_choice=choice)
        refused(client, "tools[0] wants", tools=[{"type": "function"}])
        refused(client, "tools[0] wants", tools=[{"type": "code_interpreter"}])
        refused(client, "has no schema", response_format={"type": "json_schema"})
        refused(client, "structured_outputs.xml", structured_outputs={"xml": "a"})
    with served(echo("deepseek_v31")) as server, server.client() as client:
        refused(client, "ignore_eos", guided_choice=["a"], ignore_eos=True)


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def test_only_allowed_tools_are_shown() -> None:
    with served(echo("deepseek_v31")) as server, server.client() as client:
        allowed = {"mode": "auto", "tools": [named("news")]}
        choice = {"type": "allowed_tools", "allowed_tools": allowed}
        ask(client, "hello", tools=[TOOL, OTHER], tool_choice=choice)
        assert server.engine.tokenizer.shown["tools"] == [OTHER]


TEMPLATES = {
    "deepseek_v31": (
        "{% for m in messages %}{{ m.content or '' }}{% endfor %}{% if tools %}tools{% endif %}"
        "{{ '<｜Assistant｜>' }}{% if thinking %}<think>{% else %}</think>{% endif %}"
        "{# <｜tool▁calls▁begin｜> #}"
    ),
    "glm": "{% for m in messages %}{{ m.content or '' }}{% endfor %}{{ '<｜Assistant｜>' }}"
    "{# tools <tool_call> <arg_key> #}",
    "kimi_k2": "{% for m in messages %}{{ m.content or '' }}{% endfor %}{{ '<｜Assistant｜>' }}"
    "{# tools <|tool_calls_section_begin|> #}",
    "deepseek_v3": "{% for m in messages %}{{ m.content or '' }}{% endfor %}{{ '<｜Assistant｜>' }}"
    "{# tools <｜tool▁calls▁begin｜> ```json #}",
}


def checkpoint(folder: Path, template: str) -> Path:
    """The bundled checkpoint under another template."""
    shutil.copytree(bundled_path(), folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "chat_template": template}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module", params=TEMPLATES)
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    folder = checkpoint(tmp_path_factory.mktemp("m") / "model", TEMPLATES[request.param])
    engine = Engine(folder, EngineConfig(num_blocks=64, speculative=True))
    with served(engine, Settings(request.param)) as running:
        yield running


def test_a_call_is_made_where_one_is_required(server: Running) -> None:
    with server.client() as client:
        for seed in range(3):
            fields = {"tools": [TOOL, OTHER], "seed": seed, "max_tokens": 600, "temperature": 0.3}
            named = {"type": "function", "function": {"name": "weather"}}
            choice = ask(client, "weather?", tool_choice=named, **fields)["choices"][0]
            (call,) = choice["message"]["tool_calls"]
            arguments = json.loads(call["function"]["arguments"])
            assert set(arguments) == {"city", "days"}
            assert arguments["city"] in ("Oslo", "Rome")
            assert arguments["days"] in range(1, 10)
            assert choice["finish_reason"] == "stop"
            if "kimi" in server.engine.tokenizer.template_source:
                assert re.fullmatch(r"functions\.weather:\d+", call["id"])
            required = ask(
                client, "weather?", tool_choice="required", parallel_tool_calls=False,
                **{**fields, "tools": [TOOL]},
            )["choices"][0]  # fmt: skip
            assert required["finish_reason"] == "tool_calls"
            assert required["message"]["tool_calls"][0]["function"]["name"] == "weather"
            assert required["message"]["content"] is None


def test_a_function_without_parameters_gets_none(server: Running) -> None:
    with server.client() as client:
        allowed = {"mode": "required", "tools": [named("stop")]}
        one_of_two = {"type": "allowed_tools", "allowed_tools": allowed}
        for choice in (named("stop"), one_of_two):
            for seed in range(3):
                made = ask(client, "stop!", tools=[TOOL, named("stop")], tool_choice=choice,
                           max_tokens=200, seed=seed,
                           parallel_tool_calls=False)["choices"][0]  # fmt: skip
                (call,) = made["message"]["tool_calls"]
                assert call["function"]["name"] == "stop"
                assert json.loads(call["function"]["arguments"]) == {}


def test_forms_of_answers(server: Running) -> None:
    schema = TOOL["function"]["parameters"]  # type: ignore[index]
    asked = [
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "w", "schema": schema},
            }
        },
        {"guided_json": schema},
        {"guided_json": json.dumps(schema)},
        {"structured_outputs": {"json": schema}},
    ]
    with server.client() as client:
        for fields in asked:
            body = ask(client, "weather?", max_tokens=600, temperature=0.3, **fields)
            found = json.loads(body["choices"][0]["message"]["content"])
            assert found["city"] in ("Oslo", "Rome")
            assert body["choices"][0]["finish_reason"] == "stop"
        for fields, pattern in (
            ({"guided_choice": ["left", "right"]}, "left|right"),
            ({"guided_regex": "[0-9]{3}"}, r"\d{3}"),
            ({"guided_grammar": 'root ::= "a" "b"'}, "ab"),
        ):
            text = ask(client, "?", n=3, **fields)["choices"][2]["message"]["content"]
            assert re.fullmatch(pattern, text)
            request = {"prompt": "where?", "max_tokens": 20, **fields}
            old = client.post("/v1/completions", json=request).json()
            assert re.fullmatch(pattern, old["choices"][0]["text"])
        refused(client, "structured outputs:", guided_regex="a(")
        refused(client, "structured outputs:", guided_json={"type": "nonsense"})
        stream = {
            "messages": [{"role": "user", "content": "x"}],
            "guided_regex": "a(",
            "stream": True,
        }
        assert client.post("/v1/chat/completions", json=stream).status_code == 400


def test_a_form_waits_for_the_end_of_the_reasoning(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", TEMPLATES["deepseek_v31"])
    engine = Engine(folder, EngineConfig(num_blocks=64))
    end = engine.tokenizer.id_of("</think>")  # type: ignore[union-attr]
    with served(engine, Settings("v31")) as running, running.client() as client:
        fields = {"guided_choice": ["yes", "no"], "chat_template_kwargs": {"thinking": True}}
        body = ask(client, "?", max_tokens=30, temperature=0, logit_bias={str(end): 20}, **fields)
        message = body["choices"][0]["message"]
        assert message["content"] in ("yes", "no")
        assert body["choices"][0]["finish_reason"] == "stop"
