"""The grammar of an answer that must be tool calls, in the family's own format."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from whalefall.engine.structured import JSON_OPTIONS
from whalefall.serve.dialects import ToolFormat

if TYPE_CHECKING:
    from whalefall.model import Tokenizer

__all__ = ["tool_grammar"]

NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


def tool_grammar(
    form: ToolFormat, tools: list[dict[str, Any]], several: bool, tokenizer: Tokenizer
) -> str:
    """Lark for one call (or `several`) of `tools`, each with its `name` and `parameters`."""

    def literal(text: str) -> str:
        return _literal(text, tokenizer)

    calls = [f"call{number}" for number in range(len(tools))]
    more = f" ({literal(form.between)} call)*" if several and form.between else ""
    if several and not form.between:
        more = " call*"
    lines = [
        f"start: {literal(form.begin)} call{more} {literal(form.end)}",
        f"call: {' | '.join(calls)}",
    ]
    for name, tool in zip(calls, tools, strict=True):
        schema = tool.get("parameters")
        if schema is None:
            schema = NO_PARAMETERS
        elif not schema:
            schema = {"type": "object"}
        header = f"{literal(form.open)} {literal(form.before)}"
        if form.numbered:
            header += f" {literal('functions.' + tool['name'] + ':')} /[0-9]{1, 2}/"
        else:
            header += f" {literal(tool['name'])}"
        if form.pairs:
            body, rules = _pairs(name, schema, literal)
            lines += rules
        else:
            body = f"{name}_arguments"
            lines.append(f"{body}: %json {json.dumps({**schema, 'x-guidance': JSON_OPTIONS})}")
        lines.append(f"{name}: {header} {literal(form.middle)} {body} {literal(form.close)}")
    return "\n".join(lines) + "\n"


def _literal(text: str, tokenizer: Tokenizer) -> str:
    """A text in Lark; a tag in it that is a token of its own has no text for llguidance."""
    parts = []
    for part in re.split(r"(<[^<>\s]+>)", text):
        token = tokenizer.id_of(part) if part else None
        if token is not None and tokenizer.is_added(token):
            parts.append(f"<[{token}]>")
        elif part:
            parts.append(json.dumps(part, ensure_ascii=False))
    return " ".join(parts)


def _pairs(
    name: str, schema: dict[str, Any], literal: Callable[[str], str]
) -> tuple[str, list[str]]:
    """Keys and values in the schema's order; what is not required may be left out."""
    parts, rules = [], []
    for number, (key, value) in enumerate((schema.get("properties") or {}).items()):
        rule = f"{name}_pair{number}"
        if isinstance(value, dict) and value.get("type") == "string" and "enum" not in value:
            body = "/[^<]*/"
        elif isinstance(value, dict) and "enum" in value and value.get("type") == "string":
            body = "(" + " | ".join(literal(str(each)) for each in value["enum"]) + ")"
        else:
            body = f"{rule}_value"
            rules.append(f"{body}: %json {json.dumps(value)}")
        rules.append(
            f"{rule}: {literal('<arg_key>')} {literal(key)} {literal('</arg_key>')} "
            f'"\\n" {literal("<arg_value>")} {body} {literal("</arg_value>")} "\\n"'
        )
        parts.append(rule if key in (schema.get("required") or ()) else f"{rule}?")
    return " ".join(parts) or '""', rules
