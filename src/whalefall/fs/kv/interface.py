"""File-system room: the contract of a key-value store with optimistic serialisable transactions.

A transaction reads a snapshot and buffers its writes. `commit` fails with `Conflict` if a key or
range that it read (other than by a snapshot read) was written since.
Source: FoundationDB's model, which 3FS's metadata is written against.
"""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

from whalefall.errors import WhalefallError

__all__ = ["Conflict", "KeyValue", "MaybeCommitted", "Snapshot", "Transaction"]
T = TypeVar("T")
MAX_TRIES = 40


class Conflict(WhalefallError, RuntimeError):
    """Another transaction wrote what this one read; run it again."""


class MaybeCommitted(WhalefallError, RuntimeError):
    """Whether the transaction was committed is not known; it must be safe to run it again."""


class Snapshot(Protocol):
    """A fixed version of the whole store."""

    version: int

    def get(self, key: bytes) -> bytes | None:
        """The value of a key."""

    def scan(self, begin: bytes, end: bytes, limit: int) -> Iterable[tuple[bytes, bytes]]:
        """Pairs with begin ≤ key < end in order; limit 0: all."""

    def close(self) -> None:
        """Let go of it."""


class Transaction:
    """Reads of one snapshot, writes in a buffer; made by `KeyValue.begin`."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.read_keys: set[bytes] = set()
        self.read_ranges: list[tuple[bytes, bytes]] = []
        self.writes: dict[bytes, bytes | None] = {}
        self.stamped: list[tuple[bytes, bytes]] = []
        self._got: dict[bytes, bytes | None] = {}

    def get(self, key: bytes, snapshot: bool = False) -> bytes | None:
        """The value of a key, own writes included; a snapshot read never conflicts."""
        if key in self.writes:
            return self.writes[key]
        if not snapshot:
            self.read_keys.add(key)
        if key not in self._got:
            self._got[key] = self.snapshot.get(key)
        return self._got[key]

    def range(
        self, begin: bytes, end: bytes, limit: int = 0, snapshot: bool = False
    ) -> list[tuple[bytes, bytes]]:
        """Pairs with begin ≤ key < end in order, own writes included; limit 0: all."""
        if not snapshot:
            self.read_ranges.append((begin, end))
        mine = {k: v for k, v in self.writes.items() if begin <= k < end}
        # Own deletions may hide pairs, so the limit of the scan grows by as many.
        stored = self.snapshot.scan(begin, end, limit + len(mine) if limit else 0)
        merged = dict(stored)
        merged.update({k: v for k, v in mine.items() if v is not None})
        for key, value in mine.items():
            if value is None:
                merged.pop(key, None)
        pairs = sorted(merged.items())
        return pairs[:limit] if limit else pairs

    def put(self, key: bytes, value: bytes) -> None:
        """Set a key."""
        self.writes[key] = value

    def delete(self, key: bytes) -> None:
        """Remove a key."""
        self.writes[key] = None

    def put_stamped(self, prefix: bytes, value: bytes) -> None:
        """Set the key `prefix` + the commit's version (8 bytes, big-endian)."""
        self.stamped.append((prefix, value))

    def conflict(self, key: bytes) -> None:
        """Conflict with writes of `key`, as if it had been read."""
        self.read_keys.add(key)

    def conflict_range(self, begin: bytes, end: bytes) -> None:
        """Conflict with writes in begin ≤ key < end."""
        self.read_ranges.append((begin, end))

    @property
    def read_only(self) -> bool:
        """Whether there is nothing to commit."""
        return not self.writes and not self.stamped


class KeyValue(ABC):
    """A store of byte strings, ordered by key."""

    @abstractmethod
    def begin(self) -> Transaction:
        """A new transaction on the newest snapshot; end it with `commit` or `cancel`."""

    @abstractmethod
    def commit(self, transaction: Transaction) -> int:
        """Make the writes durable; returns the version.

        Raises: Conflict, MaybeCommitted.
        """

    def cancel(self, transaction: Transaction) -> None:
        """Let go of a transaction without writing."""
        transaction.snapshot.close()

    def transact(self, function: Callable[[Transaction], T]) -> T:
        """Run a function in a transaction until it commits; it must be safe to run twice.

        Raises: Conflict after many tries; whatever the function raises.
        """
        for attempt in range(MAX_TRIES):
            transaction = self.begin()
            try:
                result = function(transaction)
            except BaseException:
                self.cancel(transaction)
                raise
            try:
                self.commit(transaction)
                return result
            except (Conflict, MaybeCommitted):
                if attempt == MAX_TRIES - 1:
                    raise
            time.sleep(random.uniform(0, min(0.001 * 2**attempt, 0.1)))
        raise AssertionError

    def read(self, function: Callable[[Transaction], T]) -> T:
        """Run a function on a snapshot that nothing is written to."""
        transaction = self.begin()
        try:
            return function(transaction)
        finally:
            self.cancel(transaction)

    @abstractmethod
    def close(self) -> None:
        """Close the store."""
