"""Engine room: answers that must fit a JSON schema, a regular expression, a choice or a grammar.

In: what a request asks for. Out: `Matcher`: which tokens may come next, as a bit mask.
The work is llguidance's; its masks are exact, so speculation and sampling need no second look.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from whalefall.errors import ConfigError
from whalefall.model import Tokenizer

__all__ = ["JSON_OPTIONS", "Grammars", "Matcher", "StructuredOutputs"]

_KEPT = 64  # compiled grammars
# Unbounded white space between JSON's tokens is where small models lose themselves.
JSON_OPTIONS = {"whitespace_pattern": r"[\x20\x0A]{0,16}"}
# The lexer's first fuel ends after some 0.06 s (`(a{1000}){1000}x`: 1.8 s with llguidance's own
# limit), and each mask has a limit too, so that no grammar holds up a server.
_LIMITS = {"initial_lexer_fuel": 150_000, "step_lexer_fuel": 200_000, "step_max_items": 50_000}


@dataclass(frozen=True)
class StructuredOutputs:
    """The form an answer must have, one of these; vLLM's names.

    Attributes:
        json: a JSON schema, as a mapping or as text.
        json_object: any JSON object.
        regex: a regular expression (Rust's syntax) for the whole answer.
        choice: texts, one of which the answer is.
        grammar: a grammar in Lark's or GBNF's notation.
        start_token: where the form begins: after this token (the end of reasoning); None: at once.
    """

    json: Mapping[str, Any] | str | None = None
    json_object: bool = False
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    start_token: int | None = None

    def __post_init__(self) -> None:
        """Check that one form is asked for. Raises: ConfigError."""
        given = [f.name for f in fields(self)[:-1] if getattr(self, f.name) not in (None, False)]
        if len(given) != 1:
            names = ", ".join(f.name for f in fields(self)[:-1])
            raise ConfigError(
                f"structured outputs: got {given or 'nothing'}, wanted one of {names}"
            )
        if self.choice is not None:
            good = all(isinstance(text, str) and text for text in self.choice)
            if isinstance(self.choice, str) or not self.choice or not good:
                raise ConfigError(f"choice is {self.choice!r}, wanted texts that are not empty")
            object.__setattr__(self, "choice", tuple(self.choice))
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise ConfigError(f"{name} is {value!r}, wanted a text")

    def source(self) -> str:
        """The form in llguidance's own notation. Raises: ConfigError where it is malformed."""
        from llguidance import LLMatcher, grammar_from

        try:
            if self.json is not None or self.json_object:
                schema = {"type": "object"} if self.json is None else self.json
                text = schema if isinstance(schema, str) else json.dumps(schema)
                json.loads(text)
                return str(LLMatcher.grammar_from_json_schema(text, defaults=JSON_OPTIONS))
            if self.regex is not None:
                return str(grammar_from("regex", self.regex))
            if self.choice is not None:
                return str(grammar_from("choice", json.dumps(self.choice)))
            return str(grammar_from("grammar", self.grammar or ""))
        except (ValueError, TypeError) as problem:
            raise ConfigError(f"structured outputs: {problem}") from None


class Matcher:
    """Follows one answer through its form.

    Attributes:
        is_active: whether the form has begun.
    """

    def __init__(self, inner: Any, eos: frozenset[int], start_token: int | None) -> None:
        """Follow with llguidance's matcher `inner`, from `start_token` on."""
        self._inner = inner
        self._eos = eos
        self._start = start_token
        self.is_active = start_token is None

    def allowed(self, ahead: Sequence[int] = ()) -> np.ndarray | None:
        """The tokens that may come next (after `ahead`), a bit each, uint8; None: any."""
        if not self.is_active or not self._eos.isdisjoint(ahead):
            return None
        consumed = self._inner.try_consume_tokens(list(ahead)) if ahead else 0
        mask = np.frombuffer(self._inner.compute_bitmask(), np.uint8)
        if consumed:
            self._inner.rollback(consumed)
        return mask if consumed == len(ahead) else None

    def push(self, token: int) -> None:
        """Take the answer's next token."""
        if self.is_active:
            self._inner.consume_token(token)
        elif token == self._start:
            self.is_active = True

    @property
    def is_done(self) -> bool:
        """Whether the form is complete and nothing can follow, or cannot be followed any more."""
        return self.is_active and bool(self._inner.is_stopped())

    @property
    def error(self) -> str:
        """Why the form cannot be followed any more (too complex); "" where it can."""
        return str(self._inner.get_error()) if self._inner.is_error() else ""


class Grammars:
    """Compiles forms for one tokenizer, and keeps the last ones."""

    def __init__(
        self, tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: Sequence[int]
    ) -> None:
        """Compile for a tokenizer; None: every form is refused."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = tuple(eos_token_ids)
        self._native: Any = None
        self._compiled: OrderedDict[str, Any] = OrderedDict()

    def matcher(self, wanted: StructuredOutputs) -> Matcher:
        """A fresh matcher. Raises: ConfigError for a form that cannot be compiled."""
        source = wanted.source()
        inner = self._compiled.pop(source, None) or self._compile(source)
        self._compiled[source] = inner
        if len(self._compiled) > _KEPT:
            self._compiled.popitem(last=False)
        return Matcher(inner.deep_copy(), frozenset(self._eos), wanted.start_token)

    def _compile(self, source: str) -> Any:
        from llguidance import LLMatcher, LLParserLimits

        inner = LLMatcher(
            self._native_tokenizer(), source, log_level=0, limits=LLParserLimits(**_LIMITS)
        )
        if inner.is_error():
            message = " ".join(inner.get_error().split())
            raise ConfigError(f"structured outputs: {message[:400]}")
        return inner

    def _native_tokenizer(self) -> Any:
        if self._native is None:
            if self._tokenizer is None:
                raise ConfigError("structured outputs: this checkpoint has no tokenizer")
            eos = list(self._eos) or None
            self._native = self._tokenizer.llguidance(self._vocab_size, eos)
        return self._native
