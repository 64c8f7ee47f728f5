"""Measures `whalefall.fs` against the disk, the page cache and a bare socket of the same run.

`python benchmarks/fs.py [--quick]`: a cluster in a folder of this disk; fio, preadv and a raw TCP
stream beside it. Each row says what was cached. "Cold": the storage nodes' files were dropped from
the page cache (posix_fadvise) before the read.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from whalefall.fs import FileSystemClient, KVCache, LocalCluster
from whalefall.fs.client.filesystem import Range
from whalefall.fs.kv import SqliteKV
from whalefall.fs.rpc import Call
from whalefall.testing.benchmark import Row, save

MIB = 1 << 20


def rates(amount: float, calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Interleaved rounds of each call; the median of amount per second."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            found[name].append(amount / (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in found.items()}


def row(
    what: str, against: str, target: float | None, ours: float, theirs: float | None, unit: str,
    note: str = "", floor: float | None = None,
) -> Row:  # fmt: skip
    """A line of the table: the target is a ratio, or (`floor`) a figure of our own."""
    ratio = ours / theirs if theirs else None
    if floor is not None:
        return Row(what, against, f">= {floor:,.0f} {unit}", ours, theirs, unit, ratio,
                   ours >= floor, note)  # fmt: skip
    wanted = f">= {target}x" if target else "–"
    reached = None if target is None or ratio is None else ratio >= target
    return Row(what, against, wanted, ours, theirs, unit, ratio, reached, note)


def fio(folder: Path, mode: str, size_mib: int, *more: str) -> float:
    """fio's MiB/s, direct, 1 MiB blocks, queue of 8; it overwrites the file of its first run."""
    command = [
        "fio", "--name=x", f"--directory={folder}", f"--rw={mode}", "--bs=1m", "--direct=1",
        f"--size={size_mib}m", "--iodepth=8", "--ioengine=libaio", "--output-format=json",
        "--end_fsync=1", *more,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    job = json.loads(done.stdout)["jobs"][0]["read" if mode == "read" else "write"]
    return float(job["bw_bytes"]) / MIB


def drop_cache(folder: Path) -> None:
    """Forget the cached pages of all chunk files."""
    for path in folder.rglob("slots.*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def raw_tcp(count: int) -> None:
    """Move `count` bytes through one loopback connection."""
    listener = socket.create_server(("127.0.0.1", 0))
    block = bytes(4 * MIB)

    def send() -> None:
        sock, _ = listener.accept()
        for _ in range(count // len(block)):
            sock.sendall(block)
        sock.close()

    thread = threading.Thread(target=send)
    thread.start()
    sock = socket.create_connection(listener.getsockname())
    buffer = bytearray(4 * MIB)
    while sock.recv_into(buffer):
        pass
    thread.join()
    sock.close()
    listener.close()


@contextlib.contextmanager
def by_tcp() -> Iterator[None]:
    """Processes and connections made here use TCP though they are on one host."""
    os.environ["WHALEFALL_FS_LOCAL"] = "0"
    try:
        yield
    finally:
        del os.environ["WHALEFALL_FS_LOCAL"]


def collect(client: FileSystemClient) -> None:
    """Give back the slots of files that were replaced, and wait until they are free."""
    while client.meta("garbage"):
        client._ask(Call("gc", {}))
    time.sleep(0.1)


def written(folder: Path, size_mib: int, rounds: int, again: bool) -> float:
    """MiB/s of one file written with three replicas; `again`: into slots that were used before."""
    data = os.urandom(32 * MIB)
    found = []
    with LocalCluster(folder, nodes=3, replicas=3, lease_s=10) as cluster:
        fs = cluster.filesystem()
        for turn in range(rounds + 1):
            began = time.perf_counter()
            with fs.open("/f", "wb", block_size=32 * MIB) as file:
                for _ in range(size_mib // 32):
                    file.write(data)
            if turn:  # the first one warms up, and fills the slots that the others use again
                found.append(size_mib / (time.perf_counter() - began))
            if again:
                collect(fs.client)
    shutil.rmtree(folder)
    return statistics.median(found)


def writes(folder: Path, size_mib: int, rounds: int) -> list[Row]:
    """Sequential writes with three replicas, against the disk alone."""
    over = written(folder / "again", size_mib, rounds, True)
    fresh = written(folder / "fresh", size_mib, rounds, False)
    with by_tcp():
        tcp = written(folder / "tcp", size_mib, rounds, True)

    def disk(*more: str) -> float:
        return statistics.median(fio(folder, "write", size_mib, *more) for _ in range(rounds))

    disk()
    plain, synced, new = disk(), disk("--sync=dsync"), disk("--unlink=1")
    what = "3-replica sequential write, one disk"
    durable = "durable on all three; 0.33x is the limit"
    return [
        row(what, "fio write direct, same disk", 0.25, over, plain, "MiB/s", durable),
        row(what, "the same, each block durable (--sync=dsync)", None, over, synced, "MiB/s",
            durable),
        row(f"{what}, blocks never used before", "fio write direct, a new file", None, fresh, new,
            "MiB/s", durable),
        row(f"{what}, TCP between processes", "fio write direct, same disk", None, tcp, plain,
            "MiB/s", durable),
    ]  # fmt: skip


def bulk(folder: Path, size_mib: int, rounds: int) -> list[Row]:
    """Sequential writes with three replicas; reads with one, cold and cached."""
    rows = writes(folder, size_mib, rounds)
    data = os.urandom(32 * MIB)
    with LocalCluster(folder / "one", nodes=1, replicas=1, chains=2, lease_s=10) as cluster:
        fs = cluster.filesystem()
        with fs.open("/f", "wb", block_size=32 * MIB) as file:
            for _ in range(size_mib // 32):
                file.write(data)
        inode = fs.client.stat("/f")
        buffer = bytearray(32 * MIB)

        def read() -> None:
            for offset in range(0, inode.length, len(buffer)):
                fs.client.read_ranges([Range(inode, offset, len(buffer), buffer)])

        cold = []
        for _ in range(rounds):
            drop_cache(folder / "one")
            cold.append(rates(size_mib, {"ours": read}, 1)["ours"])
        direct = statistics.median(fio(folder, "read", size_mib) for _ in range(rounds))
        rows.append(row("sequential read, 1 replica", "fio read direct, same disk", 0.7,
                        statistics.median(cold), direct, "MiB/s", "cold"))  # fmt: skip
        with by_tcp():
            remote = cluster.filesystem().client

        def read_by_tcp() -> None:
            for offset in range(0, inode.length, len(buffer)):
                remote.read_ranges([Range(inode, offset, len(buffer), buffer)])

        calls = {"unix": read, "tcp": read_by_tcp, "raw": lambda: raw_tcp(size_mib * MIB)}
        got = rates(size_mib, calls, rounds)
        for kind, name in (("tcp", "over TCP"), ("unix", "on one host")):
            rows.append(row(f"batch read {name}, 1 replica", "raw one-stream TCP",
                            0.7 if kind == "tcp" else None, got[kind], got["raw"], "MiB/s",
                            "page cache, checksums verified"))  # fmt: skip
        rows += small(fs.client, rounds)
    return rows


def small(client: FileSystemClient, rounds: int) -> list[Row]:
    """Random 4 KiB reads, 64 a batch, from the page cache."""
    inode = client.stat("/f")
    offsets = [(i * 7919 * 4096) % (inode.length - 4096) // 4096 * 4096 for i in range(64 * 16)]
    buffers = [bytearray(4096) for _ in range(64)]

    def read() -> None:
        for at in range(0, len(offsets), 64):
            client.read_ranges([
                Range(inode, o, 4096, b) for o, b in zip(offsets[at:], buffers, strict=False)
            ])  # fmt: skip

    got = rates(len(offsets), {"ours": read}, max(rounds, 5))["ours"]
    return [row("4 KiB batch_read(64), one client process", "–", None, got, None, "reads/s",
                "page cache; every 4 KiB verified", floor=100_000)]  # fmt: skip


def metadata(folder: Path, rounds: int) -> list[Row]:
    """Creates and stats, one client process, against SQLite's own durable transactions."""
    rows = []
    with LocalCluster(folder / "meta", nodes=1, replicas=1, lease_s=10) as cluster:
        client = cluster.filesystem().client
        count = [0]

        def create() -> None:
            start, count[0] = count[0], count[0] + 400
            jobs = [
                threading.Thread(target=lambda s=s: [  # type: ignore[misc]
                    client.meta("create", path=f"/{i}", mode=0o644, session="")
                    for i in range(s, s + 25)
                ])
                for s in range(start, start + 400, 25)
            ]  # fmt: skip
            for job in jobs:
                job.start()
            for job in jobs:
                job.join()

        store = SqliteKV(folder / "bare.sqlite")

        def bare() -> None:
            def put(start: int) -> None:
                for i in range(start, start + 25):
                    store.transact(lambda t, i=i: t.put(b"k%d" % i, b"v" * 150))  # type: ignore[misc]

            jobs = [threading.Thread(target=put, args=(s,)) for s in range(0, 400, 25)]
            for job in jobs:
                job.start()
            for job in jobs:
                job.join()

        got = rates(400, {"ours": create, "sqlite": bare}, rounds)
        store.close()
        rows.append(row("metadata create, durable, 16 threads", "durable SQLite puts, 16 threads",
                        0.7, got["ours"], got["sqlite"], "op/s"))  # fmt: skip
        calls = [("stat", {"path": f"/{i}"}) for i in range(200)]
        one = rates(100, {"x": lambda: [client.stat("/1") for _ in range(100)]}, rounds)["x"]
        many = rates(200, {"x": lambda: client.meta_many(calls)}, rounds)["x"]
        rows.append(row("stat, one at a time, one thread", "–", None, one, None, "op/s",
                        floor=10_000))  # fmt: skip
        rows.append(row("stat, 200 in a call", "–", None, many, None, "op/s", floor=10_000))
    return rows


def failover(folder: Path) -> list[Row]:
    """Kill a node of three with two replicas: how long reads and writes stand still; the refill."""
    lease_s = 2.0
    with LocalCluster(folder / "fail", nodes=3, replicas=2, chains=3, lease_s=lease_s) as cluster:
        fs = cluster.filesystem()
        data = os.urandom(192 * MIB)
        began = time.perf_counter()
        fs.pipe_file("/f", data)
        write_s = time.perf_counter() - began
        began = time.perf_counter()
        cluster.kill(1)
        assert fs.cat_file("/f", 0, 8 * MIB) == data[: 8 * MIB]
        reads_s = time.perf_counter() - began
        fs.pipe_file("/g", data[: 3 * MIB])
        writes_s = time.perf_counter() - began
        shutil.rmtree(folder / "fail" / "storage-1")
        refilled_mib = (192 + 3) * 2 / 3
        began = time.perf_counter()
        cluster.restart(1)
        while "SYNCING" not in states(cluster):
            time.sleep(0.01)
        filling = time.perf_counter()
        cluster.wait_healthy(120)
        ended = time.perf_counter()
        assert fs.cat_file("/f") == data
    limit, wrote = lease_s + 2, 192 / write_s
    return [
        Row("reads resume after kill -9 of a node", "T + 2 s", f"<= {limit} s", reads_s, limit, "s",
            limit / reads_s, reads_s <= limit, f"T = {lease_s} s"),
        Row("writes resume after kill -9 of a node", "T + 2 s", f"<= {limit} s", writes_s, limit,
            "s", limit / writes_s, writes_s <= limit, f"T = {lease_s} s"),
        row("resync of an emptied node", "2-replica write of the same run", 0.5,
            refilled_mib / (ended - filling), wrote, "MiB/s", "from the first chunk to healthy"),
        row("resync of an emptied node, its start included", "2-replica write of the same run",
            None, refilled_mib / (ended - began), wrote, "MiB/s"),
    ]  # fmt: skip


def states(cluster: LocalCluster) -> set[str]:
    """The states that any target has."""
    return {t["public"] for c in cluster.status()["chains"] for t in c["targets"]}


def kv_cache(folder: Path, rounds: int) -> list[Row]:
    """Blocks of 64 KiB by hash: from the page cache and from disk."""
    with LocalCluster(folder / "kv", nodes=1, replicas=1, chains=2, lease_s=10) as cluster:
        cache = KVCache(f"{cluster.url}/kv", 64 << 10)
        keys = [i.to_bytes(32, "big") for i in range(1024)]
        for at in range(0, 1024, 256):
            cache.put_many({k: os.urandom(64 << 10) for k in keys[at : at + 256]})

        def read() -> None:
            for at in range(0, 1024, 64):
                assert None not in cache.get_many(keys[at : at + 64])

        warm = rates(64, {"x": read}, rounds)["x"]
        cold = []
        for _ in range(rounds):
            drop_cache(folder / "kv")
            cold.append(rates(64, {"x": read}, 1)["x"])
    price = "40 GB/s was published for a large cluster"
    return [row("KV cache read from disk, 64 KiB blocks", "the same from the page cache", None,
                statistics.median(cold), warm, "MiB/s", price)]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small, few rounds")
    parser.add_argument("--folder", default=None, help="on the disk to measure")
    options = parser.parse_args()
    if shutil.which("fio") is None:
        raise SystemExit("fs: fio is not here; apt-get install fio")
    size_mib, rounds = (64, 1) if options.quick else (128, 5)
    version = subprocess.run(["fio", "--version"], capture_output=True, text=True, check=True)
    if options.folder:
        Path(options.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        rows = bulk(folder, size_mib, rounds)
        rows += metadata(folder, rounds) + failover(folder) + kv_cache(folder, rounds)
    if options.quick:
        for line in rows:
            print(line.what, line.ours, line.theirs, line.unit, line.ratio, line.reached)
        return
    save("fs", rows, {"fio": version.stdout.strip()})


if __name__ == "__main__":
    main()
