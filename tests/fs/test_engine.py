"""The chunk engine on a real disk: copy-on-write, crashes at every point, rot, full disks."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from tests.fs.mutations import Mutation, broken
from whalefall.fs.core.effects import Refused, Store
from whalefall.fs.core.messages import Code, Kind, Tag, Update
from whalefall.fs.storage import native_io
from whalefall.fs.storage.engine import ChunkEngine
from whalefall.fs.storage.slots import Slots

CHUNK = b"\0" * 15 + b"\1"
STEPS = ("data written", "pending recorded", "before commit", "committed", "aborted")


def tag(seq: int) -> Tag:
    return Tag("client", 1, seq, seq)


def update(kind: Kind, offset: int, length: int, seq: int = 1, checksum: int = -1) -> Update:
    return Update(1, 1, CHUNK, kind, offset, length, 1 << 20, tag(seq), checksum=checksum)


def put(engine: ChunkEngine, data: bytes, offset: int = 0, seq: int = 1) -> None:
    """Write and commit."""
    entry = engine.entry(CHUNK)
    version = (entry.committed.version if entry and entry.committed else 0) + 1
    engine.store(update(Kind.WRITE, offset, len(data), seq), data, version, 1)
    engine.commit(CHUNK, 1, tag(seq))


def reopened(engine: ChunkEngine) -> ChunkEngine:
    engine.close()
    return ChunkEngine(engine.folder)


def test_checksum_is_crc32c_and_blocks_combine_to_the_whole() -> None:
    assert native_io.checksum(b"123456789") == 0xE3069283  # the polynomial's check value
    for size in (0, 1, 7, 65535, 65536, 65537, 200_001):
        data = os.urandom(size)
        crcs, whole = native_io.write(-1, False, 0, data)
        assert whole == native_io.checksum(data)
        assert len(crcs) == 4 * -(-size // native_io.BLOCK_BYTES)


def test_every_kind_of_update_does_what_it_says(tmp_path: Path) -> None:
    engine = ChunkEngine(tmp_path)
    put(engine, b"a" * 100_000)
    put(engine, b"bcd", 50, 2)
    put(engine, b"end", 100_010, 3)  # a gap
    wanted = bytearray(b"a" * 100_000 + bytes(10) + b"end")
    wanted[50:53] = b"bcd"
    assert engine.load(CHUNK, False) == wanted
    for kind, length, result in (
        (Kind.EXTEND, 10, bytes(wanted)),
        (Kind.TRUNCATE, 60, bytes(wanted[:60])),
        (Kind.EXTEND, 70, bytes(wanted[:60]) + bytes(10)),
    ):
        engine.store(update(kind, 0, length, 9), b"", 9, 1)
        engine.commit(CHUNK, 1, None)
        assert engine.load(CHUNK, False) == result
    engine.store(update(Kind.REMOVE, 0, 0, 10), b"", 10, 1)
    assert engine.load(CHUNK, False)  # until it is committed
    engine.commit(CHUNK, 1, tag(10))
    assert engine.entry(CHUNK) is None and reopened(engine).entry(CHUNK) is None


def test_pending_content_is_not_seen_until_committed(tmp_path: Path) -> None:
    engine = ChunkEngine(tmp_path)
    put(engine, b"one")
    engine.store(update(Kind.WRITE, 0, 3, 2), b"two", 2, 1)
    assert engine.load(CHUNK, False) == b"one" and engine.load(CHUNK, True) == b"two"
    engine = reopened(engine)
    assert engine.pendings() == [CHUNK]
    engine.commit(CHUNK, 4, tag(2))
    engine = reopened(engine)
    assert engine.load(CHUNK, False) == b"two"
    entry, known = engine.entry(CHUNK), engine.remembered("client", 1)
    assert entry is not None and entry.committed is not None and known is not None
    assert (entry.committed.version, entry.committed.chain_version) == (2, 4)
    assert (known.tag.seq, known.version) == (2, 2)


def test_an_older_operation_does_not_hide_a_newer_one(tmp_path: Path) -> None:
    engine = ChunkEngine(tmp_path)
    put(engine, b"new", seq=5)
    put(engine, b"old", seq=3)
    known = engine.remembered("client", 1)
    assert known is not None and known.tag.seq == 5


def test_remembered_operations_can_be_forgotten_and_taken_from_another(tmp_path: Path) -> None:
    engine = ChunkEngine(tmp_path)
    put(engine, b"one", seq=5)
    engine = reopened(engine)
    mine = engine.tags()
    engine.forget()
    assert mine and not engine.tags()
    engine = reopened(engine)
    assert not engine.tags() and engine.load(CHUNK, False) == b"one"
    engine.merge(mine)
    engine.merge([msgspec.structs.replace(mine[0], tag=Tag("client", 1, 4, 4))])  # older: not taken
    engine = reopened(engine)
    assert engine.tags() == mine
    engine.close()


def aborting_leaves_no_trace(tmp_path: Path) -> None:
    engine = ChunkEngine(tmp_path)
    put(engine, b"one")
    engine.store(update(Kind.WRITE, 0, 3, 2), b"two", 2, 1)
    engine.abort(CHUNK)
    try:
        assert engine.pendings() == []
        engine = reopened(engine)
        assert engine.pendings() == [] and engine.load(CHUNK, False) == b"one"
    finally:
        engine.close()


def test_aborting_leaves_no_trace(tmp_path: Path) -> None:
    aborting_leaves_no_trace(tmp_path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("self._replace(chunk, kept, freed=old.pending_at)", "pass"),
        ("self._journal.write(Batch([(chunk, row_of(kept))]))", "pass"),
    ],
)
def test_mutation_22_is_caught_on_disk_and_in_memory(tmp_path: Path, old: str, new: str) -> None:
    mutation = Mutation(22, "abort by halves", ((ChunkEngine, "abort", old, new),), 0)
    with broken(mutation), pytest.raises(AssertionError):
        aborting_leaves_no_trace(tmp_path)


class Crash(BaseException):
    """The process ends here."""


def crash_at(point: str, number: int) -> Callable[[str], None]:
    """A step function that ends the process the n-th time it comes to a point."""
    left = [number]

    def step(name: str) -> None:
        if name == point:
            left[0] -= 1
            if left[0] < 0:
                raise Crash

    return step


@pytest.mark.parametrize("point", STEPS)
@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("lost", ["nothing", "free slots", "commits"])
def test_a_crash_at_any_point_leaves_the_old_or_the_new(
    tmp_path: Path, point: str, number: int, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut may take: what lies in slots that no record names, and late commits."""
    monkeypatch.setattr("whalefall.fs.group.LEFT_S", 1e9 if lost == "commits" else 0.0)
    engine = ChunkEngine(tmp_path, crash_at(point, number))
    committed, tried, in_doubt = [b""], b"", False
    try:
        for seq in range(1, 7):
            tried = bytes([seq]) * (70_000 + seq)
            engine.store(update(Kind.WRITE, 0, len(tried), seq), tried, seq, 1)
            if seq == 4:
                engine.abort(CHUNK)
                continue
            in_doubt = True
            engine.commit(CHUNK, 1, tag(seq))
            committed, in_doubt = [*committed, tried], False
    except Crash:
        pass
    if lost == "commits":
        forget_what_is_left(engine)
    engine.close()
    if lost != "nothing":
        tear_free_slots(engine)
    engine = ChunkEngine(tmp_path)
    entry = engine.entry(CHUNK)
    content = bytes(engine.load(CHUNK, False)) if entry and entry.committed else b""
    pending = None
    if entry is not None and entry.pending is not None:
        pending = bytes(engine.load(CHUNK, True))  # whole, so that it may be committed
    if content != committed[-1] and not (in_doubt and content == tried):
        # Taken back, to what is pending with its tag: whoever reads it next commits it first.
        assert lost == "commits" and content in committed and pending == committed[-1]
        assert entry is not None and entry.pending is not None and entry.pending.tag is not None
        known = engine.remembered("client", 1)
        assert known is None or known.tag.seq < entry.pending.tag.seq
    elif pending is not None:
        assert pending == tried
    put(engine, b"and on it goes", seq=99)
    assert engine.load(CHUNK, False)[:14] == b"and on it goes"
    engine.close()


