"""Real processes, real signals: what was acknowledged is there, and nothing stale is read."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from whalefall.fs import LocalCluster, StorageError
from whalefall.fs.core.messages import Code, Read, ReadDone
from whalefall.fs.rpc import Pool

pytestmark = pytest.mark.ranks
LEASE_S = 3.0


def until(condition: Callable[[], bool], what: str, timeout_s: float = 40.0) -> None:
    """Wait for a condition."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, f"after {timeout_s} s still not: {what}"
        time.sleep(0.05)


class Writers:
    """Threads that write files for as long as they live, and keep the hash of each that was taken.

    Each file is overwritten once, so that a stale replica would show.
    """

    def __init__(self, cluster: LocalCluster, threads: int = 2) -> None:
        self.cluster, self.stop = cluster, threading.Event()
        self.acknowledged: dict[str, str] = {}
        self.errors: list[str] = []
        self.threads = [threading.Thread(target=self.run, args=(i,)) for i in range(threads)]

    def run(self, number: int) -> None:
        fs = self.cluster.filesystem()
        count = 0
        while not self.stop.is_set():
            path = f"/load/{number}/{count // 2}"
            data = os.urandom(100_000 + count)
            try:
                fs.pipe_file(path, data)
                self.acknowledged[path] = hashlib.sha256(data).hexdigest()
            except OSError as error:
                self.errors.append(str(error))
            count += 1

    def __enter__(self) -> Writers:
        for thread in self.threads:
            thread.start()
        until(lambda: len(self.acknowledged) >= 2, "some files written")
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()

    def check(self) -> None:
        """Every acknowledged byte is there."""
        fs = self.cluster.filesystem()
        assert not self.errors, self.errors[:3]
        for path, wanted in self.acknowledged.items():
            assert hashlib.sha256(fs.cat_file(path)).hexdigest() == wanted, path


