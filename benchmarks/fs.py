"""Measures `whalefall.fs` against the disk, the page cache and a bare socket of the same run.

`python benchmarks/fs.py [--quick]`: a cluster in a folder of this disk; fio, preadv and a raw TCP
stream beside it. Each row says what was cached. "Cold": the storage nodes' files were dropped from
the page cache (posix_fadvise) before the read.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from whalefall.fs import FileSystemClient, KVCache, LocalCluster
from whalefall.fs.client.filesystem import Range
from whalefall.fs.kv import SqliteKV
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


def fio(folder: Path, mode: str, size_mib: int) -> float:
    """fio's MiB/s, direct, 1 MiB blocks, queue of 8."""
    command = [
        "fio", "--name=x", f"--directory={folder}", f"--rw={mode}", "--bs=1m", "--direct=1",
        f"--size={size_mib}m", "--iodepth=8", "--ioengine=libaio", "--output-format=json",
        "--end_fsync=1",
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


def bulk(folder: Path, size_mib: int, rounds: int) -> list[Row]:
    """Sequential writes with three replicas; reads with one, cold and cached."""
    rows = []
    data = os.urandom(32 * MIB)
    with LocalCluster(folder / "three", nodes=3, replicas=3, lease_s=10) as cluster:
        fs = cluster.filesystem()

        def write() -> None:
            with fs.open("/f", "wb", block_size=32 * MIB) as file:
                for _ in range(size_mib // 32):
                    file.write(data)

        write()
        ours = rates(size_mib, {"ours": write}, rounds)["ours"]
    theirs = statistics.median(fio(folder, "write", size_mib) for _ in range(rounds))
    rows.append(row("3-replica sequential write, one disk", "fio write direct, same disk", 0.25,
                    ours, theirs, "MiB/s", "durable on all three; 0.33x is the limit"))  # fmt: skip
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
        got = rates(size_mib, {"ours": read, "tcp": lambda: raw_tcp(size_mib * MIB)}, rounds)
        rows.append(row("batch read over TCP, 1 replica", "raw one-stream TCP", 0.7, got["ours"],
                        got["tcp"], "MiB/s", "page cache, checksums verified"))  # fmt: skip
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
        data = os.urandom(64 * MIB)
        began = time.perf_counter()
        fs.pipe_file("/f", data)
        write_s = time.perf_counter() - began
        began = time.perf_counter()
        cluster.kill(1)
        assert fs.cat_file("/f") == data
        reads_s = time.perf_counter() - began
        fs.pipe_file("/g", data[: 3 * MIB])
        writes_s = time.perf_counter() - began
        shutil.rmtree(folder / "fail" / "storage-1")
        began = time.perf_counter()
        cluster.restart(1)
        cluster.wait_healthy(120)
        refill = (64 + 3) * 2 / 3 / (time.perf_counter() - began)
    limit = lease_s + 2
    return [
        Row("reads resume after kill -9 of a node", "T + 2 s", f"<= {limit} s", reads_s, limit, "s",
            limit / reads_s, reads_s <= limit, f"T = {lease_s} s"),
        Row("writes resume after kill -9 of a node", "T + 2 s", f"<= {limit} s", writes_s, limit,
            "s", limit / writes_s, writes_s <= limit, f"T = {lease_s} s"),
        row("resync of an emptied node, start included", "write of the same run", 0.5, refill,
            64 / write_s, "MiB/s"),
    ]  # fmt: skip


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