def forget_what_is_left(engine: ChunkEngine) -> None:
    """The journal's writer dies with what nobody waits for."""
    group = engine._journal._group
    with group._wake:
        assert all(waiter.then is not None for waiter in group._queue)
        group._queue.clear()


def test_data_is_flushed_before_the_row_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ChunkEngine(tmp_path)
    put(engine, b"kept")
    seen: list[str] = []
    flush, execute = os.fdatasync, engine._journal._commit_all

    def fdatasync(file: int) -> None:
        seen.append(os.readlink(f"/proc/self/fd/{file}").rpartition("/")[2])
        flush(file)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    monkeypatch.setattr(
        engine._journal, "_commit_all", lambda batches: [seen.append("row"), execute(batches)]
    )
    engine.store(update(Kind.WRITE, 0, 3, 2), b"two", 2, 1)
    assert seen == ["slots.16", "row"]


def test_after_a_failed_flush_nothing_is_acknowledged_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ChunkEngine(tmp_path)
    put(engine, b"kept")
    with monkeypatch.context() as broken:

        def fail(file: int) -> None:
            raise OSError(5, "Input/output error")

        broken.setattr(os, "fdatasync", fail)
        with pytest.raises(OSError, match="Input/output"):
            put(engine, b"lost", seq=2)
    # The kernel reports a failed flush once; the data may be gone all the same.
    with pytest.raises(OSError, match="Input/output"):
        put(engine, b"late", seq=3)
    engine = reopened(engine)
    assert engine.load(CHUNK, pending=bool(engine.pendings())) == b"kept"


