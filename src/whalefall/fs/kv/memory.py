"""File-system room: the key-value contract in memory, with every version kept.

For the simulator and tests: `fail` may make a commit conflict, or be in doubt.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable, Iterable

from whalefall.fs.kv.interface import Conflict, KeyValue, MaybeCommitted, Transaction

__all__ = ["MemoryKV"]


class MemorySnapshot:
    """The store as of one version."""

    def __init__(self, store: MemoryKV, version: int) -> None:
        self.store, self.version = store, version

    def get(self, key: bytes) -> bytes | None:
        """The value of a key."""
        for version, value in reversed(self.store.history.get(key, [])):
            if version <= self.version:
                return value
        return None

    def scan(self, begin: bytes, end: bytes, limit: int) -> Iterable[tuple[bytes, bytes]]:
        """Pairs in order."""
        keys = self.store.keys
        found = []
        for key in keys[bisect.bisect_left(keys, begin) : bisect.bisect_left(keys, end)]:
            value = self.get(key)
            if value is not None:
                found.append((key, value))
                if limit and len(found) == limit:
                    break
        return found

    def close(self) -> None:
        """Nothing to let go of."""


class MemoryKV(KeyValue):
    """All versions of all keys, in memory.

    Args:
        fail: called with each writing transaction; may raise Conflict before it is committed, or
            return True: it is committed, and MaybeCommitted raised.
    """

    def __init__(self, fail: Callable[[Transaction], bool] = lambda transaction: False) -> None:
        self.fail = fail
        self.version = 0
        self.keys: list[bytes] = []
        self.history: dict[bytes, list[tuple[int, bytes | None]]] = {}
        self._mutex = threading.Lock()

    def begin(self) -> Transaction:
        """A transaction on the newest version."""
        return Transaction(MemorySnapshot(self, self.version))

    def commit(self, transaction: Transaction) -> int:
        """Check for conflicts and apply."""
        if transaction.read_only:
            return transaction.snapshot.version
        doubt = self.fail(transaction)
        with self._mutex:
            since = transaction.snapshot.version
            for key in transaction.read_keys:
                if self._written(key) > since:
                    raise Conflict(f"key {key!r} was written by another transaction")
            for begin, end in transaction.read_ranges:
                low, high = bisect.bisect_left(self.keys, begin), bisect.bisect_left(self.keys, end)
                if any(self._written(key) > since for key in self.keys[low:high]):
                    raise Conflict(f"range {begin!r} was written by another transaction")
            self.version += 1
            stamp = self.version.to_bytes(8, "big")
            stamped = {prefix + stamp: value for prefix, value in transaction.stamped}
            for key, value in {**transaction.writes, **stamped}.items():
                if key not in self.history:
                    bisect.insort(self.keys, key)
                self.history.setdefault(key, []).append((self.version, value))
        if doubt:
            raise MaybeCommitted("the answer to the commit was lost")
        return self.version

    def _written(self, key: bytes) -> int:
        return self.history[key][-1][0] if key in self.history else 0

    def close(self) -> None:
        """Nothing to close."""
