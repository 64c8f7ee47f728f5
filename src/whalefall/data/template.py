"""SQL texts as smallpond writes them: Python format strings whose `{0}`, `{1}` are the inputs.

`render` fills one in, `inline` puts one query in the place of another's input. Doubled braces stand
for single ones, and stay doubled through `inline`.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence

from whalefall.data.errors import PlanError

__all__ = ["escape", "fragment", "inline", "input_uses", "render", "without_comments"]

# Quoted text, in which nothing is a comment: strings, names, $tag$ strings.
QUOTED = re.compile(
    r"""[eE]'(?:\\.|''|[^'\\])*'|'[^']*'|"[^"]*"|(\$(?:[A-Za-z_]\w*)?\$).*?\1""", re.S
)
BEGIN = re.compile(r"""(?<!\w)[eE]'|['"$]|--|/\*""")
LINE_END = re.compile(r"[\r\n]")
EDGE = re.compile(r"/\*|\*/")


def without_comments(text: str) -> str:
    """SQL text with a space for each comment, so that it can stand in the middle of a query.

    Raises: PlanError for a comment without an end.
    """
    parts, here = [], 0
    while (match := BEGIN.search(text, here)) is not None:
        parts.append(text[here : match.start()])
        begin = match.start()
        if match.group() == "--":
            line_end = LINE_END.search(text, begin)
            here = len(text) if line_end is None else line_end.start()
        elif match.group() == "/*":
            here = _comment_end(text, begin)
            parts.append(" ")
        else:
            quoted = QUOTED.match(text, begin)
            here = quoted.end() if quoted is not None else begin + 1
            parts.append(text[begin:here])
    return "".join([*parts, text[here:]]).strip()


def _comment_end(text: str, begin: int) -> int:
    """Where the comment that begins there ends; comments may hold others."""
    depth = 0
    for edge in EDGE.finditer(text, begin):
        depth += 1 if edge.group() == "/*" else -1
        if depth == 0:
            return edge.end()
    raise PlanError(f"SQL text: a comment /* has no end, in: {text}")


def fragment(text: str, where: str) -> str:
    """An expression, or a list of some, without its comments.

    Raises: PlanError where nothing is left.
    """
    bare = without_comments(text)
    if not bare:
        raise PlanError(f"{where}: the SQL text is {text!r}, wanted an expression")
    return bare


def parse(text: str) -> list[tuple[str, str | None, str]]:
    """(literal, field, rest of the field) triples of a format string; PlanError where malformed."""
    try:
        return [
            (
                literal,
                field,
                (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else ""),
            )
            for literal, field, spec, conversion in string.Formatter().parse(text)
        ]
    except ValueError as error:
        raise PlanError(
            f"SQL text: {error}; a brace that belongs to the query is written twice "
            f"({{{{ or }}}}), in: {text}"
        ) from None


def escape(text: str) -> str:
    """Double the braces, so that `render` gives back `text`."""
    return text.replace("{", "{{").replace("}", "}}")


def render(text: str, inputs: Sequence[str], names: Mapping[str, object]) -> str:
    """Fill in the inputs and the named values.

    Raises: PlanError for a field that is neither.
    """
    parse(text)
    try:
        return text.format(*inputs, **names)
    except (KeyError, IndexError) as error:
        raise PlanError(
            f"SQL text: no value for the field {{{error.args[0]}}}; there are "
            f"{len(inputs)} input(s) and {', '.join(names)}; a brace that belongs to the query is "
            f"written twice, in: {text}"
        ) from None


def input_uses(text: str, index: int) -> int:
    """How often `{index}` occurs."""
    return sum(field == str(index) for _, field, _ in parse(text))


def inline(text: str, replacement: Mapping[int, str]) -> str:
    """Replace input fields by other texts, which are templates themselves."""
    parts = []
    for literal, field, rest in parse(text):
        parts.append(escape(literal))
        if field is None:
            continue
        if field.isdigit() and int(field) in replacement:
            parts.append(replacement[int(field)])
        else:
            parts.append(f"{{{field}{rest}}}")
    return "".join(parts)