@pytest.mark.parametrize("rounds", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_kill_9_of_every_kind_of_process_loses_nothing(tmp_path: Path, rounds: int) -> None:
    with LocalCluster(tmp_path, nodes=3, replicas=3, meta=2, lease_s=LEASE_S) as cluster:
        with Writers(cluster) as writers:
            for turn in range(rounds):
                for victim in (turn % 3 + 1, "manager", "meta-1"):
                    before = len(writers.acknowledged)
                    cluster.kill(victim)
                    time.sleep(0.3)
                    cluster.restart(victim)
                    until(lambda b=before: len(writers.acknowledged) > b, "writes go on")  # type: ignore[misc]
                    cluster.wait_healthy(60)
        assert len(writers.acknowledged) > 3
        writers.check()


def test_reads_and_writes_go_on_soon_after_a_node_is_gone(tmp_path: Path) -> None:
    with LocalCluster(tmp_path, nodes=3, replicas=2, chains=3, lease_s=LEASE_S) as cluster:
        fs = cluster.filesystem()
        data = os.urandom(3 << 20)
        fs.pipe_file("/f", data)
        began_s = time.monotonic()
        cluster.kill(1)
        assert fs.cat_file("/f") == data
        assert time.monotonic() - began_s < LEASE_S + 2
        fs.pipe_file("/f", data[::-1])
        # The writer waits for the manager to call the node dead, and a little for a busy machine.
        assert time.monotonic() - began_s < LEASE_S + 6
        assert fs.cat_file("/f") == data[::-1]


def test_a_stopped_node_that_wakes_up_serves_nothing_old(tmp_path: Path) -> None:
    with LocalCluster(tmp_path, nodes=3, replicas=3, chains=1, lease_s=LEASE_S) as cluster:
        fs = cluster.filesystem()
        fs.pipe_file("/f", b"old" * 1000)
        inode = fs.client.stat("/f")
        connection = cluster.connection()
        # An open file: the chunk is overwritten in place, not replaced by another file.
        chain = next(iter(connection.core.routing.chains.values()))
        stopped = chain.members[2]
        info = connection.core.routing.nodes[stopped.node]
        pool = Pool(cluster.token)
        from whalefall.fs.core.layout import chunk_id

        chunk = chunk_id(inode.id, 0)
        question = Read(stopped.target, chain.version, [(chunk, 0, 3)])
        reply, data = pool.call((info.host, info.port), question, b"", 5)
        assert isinstance(reply, ReadDone) and bytes(data) == b"old"
        cluster.signal(stopped.node, signal.SIGSTOP)
        fs.client.write(inode, 0, b"new")  # returns once the manager has taken the node out
        cluster.signal(stopped.node, signal.SIGCONT)
        # Ask it at once, and again until it is back, as a client with old routing would.
        end_s = time.monotonic() + 1.0
        while time.monotonic() < end_s:
            reply, data = pool.call((info.host, info.port), question, b"", 5)
            assert not isinstance(reply, ReadDone), bytes(data)
            assert reply.code in (Code.TARGET_OFFLINE, Code.ROUTING_MISMATCH, Code.NOT_READY)
            time.sleep(0.01)
        cluster.wait_healthy(40)
        connection.core.apply_routing(connection.refresh() or connection.core.routing)
        chain = connection.core.routing.chains[chain.chain]
        question = Read(stopped.target, chain.version, [(chunk, 0, 3)])
        reply, data = pool.call((info.host, info.port), question, b"", 5)
        assert isinstance(reply, ReadDone) and bytes(data) == b"new"
        pool.close()


def test_a_flipped_byte_is_found_by_a_read_and_mended(tmp_path: Path) -> None:
    with LocalCluster(tmp_path, nodes=3, replicas=3, chains=1, lease_s=LEASE_S) as cluster:
        fs = cluster.filesystem()
        data = os.urandom(500_000)
        fs.pipe_file("/f", data)
        flip(cluster, 2, 1234)
        for _ in range(12):  # whichever replica answers
            assert fs.cat_file("/f") == data
        connection = cluster.connection()
        connection.node(2, "scrub")
        until(lambda: connection.node(2, "counters")["repaired"] >= 1, "mended")
        assert connection.node(2, "counters")["damaged"] >= 1
        path = next((tmp_path / "storage-2").glob("target-*/slots.*"))
        assert data[:4096] in path.read_bytes()


def flip(cluster: LocalCluster, node: int, place: int) -> None:
    """Change one byte of a node's only chunk on its disk."""
    path = next((cluster.path / f"storage-{node}").glob("target-*/slots.*"))
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 0x40]))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_refuses_in_words_and_loses_nothing(tmp_path: Path, small_disk: Path) -> None:
    with LocalCluster(
        tmp_path / "cluster", nodes=2, replicas=2, chains=1, lease_s=LEASE_S,
        reserve_bytes=8 << 20, disks={2: str(small_disk / "node")},
    ) as cluster:  # fmt: skip
        fs = cluster.filesystem(retry_s=8.0)
        kept: dict[str, bytes] = {}

        def fill() -> None:
            for number in range(60):
                data = os.urandom(1 << 20)
                fs.pipe_file(f"/{number}", data)
                kept[f"/{number}"] = data

        with pytest.raises(StorageError, match="NO_SPACE"):
            fill()
        assert len(kept) > 10
        for path, data in kept.items():
            assert fs.cat_file(path) == data
        assert set(fs.ls("/", detail=False)) == set(kept)
        fs.rm_file("/0")
        fs.rm_file("/1")
        until(lambda: bool(collected(cluster)), "the chunks of removed files are gone")
        fs.pipe_file("/again", b"there is room again")
        assert fs.cat_file("/again") == b"there is room again"


def collected(cluster: LocalCluster) -> bool:
    """Whether no nameless file is left."""
    from whalefall.fs.rpc import Call

    cluster.filesystem().client._ask(Call("gc", {}))
    return cluster.filesystem().client.meta("garbage") == []


def test_a_cluster_comes_back_with_all_it_had(tmp_path: Path) -> None:
    data = os.urandom(2_500_000)
    with LocalCluster(tmp_path, nodes=2, replicas=2, lease_s=LEASE_S) as cluster:
        cluster.filesystem().pipe_file("/a/b/f", data)
        url = cluster.url
    with LocalCluster(tmp_path, nodes=2, replicas=2, lease_s=LEASE_S) as cluster:
        assert cluster.url == url
        assert cluster.filesystem().cat_file("/a/b/f") == data
