"""Model room: chat templates, as Jinja in a sandbox.

In: `chat_template` of tokenizer_config.json, or chat_template.jinja. Out: prompt text.
Truth: Transformers' `apply_chat_template`, whose environment (blocks trimmed, `tojson` without
escapes, `raise_exception`, `strftime_now`) templates are written for.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from whalefall.errors import ConfigError

__all__ = ["ChatTemplate", "load_chat_template"]


def _tojson(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _raise(message: str) -> None:
    raise TemplateError(message)


class ChatTemplate:
    """A compiled chat template."""

    def __init__(self, source: str, where: str = "chat template") -> None:
        """Compile Jinja `source`; ConfigError where it is malformed."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        self.source = source
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as problem:
            raise ConfigError(f"{where}: line {problem.lineno}: {problem.message}") from None

    def render(self, messages: Sequence[dict[str, Any]], **variables: Any) -> str:
        """The prompt of a conversation; ConfigError with the template's words if it refuses."""
        try:
            return self._template.render(messages=list(messages), **variables)
        except (TemplateError, TypeError, AttributeError) as problem:
            raise ConfigError(f"chat template: {problem}") from None


def load_chat_template(folder: Path, config: dict[str, Any]) -> ChatTemplate | None:
    """The template of a checkpoint folder (`chat_template.jinja` wins), None where it has none."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return ChatTemplate(path.read_text(encoding="utf-8"), str(path))
        except UnicodeDecodeError as problem:
            raise ConfigError(f"{path}: not UTF-8 ({problem})") from None
    source = config.get("chat_template")
    if isinstance(source, list):  # several named ones
        by_name = {entry.get("name"): entry.get("template") for entry in source}
        source = by_name.get("default") or next(iter(by_name.values()), None)
    if not source:
        return None
    where = str(folder / "tokenizer_config.json")
    if not isinstance(source, str):
        raise ConfigError(f"{where}: chat_template is {type(source).__name__}, wanted a text")
    return ChatTemplate(source, where)
