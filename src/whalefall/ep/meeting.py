"""Ep room: how the ranks of an engine meet, and find at once what they disagree on."""

from __future__ import annotations

import msgspec

from whalefall.ep.group import Group
from whalefall.errors import ConfigError

__all__ = ["Hello", "meet"]


class Hello(msgspec.Struct):
    """What a rank says at construction; all but `host` and `name` must agree."""

    host: str
    name: str
    config: dict[str, int | float | None]


def meet(group: Group, hello: Hello) -> list[Hello]:
    """Every rank's hello; collective.

    Raises: ConfigError where one was made with other arguments.
    """
    raw = group.all_gather(msgspec.msgpack.encode(hello))
    hellos = [msgspec.msgpack.decode(m, type=Hello) for m in raw]
    for rank, other in enumerate(hellos):
        for key, value in hello.config.items():
            if other.config.get(key) != value:
                raise ConfigError(
                    f"ep: rank {rank} was made with {key} = {other.config.get(key)}, rank "
                    f"{group.rank} with {value}; all ranks must agree"
                )
    return hellos
