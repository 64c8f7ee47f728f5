"""Trace room: ids that tie events together, kept apart when files are merged.

In: an event. Out: the same event, its ids in a space of numbers of their own. Ids of flows (`s`,
`t`, `f`, and `bind_id` of any event) and of asynchronous events (`b`, `n`, `e`; `S`, `T`, `p`, `F`)
hold for a whole trace. Ids of objects (`N`, `O`, `D`) hold for one process and stay, as arguments
of other events name them.
Source: "Trace Event Format" (Google).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

__all__ = ["SPACE_BITS", "as_number", "ids_of", "move_ids"]

TIED = frozenset("stfbneSTpF")
# An id in a space of its own is (space << 48) + its number: pointers, often used as ids, have 48
# bits; readers take 64, as hexadecimal text, for not all have such numbers.
SPACE_BITS = 48


def ids_of(event: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Where an event's ids are: objects and their keys."""
    if event.get("ph") in TIED:
        if "id" in event:
            yield event, "id"
        if isinstance(event.get("id2"), dict):
            for key in ("global", "local"):
                if key in event["id2"]:
                    yield event["id2"], key
    if "bind_id" in event:
        yield event, "bind_id"


def as_number(value: Any) -> int | None:
    """An id as a number of 64 bits; None where it is none. Text is taken as hexadecimal."""
    try:
        number = int(value, 16) if isinstance(value, str) else value
    except ValueError:
        return None
    return number if type(number) is int and 0 <= number < 1 << 64 else None


def move_ids(event: dict[str, Any], space: int) -> None:
    """Put an event's ids into `space`, those that are equal to one id, others to others."""
    for place, key in ids_of(event):
        number = as_number(place[key])
        if number is None or number >> SPACE_BITS:  # text, or a space already: hashed into this one
            text = json.dumps(place[key], sort_keys=True, default=str)
            number = int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)
        place[key] = f"0x{(space % 0x10000 << SPACE_BITS) + number:x}"
