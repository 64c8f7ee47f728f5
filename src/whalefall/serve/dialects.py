"""How a family of models writes tool calls and reasoning, found out from its chat template.

Sources: the published templates of DeepSeek-V3, R1, V3.1, Kimi-K2 and GLM-4.5 to 4.7.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from whalefall.model import Tokenizer

__all__ = ["FORMATS", "THINK", "ToolFormat", "thinks", "tool_format"]

THINK = ("<think>", "</think>")


@dataclass(frozen=True)
class ToolFormat:
    """The texts around calls: begin (open NAME middle ARGUMENTS close between)… end.

    Attributes:
        name: the family.
        begin, end: around all calls; "" where there is nothing.
        open, close: around one call.
        before: what stands before the name in a call.
        middle: between name and arguments.
        between: between calls.
        pairs: arguments are <arg_key>, <arg_value> pairs and no JSON (GLM).
        numbered: the header is functions.NAME:NUMBER, and the call's id (Kimi).
        dicts: the template wants arguments as an object, not as JSON text.
    """

    name: str
    begin: str
    open: str
    middle: str
    close: str
    end: str
    before: str = ""
    between: str = ""
    pairs: bool = False
    numbered: bool = False
    dicts: bool = False

    def function(self, header: str) -> str:
        """The function's name in what stands between `open` and `middle`."""
        name = header.strip().removeprefix(self.before).strip()
        if self.numbered:
            name = name.removeprefix("functions.").rpartition(":")[0] or name
        return name

    def arguments(self, text: str, schema: dict[str, Any]) -> str:
        """The arguments as JSON; `schema`: the function's parameters, for types of pairs."""
        if not self.pairs:
            return text
        found: dict[str, Any] = {}
        types = schema.get("properties") or {}
        for key, value in re.findall(
            r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", text, re.DOTALL
        ):
            found[key] = _typed(value, types.get(key))
        return json.dumps(found, ensure_ascii=False)


def _typed(value: str, schema: Any) -> Any:
    """A pair's value: a text where the schema wants one, else JSON, else the text as it is."""
    if isinstance(schema, dict) and schema.get("type") == "string":
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


FORMATS = {
    "deepseek_v3": ToolFormat(
        "deepseek_v3",
        begin="<｜tool▁calls▁begin｜>",
        open="<｜tool▁call▁begin｜>",
        before="function<｜tool▁sep｜>",
        middle="\n```json\n",
        close="\n```<｜tool▁call▁end｜>",
        between="\n",
        end="<｜tool▁calls▁end｜>",
    ),
    "deepseek_v31": ToolFormat(
        "deepseek_v31",
        begin="<｜tool▁calls▁begin｜>",
        open="<｜tool▁call▁begin｜>",
        middle="<｜tool▁sep｜>",
        close="<｜tool▁call▁end｜>",
        end="<｜tool▁calls▁end｜>",
    ),
    "kimi_k2": ToolFormat(
        "kimi_k2",
        begin="<|tool_calls_section_begin|>",
        open="<|tool_call_begin|>",
        middle="<|tool_call_argument_begin|>",
        close="<|tool_call_end|>",
        end="<|tool_calls_section_end|>",
        numbered=True,
    ),
    "glm": ToolFormat(
        "glm",
        begin="",
        open="<tool_call>",
        middle="\n",
        close="</tool_call>",
        end="",
        between="\n",
        pairs=True,
        dicts=True,
    ),
}


def tool_format(tokenizer: Tokenizer) -> ToolFormat | None:
    """The family's format; None where the template does not know tools."""
    source = getattr(tokenizer, "template_source", "")
    if "tools" not in source:
        return None
    if "<tool_call>" in source and "<arg_key>" in source:
        return FORMATS["glm"]
    if "<|tool_calls_section_begin|>" in source:
        return FORMATS["kimi_k2"]
    if "<｜tool▁calls▁begin｜>" in source:
        return FORMATS["deepseek_v3" if "```json" in source else "deepseek_v31"]
    return None


def thinks(tokenizer: Tokenizer) -> bool:
    """Whether the family writes reasoning between <think> and </think>."""
    return THINK[1] in getattr(tokenizer, "template_source", "")
