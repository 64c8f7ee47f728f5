"""What a client refuses, and what it never answers: zeros, "not there", half a batch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from whalefall.fs import (
    ClusterError,
    FileSystemClient,
    FsError,
    KVCache,
    LocalCluster,
    StorageError,
    WhalefallFileSystem,
)
from whalefall.fs.rpc import Call

ONES, TWOS = b"1" * 300_000, b"2" * 200_000
READS: dict[str, Callable[[WhalefallFileSystem, str], Any]] = {
    "cat": lambda fs, path: fs.cat_file(path),
    "ranges": lambda fs, path: b"".join(fs.cat_ranges([path] * 2, [0, 100_000], [100_000, None])),
    "checksum": lambda fs, path: fs.checksum(path),
}


def replaced_after_each_stat(fs: WhalefallFileSystem, path: str, times: int) -> None:
    """`times` times, what a stat has found is replaced and collected before it is read."""
    client, stat, left = fs.client, fs.client.stat, [times]

    def then_replace(name: str, *args: Any, **kwargs: Any) -> Any:
        found = stat(name, *args, **kwargs)
        if name == path and left[0] and kwargs.get("wanted"):
            left[0] -= 1
            fs.pipe_file(path, TWOS)
            while client.connection.stored_end(found):
                client._ask(Call("gc", {}))
        return found

    client.stat = then_replace  # type: ignore[method-assign,assignment]


@pytest.mark.parametrize("times", [1, 10])
@pytest.mark.parametrize("how", READS)
def test_a_file_replaced_meanwhile_never_reads_as_zeros(
    cluster: LocalCluster, how: str, times: int
) -> None:
    fs = cluster.filesystem(chunk_bytes=64 << 10)
    fs.pipe("/replaced", TWOS)
    wanted = READS[how](fs, "/replaced")
    fs.pipe("/replaced", ONES)
    replaced_after_each_stat(fs, "/replaced", times)
    assert READS[how](fs, "/replaced") == wanted
    assert fs.client._open == set()


def test_a_collected_file_is_stale_for_whoever_has_its_inode(fs: WhalefallFileSystem) -> None:
    fs.pipe("/stale", ONES)
    inode = fs.client.stat("/stale")
    fs.rm("/stale")
    while fs.client.connection.stored_end(inode):
        fs.client._ask(Call("gc", {}))
    with pytest.raises(FsError, match="it was removed meanwhile; open it by its name"):
        fs.client.read(inode, 0, 10)


def test_a_sparse_file_reads_as_zeros(cluster: LocalCluster) -> None:
    fs = cluster.filesystem(chunk_bytes=64 << 10)
    fs.pipe("/sparse", b"begin")
    fs.client.truncate(fs.client.stat("/sparse"), 200_000)
    assert fs.cat("/sparse") == b"begin" + bytes(199_995)
    assert fs.cat_ranges(["/sparse"], [100_000], [100_010]) == [bytes(10)]


def test_places_that_cannot_be_are_refused_before_anything_is_touched(
    fs: WhalefallFileSystem,
) -> None:
    fs.pipe("/precious", ONES)
    client = fs.client
    inode = client.stat("/precious")
    most = (1 << 32) * (1 << 20)
    for length, why in ((-1, "byte -1, wanted 0 or more"), (1 << 62, f"wanted at most {most}")):
        with pytest.raises(FsError, match=why):
            client.truncate(inode, length)
        with pytest.raises(FsError, match=f"length {length}, wanted 0 … {most}"):
            client.meta("set_length", inode=inode.id, length=length)
    for offset, why in ((-5, "byte -5, wanted"), (most, f"byte {most + 1}, wanted at most {most}")):
        with pytest.raises(FsError, match=why):
            client.write(inode, offset, b"x")
    with pytest.raises(FsError, match="byte -1, wanted 0 or more"):
        client.read(inode, -1, 5)
    assert client.read(inode, 1 << 62, 5) == b""
    assert fs.cat("/precious") == ONES and client.stat("/precious").length == len(ONES)


def test_bytes_need_the_same_permission_as_open(
    fs: WhalefallFileSystem, cluster: LocalCluster
) -> None:
    fs.pipe("/private", b"secret")
    fs.chmod("/private", 0o600)
    other = cluster.filesystem(uid=1234, gid=1234)
    asked: list[Callable[[], Any]] = [
        lambda: other.open("/private", "rb"), lambda: other.cat("/private"),
        lambda: other.cat_ranges(["/private"], [0], [6], on_error="raise"),
        lambda: other.checksum("/private"),
        lambda: other.client.truncate(other.client.stat("/private"), 0),
        lambda: other.client.meta("set_length", inode=fs.info("/private")["ino"], length=0),
    ]  # fmt: skip
    for ask in asked:
        with pytest.raises(PermissionError, match="mode is 600"):
            ask()
    assert isinstance(other.cat_ranges(["/private"], [0], [6])[0], PermissionError)
    assert other.info("/private")["size"] == 6 and fs.cat("/private") == b"secret"


def test_a_chain_that_is_down_fails_only_what_lies_on_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LocalCluster(tmp_path, nodes=2, replicas=1, chains=3, lease_s=1.0) as cluster:
        fs = cluster.filesystem(retry_s=1.5, stripe=1)
        paths = [f"/one/{i}" for i in range(6)]
        for i, path in enumerate(paths):
            fs.pipe(path, b"%d" % i * 100)
        monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url: (fs, url.removeprefix("file:/")))
        caches = {key: KVCache(f"/kv-{key}", 4096) for key in ("a", "b", "c")}
        for key, cache in caches.items():
            cache.put(key, key.encode() * 4096)
        layouts = [fs.client.stat(path).layout for path in paths]
        node_of = {
            c["chain"]: c["targets"][0]["node"]
            for c in fs.client.connection.manager("status")["chains"]
        }
        cluster.kill(1)
        lost = [node_of[layout.chains[0]] == 1 for layout in layouts if layout]
        assert set(lost) == {True, False}
        found = fs.cat_ranges(paths, [0] * 6, [100] * 6, on_error="return")
        for i, (down, got) in enumerate(zip(lost, found, strict=True)):
            assert isinstance(got, StorageError) if down else got == b"%d" % i * 100
        with pytest.raises(StorageError, match="gave up after"):
            fs.cat_ranges(paths, [0] * 6, [100] * 6, on_error="raise")
        with caplog.at_level(logging.WARNING, "whalefall.fs"):
            got = {key: [cache.get(key) for _ in range(2)] for key, cache in caches.items()}
        missed = [key for key, twice in got.items() if twice == [None, None]]
        assert 0 < len(missed) < 3
        assert all(got[k] == [k.encode() * 4096] * 2 for k in caches if k not in missed)
        told = [r for r in caplog.records if "cannot be read" in r.message]
        assert len(told) == len(missed)
        assert all(c.damaged == 0 for c in caches.values())
        cluster.restart(1)
        cluster.wait_healthy(60)
        assert all(cache.get(key) == key.encode() * 4096 for key, cache in caches.items())

        cluster.kill("meta-1")
        asks: list[Callable[[str], Any]] = [
            fs.exists, fs.isfile, fs.isdir, fs.find, lambda path: list(fs.walk(path)),
            lambda path: fs.touch(path, truncate=False),
        ]  # fmt: skip
        for ask in asks:
            with pytest.raises(ClusterError, match="no metadata server did"):
                ask("/one/0")


def test_what_is_not_there_is_false(fs: WhalefallFileSystem) -> None:
    fs.pipe("/there/file", b"x")
    asked = {"/there": (True, False, True), "/there/file": (True, True, False),
             "/none": (False,) * 3, "/there/file/below": (False,) * 3}  # fmt: skip
    for path, answers in asked.items():
        assert (fs.exists(path), fs.isfile(path), fs.isdir(path)) == answers, path


def test_of_two_that_make_one_name_exclusively_one_fails(cluster: LocalCluster) -> None:
    fs = cluster.filesystem()
    first, second = fs.open("/exclusive", "xb"), fs.open("/exclusive", "xb")
    second.write(b"second")
    first.write(b"first")
    second.close()
    with pytest.raises(FileExistsError):
        first.close()
    assert fs.cat("/exclusive") == b"second"
    assert fs.client._open == set()


def test_a_failed_file_cannot_be_committed(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs = cluster.filesystem()
    with fs.open("/later", "wb", autocommit=False) as good:
        good.write(b"whole")
    assert not fs.exists("/later")
    good.commit()
    assert fs.cat("/later") == b"whole"
    full = StorageError(28, "full")

    def fail(_: Any) -> None:
        raise full

    file = fs.open("/later", "wb", autocommit=False)
    file.write(b"half")
    monkeypatch.setattr(fs.client.connection, "update_all", fail)
    with pytest.raises(StorageError, match="full"):
        file.close()
    monkeypatch.undo()
    file.end = 4  # whatever a caller knows of it
    with pytest.raises(StorageError, match="full"):
        file.commit()
    assert fs.cat("/later") == b"whole"


def test_an_address_where_nobody_is_and_one_without_a_token(
    cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WHALEFALL_FS_TOKEN", raising=False)
    monkeypatch.setenv("WHALEFALL_CACHE", str(tmp_path))
    with pytest.raises(ClusterError, match="no token for the cluster at"):
        FileSystemClient([(cluster.host, cluster.port)])
    with pytest.raises(ClusterError, match=r"no cluster manager answered at 127\.0\.0\.1:1; is it"):
        FileSystemClient([("127.0.0.1", 1)])