def test_several_chunks_are_stored_together_and_each_has_its_own_fate(tmp_path: Path) -> None:
    engine = ChunkEngine(tmp_path)
    names = [CHUNK[:-1] + bytes([i]) for i in range(3)]
    datas = [os.urandom(70_000 + i) for i in range(3)]
    stores = [
        Store(1, Update(1, 1, name, Kind.WRITE, 0, len(data), 1 << 20, tag(i), checksum=crc), data,
              1, 1)
        for i, (name, data) in enumerate(zip(names, datas, strict=True))
        for crc in [native_io.checksum(data if i != 1 else b"other")]
    ]  # fmt: skip
    before = engine._journal.commits
    outcomes = engine.store_all(stores)
    assert engine._journal.commits == before + 1
    assert isinstance(outcomes[1], Refused) and outcomes[1].code is Code.CORRUPT
    assert engine.pendings() == [names[0], names[2]]
    for name, data in ((names[0], datas[0]), (names[2], datas[2])):
        assert engine.load(name, True) == data


def test_a_slot_without_o_direct_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def without(path: os.PathLike[str], flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return opened(path, flags, mode)

    monkeypatch.setattr(os, "open", without)
    engine = ChunkEngine(tmp_path)
    data = os.urandom(200_001)
    put(engine, data)
    assert reopened(engine).load(CHUNK, False) == data


def tear_free_slots(engine: ChunkEngine) -> None:
    """Overwrite every slot that no record refers to."""
    again = ChunkEngine(engine.folder)
    used = {p for r in again.entries().values() for p in (r.committed_at, r.pending_at) if p}
    again.close()
    for path in engine.folder.glob("slots.*"):
        size_class = int(path.suffix[1:])
        slots = -(-path.stat().st_size // (1 << size_class))
        with path.open("r+b") as file:
            for slot in range(slots):
                if all((p.size_class, p.slot) != (size_class, slot) for p in used):
                    file.seek(slot << size_class)
                    file.write(b"torn" * 1000)


def test_a_flipped_byte_is_found_and_mended(tmp_path: Path) -> None:
    engine = ChunkEngine(tmp_path)
    data = os.urandom(300_000)
    put(engine, data)
    entry = engine.entry(CHUNK)
    assert entry is not None and entry.committed_at is not None
    path = tmp_path / f"slots.{entry.committed_at.size_class}"
    with path.open("r+b") as file:
        file.seek(entry.committed_at.offset + 200_000)
        file.write(bytes([data[200_000] ^ 1]))
    with pytest.raises(Refused, match="does not match its checksum"):
        engine.load(CHUNK, False)
    with pytest.raises(Refused):  # a partial write must not build on rot
        engine.store(update(Kind.WRITE, 5, 3, 2), b"abc", 2, 1)
    assert not engine.mend(CHUNK, data[:-1] + b"x")
    assert engine.mend(CHUNK, data) and engine.load(CHUNK, False) == data
    assert reopened(engine).load(CHUNK, False) == data


def test_data_changed_on_the_way_is_refused(tmp_path: Path) -> None:
    engine = ChunkEngine(tmp_path)
    wrong = native_io.checksum(b"other")
    with pytest.raises(Refused) as refusal:
        engine.store(update(Kind.WRITE, 0, 4, checksum=wrong), b"data", 1, 1)
    assert refusal.value.code is Code.CORRUPT and engine.entry(CHUNK) is None


def test_a_full_disk_refuses_and_keeps_what_is_there(tmp_path: Path) -> None:
    engine = ChunkEngine(tmp_path)
    put(engine, b"kept")
    engine.reserve_bytes = 1 << 60
    with pytest.raises(Refused) as refusal:
        put(engine, b"lost", seq=2)
    assert refusal.value.code is Code.NO_SPACE
    assert engine.load(CHUNK, False) == b"kept" and engine.pendings() == []


def test_sizes_are_checked(tmp_path: Path) -> None:
    engine = ChunkEngine(tmp_path)
    with pytest.raises(Refused, match="bytes up to 1048577 in a chunk of 1048576"):
        engine.store(update(Kind.WRITE, 1 << 20, 1), b"x", 1, 1)


def test_a_slot_is_not_used_again_while_somebody_reads_it(tmp_path: Path) -> None:
    slots = Slots(tmp_path, [])
    first = slots.take(1000)
    pin = slots.begin_read()
    slots.give_back(first)
    assert slots.take(1000) != first
    slots.end_read(pin)
    assert slots.take(1000) == first
    assert slots.used_bytes == 2 * (64 << 10)
