"""Disks that were full, and slots that a failure must not lose."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from tests.fs.test_engine import CHUNK, put, tag
from whalefall.fs.core.effects import Refused, Store
from whalefall.fs.core.messages import Code, Kind, Update
from whalefall.fs.storage import slots
from whalefall.fs.storage.engine import ChunkEngine
from whalefall.fs.storage.slots import Slots


def key(number: int) -> bytes:
    return bytes(15) + bytes([number])


def fill(engine: ChunkEngine, size: int, first: int = 1) -> int:
    """Write chunks until the disk is full; how many were."""
    for number in range(first, 250):
        one = Update(1, 1, key(number), Kind.REPLACE, 0, size, 4 << 20, tag(1))
        outcome = engine.store_all([Store(0, one, os.urandom(size), 1, 1)])[0]
        if isinstance(outcome, Refused):
            assert outcome.code is Code.NO_SPACE
            return number - first
        engine.commit(key(number), 1, None)
    raise AssertionError("the disk never was full")


def remove_all(engine: ChunkEngine) -> None:
    for chunk in list(engine.entries()):
        remove = Update(1, 1, chunk, Kind.REMOVE, 0, 0, 4 << 20, tag(2))
        engine.store(remove, b"", 2, 1)
        engine.commit(chunk, 1, None)
    engine.merge([])  # whatever was left is down, and its slots are free
    end_s = time.monotonic() + 5
    while engine.usage()[0] and time.monotonic() < end_s:
        time.sleep(0.01)


class SmallDisk:
    """A disk of 20 MB, by what the slot files really hold."""

    f_frsize = 1
    f_bavail = 0

    def __init__(self, folder: Path) -> None:
        held = sum(path.stat().st_blocks * 512 for path in folder.glob("slots.*"))
        self.f_bavail = max(0, 20_000_000 - held)


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("then", [1 << 20, 100_000, 3_000_000])
def test_what_is_removed_from_a_full_disk_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restart: bool, then: int
) -> None:
    monkeypatch.setattr(os, "statvfs", SmallDisk)
    engine = ChunkEngine(tmp_path, reserve_bytes=4_000_000)
    assert fill(engine, 1 << 20) == 15
    assert engine.usage()[1] < 1 << 20
    remove_all(engine)
    if restart:
        engine.close()
        engine = ChunkEngine(tmp_path, reserve_bytes=4_000_000)
    used, free, *_ = engine.usage()
    assert used == 0 and 15 << 20 <= free <= 16_000_000
    assert fill(engine, then) >= 14_000_000 // then
    assert SmallDisk(tmp_path).f_bavail >= 4_000_000 - (128 << 10)  # the reserve stays
    for chunk in engine.entries():
        assert len(engine.load(chunk, False)) == then
    engine.close()


def test_without_holes_slots_are_used_again_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", SmallDisk)
    monkeypatch.setattr(slots._libc, "fallocate", lambda *ignored: -1)
    engine = ChunkEngine(tmp_path, reserve_bytes=4_000_000)
    assert fill(engine, 1 << 20) == 15
    remove_all(engine)
    assert fill(engine, 1 << 20) == 15
    engine.close()


def test_a_slot_holds_what_was_written_there_and_no_more(tmp_path: Path) -> None:
    made = Slots(tmp_path, [])
    first, second = made.take(1 << 20), made.take(1 << 20)
    os.pwrite(made.file(20), os.urandom(600 << 10), first.offset)
    assert made.holds(first, 600 << 10) and not made.holds(first, 1 << 20)
    assert not made.holds(second, 1)
    made.close()


def test_a_mend_that_fails_gives_its_slot_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ChunkEngine(tmp_path)
    put(engine, b"good")
    used = engine.usage()[0]
    with monkeypatch.context() as patch:
        patch.setattr(engine._journal, "write", lambda batch: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.mend(CHUNK, b"good")
    assert engine.usage()[0] == used
    assert engine.mend(CHUNK, b"good") and engine.usage()[0] == used


def test_a_file_system_that_refuses_direct_writes_gets_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def refuse(path: object, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EOPNOTSUPP, "no")
        return opened(path, flags, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse)
    made = Slots(tmp_path, [])
    assert made.written(16) == (made.file(16), False)
    made.close()
