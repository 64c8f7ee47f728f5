"""Aggregates in two phases: within each partition first, then over the partial results. Pure.

So an exchange moves one row a group and producer, and a key with most of the rows (a hot key)
costs no more than any other. Only sums, counts, minima, maxima and averages can be split; for
anything else rows are exchanged as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from whalefall.data.dataset import identifier

__all__ = ["TwoPhase", "expression", "two_phase"]

CALL = re.compile(r"\s*(sum|count|min|max|avg)\s*\((.*)\)\s*$", re.I | re.S)
KEY = re.compile(r'\s*(?:(.+?)\s+as\s+)?("[^"]+"|[A-Za-z_]\w*)\s*$', re.I | re.S)


@dataclass(frozen=True)
class TwoPhase:
    """The query before the exchange, the names of its keys, the query after it."""

    partial: str
    keys: list[str]
    final: str


def two_phase(keys: Sequence[str], aggregates: Mapping[str, str]) -> TwoPhase | None:
    """Split an aggregation; None where it cannot be."""
    names = []
    for key in keys:
        match = KEY.match(key)
        if match is None:
            return None
        names.append(match.group(2))
    before, after = list(keys), list(names)
    for index, (name, text) in enumerate(aggregates.items()):
        call = CALL.match(text)
        if call is None or not _simple(call.group(2)):
            return None
        function, argument = call.group(1).lower(), call.group(2)
        part, title = f"__a{index}", identifier(name)
        if function == "avg":
            before += [f"sum({argument}) as {part}", f"count({argument}) as {part}n"]
            after.append(f"sum({part}) / nullif(sum({part}n), 0) as {title}")
            continue
        before.append(f"{text.strip()} as {part}")
        if function == "count":
            after.append(f"cast(sum({part}) as bigint) as {title}")
        else:
            after.append(f"{function}({part}) as {title}")
    return TwoPhase(
        f"select {', '.join(before)} from {{0}} group by all",
        names,
        f"select {', '.join(after)} from {{0}} group by all",
    )


def expression(key: str) -> str:
    """A key without its `as name`."""
    match = KEY.match(key)
    return key if match is None else match.group(1) or match.group(2)


def _simple(argument: str) -> bool:
    """Whether the text is one argument, not the middle of `f(a) + f(b)`, and not `distinct`."""
    if re.match(r"\s*(distinct|all)\b", argument, re.I) or "'" in argument or "{" in argument:
        return False
    depth = 0
    for letter in argument:
        depth += (letter == "(") - (letter == ")")
        if depth < 0:
            return False
    return depth == 0
