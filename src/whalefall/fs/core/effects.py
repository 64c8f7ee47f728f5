"""File-system room: what a procedure asks of the world. A driver does it and sends the result back.

A procedure is a generator: `result = yield effect`. Failures come back as the exceptions below.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from whalefall.fs.core.messages import Code, Tag, Update

__all__ = [
    "Abort", "Acquire", "Call", "Calls", "Commit", "Effect", "Forget", "Load", "Merge",
    "Procedure", "Refused", "Sleep", "Store", "Together", "Transact", "Unreachable",
]  # fmt: skip


class Refused(Exception):
    """A request is turned down: a code for the machine, a reason for people."""

    def __init__(self, code: Code, reason: str) -> None:
        super().__init__(f"{code.name}: {reason}")
        self.code, self.reason = code, reason


class Unreachable(Exception):
    """No answer: the message, or its answer, may still arrive."""


@dataclass(frozen=True)
class Call:
    """Send a message to a node, wait for its answer. Result: (answer, data)."""

    node: int
    message: Any
    data: Any = b""
    timeout_s: float = 1.0
    into: Any = None


@dataclass(frozen=True)
class Calls:
    """Several calls at once. Result: a list with each one's result, or its exception."""

    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Together:
    """Run procedures side by side. Result: a list with each one's result, or its exception.

    What they ask for at the same time may be done in one go. Each asks for its chunk's lock first,
    and no two for the same one: so they get them in one order everywhere, and none waits in a ring.
    """

    procedures: tuple[Generator[Any, Any, Any], ...]


@dataclass(frozen=True)
class Acquire:
    """Wait for the lock of a chunk (first come, first served)."""

    target: int
    chunk: bytes


@dataclass(frozen=True)
class Store:
    """Write new content beside the old and record it as pending, durably. Result: ChunkMeta."""

    target: int
    update: Update
    data: Any
    version: int
    chain_version: int


@dataclass(frozen=True)
class Commit:
    """Make the pending content the committed one and remember its tag, durably."""

    target: int
    chunk: bytes
    chain_version: int
    tag: Tag | None


@dataclass(frozen=True)
class Abort:
    """Forget the pending content, durably."""

    target: int
    chunk: bytes


@dataclass(frozen=True)
class Load:
    """Read a whole chunk, checksum verified. Result: its bytes."""

    target: int
    chunk: bytes
    pending: bool


@dataclass(frozen=True)
class Merge:
    """Remember tags that another replica remembers, durably; a newer one stays."""

    target: int
    tags: Any


@dataclass(frozen=True)
class Forget:
    """Forget all remembered tags, durably."""

    target: int


@dataclass(frozen=True)
class Sleep:
    """Let time pass."""

    seconds: float


@dataclass(frozen=True)
class Transact:
    """Run a function over a serialisable transaction; retried until its outcome is known."""

    function: Callable[[Any], Any]


Effect: TypeAlias = (
    Call
    | Calls
    | Together
    | Acquire
    | Store
    | Commit
    | Abort
    | Load
    | Merge
    | Forget
    | Sleep
    | Transact
)
T = TypeVar("T")
Procedure: TypeAlias = Generator[Effect, Any, T]
