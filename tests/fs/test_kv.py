"""One suite for every key-value store."""

from __future__ import annotations

import multiprocessing
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from whalefall.fs.kv import Conflict, KeyValue, MemoryKV, SqliteKV
from whalefall.fs.kv.sqlite import to_wal


@pytest.fixture(params=["memory", "sqlite"])
def kv(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[KeyValue]:
    store: KeyValue = MemoryKV() if request.param == "memory" else SqliteKV(tmp_path / "kv.sqlite")
    yield store
    store.close()


def test_reads_its_own_writes_and_deletions(kv: KeyValue) -> None:
    kv.transact(lambda t: [t.put(bytes([i]), b"old") for i in range(5)])

    def change(t):  # type: ignore[no-untyped-def]
        t.put(b"\x01", b"new")
        t.delete(b"\x02")
        return t.get(b"\x01"), t.get(b"\x02"), t.range(b"\x00", b"\x04", limit=3)

    one, two, rows = kv.transact(change)
    assert (one, two) == (b"new", None)
    assert rows == [(b"\x00", b"old"), (b"\x01", b"new"), (b"\x03", b"old")]
    assert kv.read(lambda t: t.get(b"\x02")) is None


def test_snapshot_does_not_move(kv: KeyValue) -> None:
    kv.transact(lambda t: t.put(b"k", b"1"))
    old = kv.begin()
    assert old.get(b"k") == b"1"
    kv.transact(lambda t: t.put(b"k", b"2"))
    assert old.get(b"k") == b"1"
    kv.cancel(old)


@pytest.mark.parametrize("how", ["get", "range", "conflict", "phantom"])
def test_a_write_of_what_was_read_conflicts(kv: KeyValue, how: str) -> None:
    kv.transact(lambda t: t.put(b"a", b"1"))
    t = kv.begin()
    if how == "get":
        t.get(b"a")
    elif how == "conflict":
        t.conflict(b"a")
    else:
        t.range(b"a", b"c")
    t.put(b"other", b"x")
    kv.transact(lambda u: u.put(b"b" if how == "phantom" else b"a", b"2"))
    with pytest.raises(Conflict):
        kv.commit(t)
    assert kv.read(lambda u: u.get(b"other")) is None


def test_a_deletion_conflicts_too(kv: KeyValue) -> None:
    kv.transact(lambda t: t.put(b"a", b"1"))
    t = kv.begin()
    t.get(b"a")
    t.put(b"b", b"2")
    kv.transact(lambda u: u.delete(b"a"))
    with pytest.raises(Conflict):
        kv.commit(t)


def test_snapshot_reads_and_blind_writes_do_not_conflict(kv: KeyValue) -> None:
    kv.transact(lambda t: t.put(b"a", b"1"))
    t = kv.begin()
    t.get(b"a", snapshot=True)
    t.put(b"a", b"3")
    kv.transact(lambda u: u.put(b"a", b"2"))
    kv.commit(t)
    assert kv.read(lambda u: u.get(b"a")) == b"3"


def test_stamped_keys_follow_the_order_of_commits(kv: KeyValue) -> None:
    for i in range(4):
        kv.transact(lambda t, i=i: t.put_stamped(b"log", str(i).encode()))
    values = [v for _, v in kv.read(lambda t: t.range(b"log", b"loh"))]
    assert values == [b"0", b"1", b"2", b"3"]


def test_threads_that_count_lose_nothing(kv: KeyValue) -> None:
    def count() -> None:
        for _ in range(25):
            kv.transact(lambda t: t.put(b"n", str(int(t.get(b"n") or b"0") + 1).encode()))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kv.read(lambda t: t.get(b"n")) == b"100"


def _count(path: str) -> None:
    store = SqliteKV(Path(path))
    for _ in range(20):
        store.transact(lambda t: t.put(b"n", str(int(t.get(b"n") or b"0") + 1).encode()))
    store.close()


def test_processes_share_a_sqlite_store(tmp_path: Path) -> None:
    path = str(tmp_path / "kv.sqlite")
    SqliteKV(Path(path)).close()
    spawn = multiprocessing.get_context("spawn")
    others = [spawn.Process(target=_count, args=(path,)) for _ in range(2)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    store = SqliteKV(Path(path))
    assert store.read(lambda t: t.get(b"n")) == b"40"
    store.close()


def test_a_file_that_another_process_is_just_making_is_waited_for() -> None:
    """SQLite then refuses at once, whatever the time-out is."""

    class JustMade:
        refusals = 3

        def execute(self, command: str) -> None:
            self.refusals -= 1
            if self.refusals >= 0:
                raise sqlite3.OperationalError("database is locked")

    db = JustMade()
    to_wal(db)  # type: ignore[arg-type]
    assert db.refusals == -1


def test_another_error_of_the_store_is_not_waited_for() -> None:
    class Broken:
        def execute(self, command: str) -> None:
            raise sqlite3.OperationalError("disk I/O error")

    with pytest.raises(sqlite3.OperationalError, match="I/O"):
        to_wal(Broken())  # type: ignore[arg-type]
