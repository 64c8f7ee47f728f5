"""An answer's text as it comes, taken apart into reasoning, content and tool calls.

In: pieces of text. Out: `Piece`s. What may be the beginning of a tag is held back until it is
clear; tags and what follows the calls are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from whalefall.serve.dialects import THINK, ToolFormat

__all__ = ["Piece", "Splitter"]


@dataclass(frozen=True)
class Piece:
    """A part of an answer.

    Attributes:
        kind: "reasoning", "content", "call" (text: the function's name) or "arguments".
        text: the new text.
        call: of calls and arguments: which one.
        call_id: of a call: its id where the format has one.
    """

    kind: str
    text: str
    call: int = 0
    call_id: str = ""


class Splitter:
    """One answer's state.

    Attributes:
        num_calls: tool calls seen so far.
        reasoning: whether the text now is reasoning.
    """

    def __init__(
        self,
        tools: ToolFormat | None = None,
        schemas: Mapping[str, dict[str, Any]] | None = None,
        think: bool = False,
        max_calls: int | None = None,
    ) -> None:
        """Start an answer.

        Args:
            tools: the format of calls to look for; None: none are.
            schemas: parameters by function.
            think: whether the family reasons in tags.
            max_calls: calls after these are dropped.
        """
        self.num_calls = 0
        self._tools = tools
        self._schemas = schemas or {}
        self._max = max_calls
        self._text = ""
        self._header = ""
        self._kept = ""
        self._states: dict[str, Callable[[], tuple[list[Piece], bool]]] = {
            "start": self._start, "reasoning": self._reasoning, "content": self._content,
            "between": self._between, "header": self._in_header, "arguments": self._arguments,
            "done": self._done,
        }  # fmt: skip
        self._state = "start" if think else "content"
        self._trim = False

    def open_reasoning(self) -> None:
        """Begin in the reasoning, which the prompt has opened."""
        self._state, self._trim = "reasoning", True

    @property
    def reasoning(self) -> bool:
        """Whether the text now is reasoning."""
        return self._state == "reasoning"

    def feed(self, text: str) -> list[Piece]:
        """Take new text; returns what is certain."""
        self._text += text
        pieces: list[Piece] = []
        going = True
        while going:
            found, going = self._states[self._state]()
            pieces += [piece for piece in found if piece.text]
        return pieces

    def end(self) -> list[Piece]:
        """The text still held back, at the end of the answer."""
        rest, self._text = self._text.lstrip("\n") if self._trim else self._text, ""
        if self._state in ("reasoning", "start", "content") and rest:
            return [Piece("reasoning" if self.reasoning else "content", rest)]
        if self._state == "arguments" and self._shown and not self._pairs:
            return [Piece("arguments", rest, self.num_calls - 1)] if rest else []
        return []

    def _start(self) -> tuple[list[Piece], bool]:
        """Reasoning may open the answer, after white space; anything else is content."""
        ahead = self._text.lstrip()
        if ahead.startswith(THINK[0]):
            self._text, self._state, self._trim = ahead[len(THINK[0]) :], "reasoning", True
            return [], True
        if THINK[0].startswith(ahead):
            return [], False
        self._state = "content"
        return [], True

    def _reasoning(self) -> tuple[list[Piece], bool]:
        if self._trim:  # the line break after the tag
            self._text = self._text.lstrip("\n")
            self._trim = not self._text
        before, found = self._until(THINK[1])
        if found:
            self._state, self._trim = "content", True
        shown = before.rstrip("\n")  # line breaks before the tag are not shown
        if not found:
            self._text = before[len(shown) :] + self._text
        return [Piece("reasoning", shown)], found

    def _content(self) -> tuple[list[Piece], bool]:
        if self._trim:
            self._text = self._text.lstrip("\n")
            self._trim = not self._text
        if self._tools is None:
            text, self._text = self._text, ""
            return [Piece("content", text)], False
        before, found = self._until(self._tools.begin or self._tools.open)
        if found:
            self._state = "between" if self._tools.begin else "header"
        return [Piece("content", before)], found

    def _between(self) -> tuple[list[Piece], bool]:
        assert self._tools is not None
        opened, closed = self._find(self._tools.open), self._find(self._tools.end)
        if closed >= 0 and (opened < 0 or closed < opened):
            self._state = "done"
            return [], True
        if opened < 0:
            return [], False
        self._text, self._state = self._text[opened + len(self._tools.open) :], "header"
        return [], True

    def _in_header(self) -> tuple[list[Piece], bool]:
        assert self._tools is not None
        place, length = self._find(self._tools.middle), len(self._tools.middle)
        if self._pairs:  # the name may end at a pair, or at the end of a call without any
            ends = [p for p in map(self._find, ("\n", "<arg_key>", self._tools.close)) if p >= 0]
            place, length = min(ends, default=-1), 0
        if place < 0:
            return [], False
        self._header, self._text = self._text[:place], self._text[place + length :]
        self._state = "arguments"
        self.num_calls += 1
        if not self._shown:
            return [], True
        call_id = self._header.strip() if self._tools.numbered else ""
        name = self._tools.function(self._header)
        return [Piece("call", name, self.num_calls - 1, call_id)], True

    def _arguments(self) -> tuple[list[Piece], bool]:
        assert self._tools is not None
        before, found = self._until(self._tools.close)
        if found:
            self._state = "between"
        if not self._shown:
            return [], found
        if self._pairs:  # known only as a whole
            self._kept += before
            if not found:
                return [], False
            schema = self._schemas.get(self._tools.function(self._header), {})
            before, self._kept = self._tools.arguments(self._kept, schema), ""
        return [Piece("arguments", before, self.num_calls - 1)], found

    def _done(self) -> tuple[list[Piece], bool]:
        self._text = ""
        return [], False

    @property
    def _pairs(self) -> bool:
        return self._tools is not None and self._tools.pairs

    @property
    def _shown(self) -> bool:
        return self._max is None or self.num_calls <= self._max

    def _find(self, tag: str) -> int:
        return self._text.find(tag) if tag else -1

    def _until(self, tag: str) -> tuple[str, bool]:
        """Take the text before `tag`, and the tag; without it, what cannot be part of one."""
        before, found, after = self._text.partition(tag)
        if found:
            self._text = after
            return before, True
        for length in range(min(len(tag) - 1, len(self._text)), 0, -1):
            if self._text.endswith(tag[:length]):
                before, self._text = self._text[:-length], self._text[-length:]
                return before, False
        before, self._text = self._text, ""
        return before, False
