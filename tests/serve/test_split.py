"""Answers taken apart, whole and byte by byte, in every family's own format."""

from __future__ import annotations

import json
from typing import Any

import pytest

from whalefall.serve.dialects import FORMATS, ToolFormat
from whalefall.serve.split import Splitter

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
}
CALLS = [("weather", {"city": "Oslo", "days": 3}), ("news", {"topics": ["a<b", "c"], "on": True})]


def written(form: ToolFormat, calls: list[tuple[str, dict[str, Any]]]) -> str:
    """Calls as the published templates write them (literally, not through `ToolFormat`)."""
    parts = []
    for number, (name, arguments) in enumerate(calls):
        text = json.dumps(arguments)
        if form.name == "deepseek_v3":
            parts.append(
                f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{text}\n```<｜tool▁call▁end｜>"
            )
        elif form.name == "deepseek_v31":
            parts.append(f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{text}<｜tool▁call▁end｜>")
        elif form.name == "kimi_k2":
            parts.append(
                f"<|tool_call_begin|>functions.{name}:{number}<|tool_call_argument_begin|>{text}"
                "<|tool_call_end|>"
            )
        else:
            pairs = "".join(
                f"<arg_key>{key}</arg_key>\n<arg_value>"
                f"{value if isinstance(value, str) else json.dumps(value)}</arg_value>\n"
                for key, value in arguments.items()
            )
            parts.append(f"<tool_call>{name}\n{pairs}</tool_call>")
    if form.name.startswith("deepseek"):
        between = "\n" if form.name == "deepseek_v3" else ""
        return "<｜tool▁calls▁begin｜>" + between.join(parts) + "<｜tool▁calls▁end｜>"
    if form.name == "kimi_k2":
        return "<|tool_calls_section_begin|>" + "".join(parts) + "<|tool_calls_section_end|>"
    return "\n".join(parts)


def read(splitter: Splitter, text: str, size: int) -> dict[str, Any]:
    """What comes out of a text given in pieces of `size` characters."""
    pieces = []
    for start in range(0, len(text), size):
        pieces += splitter.feed(text[start : start + size])
    pieces += splitter.end()
    found: dict[str, Any] = {"reasoning": "", "content": "", "calls": []}
    for piece in pieces:
        assert piece.text
        if piece.kind == "call":
            found["calls"].append([piece.text, ""])
        elif piece.kind == "arguments":
            found["calls"][piece.call][1] += piece.text
        else:
            found[piece.kind] += piece.text
    found["calls"] = [(name, json.loads(text)) for name, text in found["calls"]]
    return found


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize("name", FORMATS)
def test_calls_and_the_text_before_them(name: str, size: int) -> None:
    form = FORMATS[name]
    text = "I look < it up." + written(form, CALLS) + "never shown" * (not form.pairs)
    found = read(Splitter(form, {"weather": WEATHER}), text, size)
    assert found == {"reasoning": "", "content": "I look < it up.", "calls": CALLS}


@pytest.mark.parametrize("name", FORMATS)
def test_calls_beyond_the_most_are_dropped(name: str) -> None:
    splitter = Splitter(FORMATS[name], {"weather": WEATHER}, max_calls=1)
    assert read(splitter, written(FORMATS[name], CALLS), 5)["calls"] == CALLS[:1]


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_reasoning_opened_by_the_prompt_or_by_the_answer(size: int) -> None:
    opened = Splitter(think=True)
    opened.open_reasoning()
    text = "\nFirst <b>, then.\n</think>\n\nThe answer."
    wanted = {"reasoning": "First <b>, then.", "content": "The answer.", "calls": []}
    assert read(opened, text, size) == wanted
    assert read(Splitter(think=True), "\n<think>" + text, size) == wanted


def test_an_answer_without_tags_is_content_and_one_that_never_ends_reasoning_is_all_that() -> None:
    assert read(Splitter(think=True), "<the> answer", 1)["content"] == "<the> answer"
    assert read(Splitter(think=True), "<th", 1)["content"] == "<th"
    assert read(Splitter(think=False), "<think>a</think>", 1)["content"] == "<think>a</think>"
    opened = Splitter(think=True)
    opened.open_reasoning()
    assert read(opened, "and so on</thi", 2) == {
        "reasoning": "and so on</thi", "content": "", "calls": [],
    }  # fmt: skip


def test_calls_after_reasoning_but_not_within() -> None:
    form = FORMATS["deepseek_v31"]
    call = written(form, CALLS[:1])
    splitter = Splitter(form, think=True)
    splitter.open_reasoning()
    found = read(splitter, f"maybe {call}?</think>ok{call}", 4)
    assert found == {"reasoning": f"maybe {call}?", "content": "ok", "calls": CALLS[:1]}


def test_a_call_cut_off_shows_what_there_was() -> None:
    form = FORMATS["deepseek_v31"]
    text = written(form, CALLS[:1])
    splitter = Splitter(form)
    pieces = splitter.feed(text[: text.index("Oslo") + 2])
    assert [(p.kind, p.text) for p in pieces] == [
        ("call", "weather"),
        ("arguments", '{"city": "Os'),
    ]
    glm = Splitter(FORMATS["glm"])
    assert [p.kind for p in glm.feed("<tool_call>weather\n<arg_key>ci") + glm.end()] == ["call"]


def test_values_of_pairs_follow_the_schema() -> None:
    form = FORMATS["glm"]
    text = "<arg_key>{}</arg_key>\n<arg_value>12</arg_value>"
    text = text.format("city") + text.format("x")
    assert json.loads(form.arguments(text, WEATHER)) == {"city": "12", "x": 12}
    assert json.loads(form.arguments("", WEATHER)) == {}


def test_kimi_calls_carry_their_ids() -> None:
    pieces = Splitter(FORMATS["kimi_k2"]).feed(written(FORMATS["kimi_k2"], CALLS))
    assert [p.call_id for p in pieces if p.kind == "call"] == [
        "functions.weather:0",
        "functions.news:1",
    ]
