"""File-system room: the key-value contract on SQLite — embedded, durable, shared by processes.

WAL, synchronous=FULL. A row keeps the version that wrote it, deletions leave a tombstone for a
while, so a commit finds conflicts by version. All transactions that wait are committed in one
SQLite transaction; each is checked against those before it.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from whalefall.fs.group import GroupCommit
from whalefall.fs.kv.interface import Conflict, KeyValue, Transaction

__all__ = ["SqliteKV"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS kv (key BLOB PRIMARY KEY, value BLOB, version INTEGER NOT NULL)
    WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS tombstones ON kv (version) WHERE value IS NULL;
CREATE TABLE IF NOT EXISTS state (id INTEGER PRIMARY KEY, version INTEGER, forgotten INTEGER);
INSERT OR IGNORE INTO state VALUES (1, 0, 0);
"""
# Tombstones younger than this many commits stay; an older transaction must start again.
REMEMBERED_COMMITS = 100_000
TIMEOUT_S = 60.0


class SqliteSnapshot:
    """An open SQLite read transaction."""

    def __init__(self, store: SqliteKV, db: sqlite3.Connection) -> None:
        self._store, self._db = store, db
        db.execute("BEGIN")
        self.version: int = db.execute("SELECT version FROM state").fetchone()[0]
        self._open = True

    def get(self, key: bytes) -> bytes | None:
        """The value of a key."""
        row = self._db.execute("SELECT value FROM kv WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None

    def scan(self, begin: bytes, end: bytes, limit: int) -> Iterable[tuple[bytes, bytes]]:
        """Pairs in order."""
        return self._db.execute(
            "SELECT key, value FROM kv WHERE key >= ? AND key < ? AND value IS NOT NULL "
            "ORDER BY key LIMIT ?",
            (begin, end, limit or -1),
        ).fetchall()

    def close(self) -> None:
        """End the read transaction."""
        if self._open:
            self._open = False
            self._db.execute("COMMIT")
            self._store.give_back(self._db)


class Waiting:
    """A transaction that wants to be committed; its version, or why it cannot be."""

    def __init__(self, transaction: Transaction) -> None:
        self.transaction = transaction
        self.error: Conflict | None = None
        self.version = 0


def to_wal(db: sqlite3.Connection) -> None:
    """WAL mode. Where two processes make one file, SQLite's own time-out does not cover this."""
    end_s = time.monotonic() + TIMEOUT_S
    while True:
        try:
            db.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > end_s:
                raise
        time.sleep(0.01)


class SqliteKV(KeyValue):
    """A store in one file; several processes of one host may open it.

    Args:
        path: the file, made where missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._idle: list[sqlite3.Connection] = []
        self._mutex = threading.Lock()
        self._writer = self._connect()
        self._writer.executescript(_SCHEMA)
        self._commits = 0
        self._group = GroupCommit("kv", self._commit)

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(
            self.path, timeout=TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        to_wal(db)
        db.execute("PRAGMA synchronous=FULL")
        return db

    def begin(self) -> Transaction:
        """A transaction on the newest snapshot."""
        with self._mutex:
            db = self._idle.pop() if self._idle else None
        return Transaction(SqliteSnapshot(self, db or self._connect()))

    def give_back(self, db: sqlite3.Connection) -> None:
        """Keep a connection for the next transaction."""
        with self._mutex:
            self._idle.append(db)

    def commit(self, transaction: Transaction) -> int:
        """Hand the writes to the committing thread and wait until they are durable."""
        version = transaction.snapshot.version
        transaction.snapshot.close()
        if transaction.read_only:
            return version
        waiting = Waiting(transaction)
        if not self._group.submit(waiting):
            raise Conflict("the store is closed")
        if waiting.error is not None:
            raise waiting.error
        return waiting.version

    def _commit(self, group: list[Waiting]) -> None:
        try:
            self._commit_all(group)
        except sqlite3.Error:
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
            raise

    def _commit_all(self, group: list[Waiting]) -> None:
        db = self._writer
        db.execute("BEGIN IMMEDIATE")
        version, forgotten = db.execute("SELECT version, forgotten FROM state").fetchone()
        for waiting in group:
            if self._conflicts(waiting.transaction, forgotten):
                waiting.error = Conflict("another transaction wrote what this one read")
                continue
            version += 1
            waiting.version = version
            stamp = version.to_bytes(8, "big")
            writes = [(k, v, version) for k, v in waiting.transaction.writes.items()]
            writes += [(p + stamp, v, version) for p, v in waiting.transaction.stamped]
            db.executemany("INSERT OR REPLACE INTO kv VALUES (?, ?, ?)", writes)
        self._commits += 1
        if self._commits % 1000 == 0 and version - forgotten > 2 * REMEMBERED_COMMITS:
            forgotten = version - REMEMBERED_COMMITS
            db.execute("DELETE FROM kv WHERE value IS NULL AND version <= ?", (forgotten,))
        db.execute("UPDATE state SET version = ?, forgotten = ?", (version, forgotten))
        db.execute("COMMIT")

    def _conflicts(self, transaction: Transaction, forgotten: int) -> bool:
        since = transaction.snapshot.version
        if since < forgotten:
            return True
        one = "SELECT 1 FROM kv WHERE key = ? AND version > ?"
        several = "SELECT 1 FROM kv WHERE key >= ? AND key < ? AND version > ? LIMIT 1"
        db = self._writer
        return any(db.execute(one, (k, since)).fetchone() for k in transaction.read_keys) or any(
            db.execute(several, (b, e, since)).fetchone() for b, e in transaction.read_ranges
        )

    def close(self) -> None:
        """Commit what waits, then close."""
        self._group.close()
        for db in [*self._idle, self._writer]:
            db.close()
