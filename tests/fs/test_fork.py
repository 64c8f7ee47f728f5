"""Forked children: each is a client of its own, and what is open for writing stays the parent's."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from whalefall.fs import KVCache, LocalCluster, StorageError
from whalefall.record import FileReader, FileWriter

FORK = multiprocessing.get_context("fork")
WAIT_S = 60.0
MODES = ("wb", "ab")


def in_children(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What `work(k)` returns in `count` forked children at once; a child that hangs is an error."""

    def report(number: int, line: Any) -> None:
        try:
            line.send(work(number))
        except BaseException as error:
            line.send(f"{type(error).__name__}: {error}")

    pipes = [FORK.Pipe(duplex=False) for _ in range(count)]
    children = [
        FORK.Process(target=report, args=(k, p[1]), daemon=True) for k, p in enumerate(pipes)
    ]
    for child in children:
        child.start()
    try:
        answers = [p[0].recv() if p[0].poll(WAIT_S) else "hangs" for p in pipes]
        for child in children if "hangs" not in answers else ():
            child.join(WAIT_S)
            assert child.exitcode == 0  # nothing keeps it from ending
        return answers
    finally:
        for child in children:
            child.kill()
            child.join()


@contextlib.contextmanager
def held(*locks: Any) -> Iterator[None]:
    """Another thread holds the locks meanwhile, as one at work may when its process forks."""
    ready, done = threading.Event(), threading.Event()

    def hold() -> None:
        with contextlib.ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            ready.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    ready.wait()
    yield
    done.set()
    thread.join()


def content(number: int, turn: int) -> bytes:
    return f"{number}-{turn}|".encode() * 40_000  # more than a chunk


def test_children_write_and_read_with_the_file_system_of_their_parent(
    cluster: LocalCluster,
) -> None:
    fs = cluster.filesystem(retry_s=20.0, chunk_bytes=64 << 10)
    fs.pipe("/fork/parent", b"parent" * 100_000)

    def child(number: int) -> list[str]:
        for turn in range(4):
            fs.pipe(f"/fork/{number}-{turn}", content(number, turn))
            assert fs.cat("/fork/parent") == b"parent" * 100_000
        return [fs.client.connection.client]

    connection = fs.client.connection
    with held(connection.mutex, connection.pool._mutex, fs.client._mutex):
        answers = in_children(4, child)
    fs.pipe("/fork/after", content(9, 9))  # the parent's own connections are as they were
    assert all(isinstance(a, list) for a in answers), answers
    assert len({a[0] for a in answers} | {connection.client}) == 5
    other = cluster.filesystem()
    for number in range(4):
        for turn in range(4):
            assert other.cat(f"/fork/{number}-{turn}") == content(number, turn)
    assert other.cat("/fork/after") == content(9, 9)


def test_a_file_open_for_writing_is_the_parents(cluster: LocalCluster) -> None:
    fs = cluster.filesystem(retry_s=20.0)
    fs.pipe("/inherited-a", b"before")
    files = {mode: fs.open(f"/inherited-{mode[0]}", mode, block_size=1 << 20) for mode in MODES}
    for file in files.values():
        file.write(bytearray(3 << 20))  # more than a block: some is on its way
        file.write(b"rest")

    def child(_: int) -> str:
        for file in files.values():
            for act in (lambda f=file: f.write(b"x"), file.flush, file.commit, file.discard):
                with pytest.raises(StorageError, match="opened for writing before a fork"):
                    act()
            with pytest.raises(StorageError, match="open it here"):
                file.close()
            assert file.closed
        return "refused"

    assert in_children(1, child) == ["refused"]
    for file in files.values():
        file.close()
    assert fs.cat("/inherited-w") == bytes(3 << 20) + b"rest"
    assert fs.cat("/inherited-a") == b"before" + bytes(3 << 20) + b"rest"


def test_a_file_open_for_reading_goes_on_in_a_child(cluster: LocalCluster) -> None:
    fs = cluster.filesystem(retry_s=20.0)
    data = os.urandom(3 << 20)
    fs.pipe("/reader", data)
    file = fs.open("/reader", "rb", cache_type="none")
    inode = file.inode

    def child(_: int) -> str:
        file.seek(5)
        assert file.read() == data[5:]
        file.close()
        return "read"

    assert in_children(2, child) == ["read"] * 2
    fs.rm("/reader")
    assert len(fs.client.meta("sessions", inode=inode.id)) == 1  # no child has ended it
    assert file.read() == data
    file.close()


def test_a_reader_of_records_goes_on_in_forked_workers(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WHALEFALL_FS_TOKEN", cluster.token.decode())
    url, count = f"{cluster.url}/forked.ffr", 2000
    with FileWriter(url, count) as writer:
        for sample in range(count):
            writer.write_one(str(sample).encode() * 50)
    reader = FileReader(url)
    assert bytes(reader.read_one(7)) == b"7" * 50

    def child(number: int) -> int:
        draw, right = np.random.default_rng(number), 0
        for _ in range(50):
            wanted = draw.integers(0, count, 16)
            for sample, found in zip(wanted, reader.read(wanted), strict=True):
                right += bytes(found) == str(sample).encode() * 50
        return right

    assert in_children(4, child) == [50 * 16] * 4


def test_the_block_cache_goes_on_in_a_child(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WHALEFALL_FS_TOKEN", cluster.token.decode())
    cache = KVCache(f"{cluster.url}/forked-kv", 4096)
    cache.put("there", b"t" * 4096)

    def child(number: int) -> list[bytes | None]:
        cache.put(f"block {number}", bytes([number]) * 4096)
        return cache.get_many(["there", f"block {number}"])

    with held(cache._mutex):
        assert in_children(2, child) == [[b"t" * 4096, bytes([k]) * 4096] for k in range(2)]
    assert cache.refresh() == 3
