"""File-system room: a target's records on disk — SQLite, many writers in one durable transaction.

In: rows to put or delete, and the files that hold the data they refer to. Out: a return once both
are durable: one flush of the data for all who wait, then one transaction.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from whalefall.fs.core.effects import Refused
from whalefall.fs.core.messages import Code
from whalefall.fs.group import GroupCommit

__all__ = ["Batch", "Journal"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS chunk (id BLOB PRIMARY KEY, record BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS tag (client TEXT, channel INTEGER, record BLOB NOT NULL,
    PRIMARY KEY (client, channel)) WITHOUT ROWID;
"""


@dataclass
class Batch:
    """What one writer wants down: chunk rows and tag rows (None deletes).

    Attributes:
        files: descriptors that the rows' data was written with, not flushed.
    """

    chunks: list[tuple[bytes, bytes | None]] = field(default_factory=list)
    tags: Sequence[tuple[str, int, bytes | None]] = ()
    files: tuple[int, ...] = ()


class Journal:
    """Writes all batches that wait in one transaction."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.executescript(_SCHEMA)
        self.commits = self.batches = 0
        self._flush_error: OSError | None = None
        self._group = GroupCommit("journal", self._commit)

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
        if not self._group.submit(batch):
            raise Refused(Code.NOT_READY, "the journal is closed")

    def leave(self, batch: Batch, then: Callable[[], None]) -> None:
        """Have the batch written before any later one, without waiting; `then` is called after.

        Raises: Refused.
        """
        if not self._group.leave(batch, then):
            raise Refused(Code.NOT_READY, "the journal is closed")

    def _commit(self, batches: list[Batch]) -> None:
        try:
            self._flush({file for batch in batches for file in batch.files})
            self._commit_all(batches)
        except (sqlite3.Error, OSError) as failure:
            if "full" in str(failure) or getattr(failure, "errno", 0) == errno.ENOSPC:
                raise Refused(Code.NO_SPACE, "the disk is full") from failure
            raise

    def _flush(self, files: set[int]) -> None:
        # What a failed flush has lost the next one does not report: nothing can be believed since.
        if self._flush_error is not None:
            raise self._flush_error
        try:
            for file in files:
                os.fdatasync(file)
        except OSError as error:
            self._flush_error = error
            raise

    def _commit_all(self, batches: list[Batch]) -> None:
        rows = dict(row for batch in batches for row in batch.chunks)
        tags = {row[:2]: row[2] for batch in batches for row in batch.tags}
        if not rows and not tags:
            return
        put = [(key, value) for key, value in rows.items() if value is not None]
        gone = [(key,) for key, value in rows.items() if value is None]
        put_tags = [(*key, value) for key, value in tags.items() if value is not None]
        try:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("INSERT OR REPLACE INTO chunk VALUES (?, ?)", put)
            self._db.executemany("DELETE FROM chunk WHERE id = ?", gone)
            self._db.executemany("INSERT OR REPLACE INTO tag VALUES (?, ?, ?)", put_tags)
            self._db.executemany(
                "DELETE FROM tag WHERE client = ? AND channel = ?",
                [key for key, value in tags.items() if value is None],
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
        self._group.close()
        self._db.close()
