"""SQL texts as smallpond writes them: Python format strings whose `{0}`, `{1}` are the inputs.

`render` fills one in, `inline` puts one query in the place of another's input. Doubled braces stand
for single ones, and stay doubled through `inline`.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence

from whalefall.data.errors import PlanError

__all__ = ["escape", "inline", "input_uses", "render"]


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
