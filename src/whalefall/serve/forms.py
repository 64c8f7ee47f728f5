"""From a request's fields to the form its answer must have, and to the way it is taken apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from whalefall.engine import StructuredOutputs
from whalefall.errors import WhalefallError
from whalefall.serve.dialects import THINK, ToolFormat, thinks, tool_format
from whalefall.serve.failures import ApiError
from whalefall.serve.protocol import ChatRequest, Sampling
from whalefall.serve.split import Splitter
from whalefall.serve.tool_grammar import tool_grammar

if TYPE_CHECKING:
    from whalefall.model import Tokenizer

__all__ = ["ChatForm", "asked_form", "chat_form"]

_KEYS = ("json", "json_object", "regex", "choice", "grammar")


def asked_form(request: Sampling) -> StructuredOutputs | None:
    """The form that response_format, structured_outputs or a guided_* field asks for.

    Raises: ApiError 400 for a malformed one, or more than one.
    """
    found: dict[str, tuple[str, Any]] = {}
    for key in ("json", "regex", "choice", "grammar"):
        value = getattr(request, f"guided_{key}")
        if value is not None:
            found[f"guided_{key}"] = (key, value)
    for key, value in (request.structured_outputs or {}).items():
        if value is None or value is False:
            continue
        if key not in _KEYS:
            raise ApiError(
                400,
                f"structured_outputs.{key} is not supported, send one of {', '.join(_KEYS)}",
                "structured_outputs",
            )
        found[f"structured_outputs.{key}"] = (key, value)
    found |= _response_format(request.response_format)
    if len(found) > 1:
        raise ApiError(400, f"{' and '.join(found)} together are not supported", list(found)[1])
    for name, (key, value) in found.items():
        try:
            return StructuredOutputs(**{key: value})
        except WhalefallError as error:
            raise ApiError(400, str(error), name) from None
    return None


def _response_format(given: dict[str, Any] | None) -> dict[str, tuple[str, Any]]:
    kind = (given or {"type": "text"}).get("type")
    if given is None or kind == "text":
        return {}
    if kind == "json_object":
        return {"response_format": ("json_object", True)}
    if kind != "json_schema":
        raise ApiError(
            400,
            f"response_format.type is {kind!r}, wanted text, json_object or json_schema",
            "response_format",
        )
    inner = given.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, dict) else None
    if not isinstance(schema, dict):
        raise ApiError(400, "response_format.json_schema has no schema", "response_format")
    return {"response_format": ("json", schema)}


@dataclass(frozen=True)
class ChatForm:
    """How the answers of a chat request are formed and read.

    Attributes:
        tools: functions that the prompt shows; None: none.
        dialect: the family's format of calls, where calls are looked for.
        structured: the form of the answer.
        splitter: makes what takes one answer apart.
        calls_end_as: finish_reason of an answer with calls that ended by itself.
        keep_special: whether special tokens must stay in the text to be understood.
    """

    tools: list[dict[str, Any]] | None
    dialect: ToolFormat | None
    structured: StructuredOutputs | None
    splitter: Callable[[], Splitter]
    calls_end_as: str
    keep_special: bool

    def after(self, prompt_end: str, tokenizer: Tokenizer) -> ChatForm:
        """The same for a prompt that ends so: it may have opened the reasoning.

        Raises: ApiError 400 where a form is to begin after reasoning that no one token ends.
        """
        if not (thinks(tokenizer) and prompt_end.rstrip().endswith(THINK[0])):
            return self
        opened = self.splitter
        form = replace(self, splitter=lambda: _opened(opened()))
        if self.structured is None:
            return form
        end = tokenizer.id_of(THINK[1])
        if end is None:
            raise ApiError(
                400, "a form of the answer is not supported together with reasoning here",
                "response_format",
            )  # fmt: skip
        return replace(form, structured=replace(self.structured, start_token=end))


def _opened(splitter: Splitter) -> Splitter:
    splitter.open_reasoning()
    return splitter


def chat_form(request: ChatRequest, tokenizer: Tokenizer) -> ChatForm:
    """Check tools, tool_choice and the answer's form against each other and the model's family.

    Raises: ApiError 400.
    """
    structured = asked_form(request)
    shown, choice = request.tools or [], request.tool_choice
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        shown, choice = _allowed(shown, choice)
    named = _named(choice)
    wanted = choice not in (None, "none", "auto")
    functions = _functions(shown)
    if wanted and not functions:
        raise ApiError(400, "tool_choice asks for a call, but there are no tools", "tool_choice")
    if not functions or choice == "none":
        think = thinks(tokenizer)
        return ChatForm(None, None, structured, lambda: Splitter(think=think), "stop", False)
    dialect = tool_format(tokenizer)
    if dialect is None:
        raise ApiError(
            400,
            'this model\'s chat template knows no tools; leave them out or send tool_choice "none"',
            "tools",
        )
    if structured is not None:
        raise ApiError(
            400, "tools together with a form of the answer are not supported; send tool_choice "
            '"none"', "response_format",
        )  # fmt: skip
    one = request.parallel_tool_calls is False or named is not None
    if wanted:
        allowed = [f for f in functions if named in (None, f["name"])]
        if not allowed:
            names = ", ".join(f["name"] for f in functions)
            raise ApiError(400, f"tool_choice names {named!r}, there is {names}", "tool_choice")
        grammar = tool_grammar(dialect, allowed, not one, tokenizer)
        structured = StructuredOutputs(grammar=grammar)
    schemas = {f["name"]: f.get("parameters") or {} for f in functions}

    def splitter() -> Splitter:
        return Splitter(dialect, schemas, thinks(tokenizer), max_calls=1 if one else None)

    tags = (dialect.begin, dialect.open, dialect.middle.strip(), dialect.end, *THINK)
    special = [tag for tag in tags if (i := tokenizer.id_of(tag)) is not None
               and tokenizer.is_special(i)]  # fmt: skip
    return ChatForm(
        tools=list(shown),
        dialect=dialect,
        structured=structured,
        splitter=splitter,
        calls_end_as="stop" if named is not None else "tool_calls",
        keep_special=bool(special),
    )


def _allowed(
    tools: list[dict[str, Any]], choice: dict[str, Any]
) -> tuple[list[dict[str, Any]], str]:
    """The tools that an `allowed_tools` choice leaves (no others are shown), and its mode."""
    inner = choice.get("allowed_tools", choice)
    mode = inner.get("mode") if isinstance(inner, dict) else None
    given = inner.get("tools") if isinstance(inner, dict) else None
    if mode not in ("auto", "required") or not isinstance(given, list) or not given:
        raise ApiError(
            400,
            "tool_choice.allowed_tools wants a mode, auto or required, and tools",
            "tool_choice",
        )
    names = [_named(each) for each in given]
    there = {f["name"]: tool for f, tool in zip(_functions(tools), tools, strict=True)}
    for name in names:
        if name not in there:
            raise ApiError(
                400, f"tool_choice allows {name!r}, there is {', '.join(there)}", "tool_choice"
            )
    return [tool for name, tool in there.items() if name in names], str(mode)


def _named(choice: Any) -> str | None:
    if choice in (None, "none", "auto", "required"):
        return None
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise ApiError(
            400,
            f"tool_choice is {str(choice)[:80]!r}, wanted none, auto, required or "
            '{"type": "function", "function": {"name": …}}',
            "tool_choice",
        )
    return name


def _functions(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The functions of a request's tools; 400 for anything else."""
    found = []
    for position, tool in enumerate(tools):
        function = tool.get("function")
        good = (
            tool.get("type", "function") == "function"
            and isinstance(function, dict)
            and isinstance(function.get("name"), str)
            and function["name"].strip()
            and isinstance(function.get("parameters") or {}, dict)
        )
        if not good or function is None:
            raise ApiError(
                400,
                f'tools[{position}] wants {{"type": "function", "function": {{"name", '
                '"parameters"}}',
                "tools",
            )
        found.append(function)
    return found
