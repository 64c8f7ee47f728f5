"""fsspec's own abstract suite, over a cluster whose nodes die and come back meanwhile."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.tests.abstract import (
    AbstractCopyTests,
    AbstractFixtures,
    AbstractGetTests,
    AbstractOpenTests,
    AbstractPipeTests,
    AbstractPutTests,
)

from whalefall.fs import LocalCluster, WhalefallFileSystem
from whalefall.fs.errors import StorageError


@pytest.fixture(scope="module")
def dying(cluster: LocalCluster) -> Iterator[dict[str, int]]:
    """Kills a storage node, brings it back, waits until all serve again; then the next one."""
    stop, count = threading.Event(), {"kills": 0}

    def loop() -> None:
        while not stop.is_set():
            node = count["kills"] % cluster.nodes + 1
            cluster.kill(node)
            count["kills"] += 1
            stop.wait(1.0)
            cluster.restart(node)
            cluster.wait_healthy(60)
            stop.wait(8.0)

    thread = threading.Thread(target=loop)
    thread.start()
    yield count
    stop.set()
    thread.join()
    assert count["kills"] >= 1


# fsspec declares its fixtures as instance methods of class scope; pytest 10 will not take that.
pytestmark = pytest.mark.filterwarnings("ignore:Class-scoped fixtures defined as instance methods")


class WhalefallFixtures(AbstractFixtures):
    @pytest.fixture(scope="class")
    def fs(self, cluster: LocalCluster, dying: dict[str, int]) -> fsspec.AbstractFileSystem:
        return cluster.filesystem()

    @pytest.fixture(scope="class")
    def local_fs(self) -> LocalFileSystem:
        return LocalFileSystem(auto_mkdir=True)

    @pytest.fixture
    def fs_path(self) -> str:
        return "/conformance"

    @pytest.fixture
    def local_path(self) -> Iterator[str]:
        with tempfile.TemporaryDirectory() as folder:
            yield folder


class TestCopy(AbstractCopyTests, WhalefallFixtures):
    pass


class TestGet(AbstractGetTests, WhalefallFixtures):
    pass


class TestOpen(AbstractOpenTests, WhalefallFixtures):
    pass


class TestPipe(AbstractPipeTests, WhalefallFixtures):
    pass


class TestPut(AbstractPutTests, WhalefallFixtures):
    pass


def test_a_block_that_fails_leaves_no_half_file(cluster: LocalCluster) -> None:
    fs = cluster.filesystem()

    def half() -> None:
        with fs.open("/half", "wb") as file:
            file.write(b"half")
            raise KeyError("oops")

    with pytest.raises(KeyError):
        half()
    assert not fs.exists("/half")
    assert fs.client._open == set()


@pytest.mark.parametrize("mode", ["wb", "ab"])
def test_a_file_that_failed_once_stays_failed(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    fs = cluster.filesystem()
    fs.pipe("/failed", b"before")
    connection, full = fs.client.connection, StorageError(28, "full")
    update_all, faults = connection.update_all, iter([full])

    def once(updates: list[tuple[object, ...]]) -> object:
        fault = next(faults, None) if file.tell() > 1 << 20 else None
        if fault is not None:
            raise fault
        return update_all(updates)

    monkeypatch.setattr(connection, "update_all", once)
    file = fs.open("/failed", mode, block_size=1 << 20)
    file.write(bytearray(2 << 20))
    with pytest.raises(StorageError, match="full"):
        file.write(bytearray(2 << 20))
    for again in (lambda: file.write(b"more"), file.flush, file.commit, file.close):
        with pytest.raises(StorageError) as error:
            again()
        assert error.value is full
    assert file.closed
    assert fs.cat("/failed") == b"before"
    assert fs.client._open == set()


def test_what_a_failed_append_wrote_does_not_come_back(cluster: LocalCluster) -> None:
    fs = cluster.filesystem()
    client = fs.client

    def fail() -> None:
        with fs.open("/grown", "ab", block_size=1 << 20) as file:
            file.write(b"Z" * (3 << 20))
            raise KeyError("oops")

    fs.pipe("/grown", b"x" * 1000)
    with pytest.raises(KeyError):
        fail()
    inode = client.stat("/grown")
    assert inode.length == client.connection.stored_end(inode) == 1000
    client.write(inode, 1000, b"Z" * (3 << 20))  # as a writer that died leaves it
    with fs.open("/grown", "ab") as file:
        file.write(b"y" * 5)
    client.truncate(inode, 2 << 20)  # with an inode from before the append
    assert fs.cat("/grown") == b"x" * 1000 + b"y" * 5 + bytes((2 << 20) - 1005)
    client.write(inode, 2 << 20, b"Z")
    client.truncate(client.stat("/grown"), 10)
    assert client.connection.stored_end(inode) == 10
    assert fs.cat("/grown") == b"x" * 10


@pytest.mark.parametrize("compression", [None, "gzip", "bz2", "xz", "infer"])
@pytest.mark.parametrize("mode", ["wb", "w"])
def test_wrapped_files_are_whole_or_missing(
    fs: WhalefallFileSystem, mode: str, compression: str | None
) -> None:
    path, data = "/wrapped.gz", "whole" if mode == "w" else b"whole"
    read = mode.replace("w", "r")

    def fail() -> None:
        with fs.open(path, mode, compression=compression) as file:
            file.write(data)
            raise KeyError("oops")

    with fs.open(path, mode, compression=compression) as file:
        file.write(data)
    assert fs.open(path, read, compression=compression).read() == data
    fs.rm(path)
    with pytest.raises(KeyError):
        fail()
    assert not fs.exists(path)
    file = fs.open(path, mode)
    file.write(data)
    del file
    assert not fs.exists(path)
    file = fs.open(path, mode, compression=compression)
    file.write(data)
    file.close()
    assert fs.open(path, read, compression=compression).read() == data
    fs.rm(path)
