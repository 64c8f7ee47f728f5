"""File-system room: a target's records on disk — SQLite, many writers in one durable transaction.

In: rows to put or delete, files whose data must be down first. Out: a return once it all is.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from whalefall.fs.core.effects import Refused
from whalefall.fs.core.messages import Code

__all__ = ["Batch", "Journal"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS chunk (id BLOB PRIMARY KEY, record BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS tag (client TEXT, channel INTEGER, record BLOB NOT NULL,
    PRIMARY KEY (client, channel)) WITHOUT ROWID;
"""


@dataclass
class Batch:
    """What one writer wants down: chunk rows (None deletes), tag rows, files to sync before."""

    chunks: list[tuple[bytes, bytes | None]] = field(default_factory=list)
    tags: list[tuple[str, int, bytes]] = field(default_factory=list)
    files: tuple[int, ...] = ()
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None


class Journal:
    """Group commit: one thread takes all batches that wait and writes them in one transaction."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.executescript(_SCHEMA)
        self._waiting: list[Batch] = []
        self._wake = threading.Condition()
        self._closed = False
        self.commits = self.batches = 0
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def chunks(self) -> Iterable[tuple[bytes, bytes]]:
        """All chunk rows."""
        return self._db.execute("SELECT id, record FROM chunk")

    def tags(self) -> Iterable[bytes]:
        """All tag rows."""
        return (row[0] for row in self._db.execute("SELECT record FROM tag"))

    def write(self, batch: Batch) -> None:
        """Return when the batch is durable.

        Raises: Refused(NO_SPACE); sqlite3.Error or OSError if the disk fails.
        """
        with self._wake:
            if self._closed:
                raise Refused(Code.NOT_READY, "the journal is closed")
            self._waiting.append(batch)
            self._wake.notify()
        batch.done.wait()
        if batch.error is not None:
            raise batch.error

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._waiting and not self._closed:
                    self._wake.wait()
                batches, self._waiting = self._waiting, []
                if not batches:
                    return
            error: BaseException | None = None
            try:
                self._commit(batches)
            except (sqlite3.Error, OSError) as failure:
                full = "full" in str(failure) or getattr(failure, "errno", 0) == 28
                error = Refused(Code.NO_SPACE, "the disk is full") if full else failure
            for batch in batches:
                batch.error = error
                batch.done.set()

    def _commit(self, batches: list[Batch]) -> None:
        for descriptor in {f for batch in batches for f in batch.files}:
            os.fdatasync(descriptor)
        rows = dict(row for batch in batches for row in batch.chunks)
        if not rows and not any(batch.tags for batch in batches):
            return
        put = [(key, value) for key, value in rows.items() if value is not None]
        gone = [(key,) for key, value in rows.items() if value is None]
        try:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("INSERT OR REPLACE INTO chunk VALUES (?, ?)", put)
            self._db.executemany("DELETE FROM chunk WHERE id = ?", gone)
            self._db.executemany(
                "INSERT OR REPLACE INTO tag VALUES (?, ?, ?)",
                [row for batch in batches for row in batch.tags],
            )
            self._db.execute("COMMIT")
        except sqlite3.Error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        self.commits += 1
        self.batches += len(batches)

    def close(self) -> None:
        """Write what waits, then close."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()
        self._db.close()
