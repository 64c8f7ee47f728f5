"""Ep room: how the ranks of an engine meet, and find at once what they disagree on."""

from __future__ import annotations

import os
import secrets

import msgspec

from whalefall.ep.group import Group
from whalefall.errors import ConfigError

__all__ = ["Hello", "meet", "number_engine", "process_name"]

_HERE = secrets.token_hex(6)
_engines = 0  # that this process knows of


class Hello(msgspec.Struct):
    """What a rank says at construction; `config` must agree."""

    host: str
    name: str
    process: str
    config: dict[str, int | float | None]
    engines: int = 0


def process_name() -> str:
    """A name of this process that no other has."""
    return f"{_HERE}-{os.getpid()}"


def meet(group: Group, hello: Hello) -> list[Hello]:
    """Every rank's hello; collective.

    Raises: ConfigError where one was made with other arguments.
    """
    hello.engines = _engines
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


def number_engine(hellos: list[Hello]) -> int:
    """A number for the engine which no other has that one of its ranks takes part in."""
    global _engines
    number = max(_engines, *(hello.engines for hello in hellos))
    _engines = number + 1
    return number
