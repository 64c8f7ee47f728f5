"""Rot that nobody's read meets: a write or a recovery that does has it mended, and goes through."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from whalefall.cli import main
from whalefall.fs import LocalCluster
from whalefall.fs.core.effects import Refused
from whalefall.fs.core.messages import Code, Kind, Tag, Update
from whalefall.fs.storage.engine import ChunkEngine
from whalefall.fs.storage.scrub import Scrubber

LEASE_S = 1.5


def rot(folder: Path, data: bytes) -> None:
    """Flip a bit of a content on disk."""
    flipped = 0
    for path in folder.glob("**/slots.*"):
        at = path.read_bytes().find(data[:64])
        if at >= 0:
            with path.open("r+b") as file:
                file.seek(at + 5000)
                file.write(bytes([data[5000] ^ 1]))
            flipped += 1
    assert flipped == 1


def nodes(cluster: LocalCluster) -> list[int]:
    """The chain's nodes, head first."""
    return [t["node"] for t in cluster.status()["chains"][0]["targets"]]


@pytest.mark.ranks
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_write_that_builds_on_rot_goes_through(tmp_path: Path, place: int) -> None:
    data = os.urandom(100_000)
    with LocalCluster(tmp_path, nodes=3, replicas=3, chains=1, lease_s=LEASE_S) as cluster:
        fs = cluster.filesystem(retry_s=30.0)
        fs.pipe_file("/a", data)
        node = nodes(cluster)[place]
        rot(tmp_path / f"storage-{node}", data)
        began_s = time.monotonic()
        fs.client.write(fs.client.stat("/a"), len(data), b"more")
        assert time.monotonic() - began_s < 8
        counters = cluster.connection().node(node, "counters")
        assert (counters["damaged"], counters["repaired"]) == (1, 1)
        for _ in range(6):  # whichever replica answers
            assert bytes(fs.client.read(fs.client.stat("/a"), 0, 200_000)[: len(data)]) == data


@pytest.mark.ranks
def test_a_recovery_that_must_copy_rot_goes_through(tmp_path: Path) -> None:
    data = os.urandom(100_000)
    with LocalCluster(tmp_path, nodes=3, replicas=3, chains=1, lease_s=LEASE_S) as cluster:
        fs = cluster.filesystem(retry_s=30.0)
        fs.pipe_file("/rot", data)
        _, before, last = nodes(cluster)
        cluster.kill(last)
        shutil.rmtree(tmp_path / f"storage-{last}")
        rot(tmp_path / f"storage-{before}", data)
        end_s = time.monotonic() + 20
        while cluster.status()["chains"][0]["targets"][-1]["public"] != "OFFLINE":
            assert time.monotonic() < end_s
            time.sleep(0.05)
        cluster.restart(last)
        cluster.wait_healthy(20)
        assert cluster.connection().node(before, "counters")["repaired"] == 1
        path = next((tmp_path / f"storage-{last}").glob("target-*/slots.*"))
        assert data in path.read_bytes()
        assert fs.cat_file("/rot") == data


@pytest.mark.ranks
def test_a_scrub_ends_where_nothing_can_be_mended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("whalefall.fs.commands.MEND_S", 1.5)
    data = os.urandom(100_000)
    with LocalCluster(tmp_path, nodes=1, replicas=1, lease_s=LEASE_S) as cluster:

        def scrub() -> tuple[object, str]:
            with pytest.raises(SystemExit) as end:
                main(["fs", "scrub", cluster.url])
            return end.value.code, capsys.readouterr().out

        fs = cluster.filesystem(retry_s=10.0)
        fs.pipe_file("/only", data)
        inode = fs.client.stat("/only")
        rot(tmp_path, data)
        for _ in range(2):  # found once, however often it is met
            code, words = scrub()
            assert code == 1 and "damaged 1, repaired 0" in words
        fs.client.write(inode, 0, data)
        code, words = scrub()
        assert code == 0 and "damaged 1, repaired 1" in words


def test_an_engine_reports_committed_rot_and_nothing_else(tmp_path: Path) -> None:
    told: list[bytes] = []
    engine = ChunkEngine(tmp_path, rotten=told.append)
    chunk, data, later = b"\0" * 16, os.urandom(100_000), os.urandom(100_000)

    def store(version: int, content: bytes, offset: int = 0) -> None:
        tag = Tag("client", 1, version, 1)
        message = Update(1, 1, chunk, Kind.WRITE, offset, len(content), 1 << 20, tag)
        engine.store(message, content, version, 1)

    store(1, data)
    engine.commit(chunk, 1, None)
    engine.load(chunk, False)
    assert told == []
    rot(tmp_path, data)
    for attempt in (lambda: store(2, b"abc", 7), lambda: engine.load(chunk, False)):
        told.clear()
        with pytest.raises(Refused, match="does not match its checksum"):
            attempt()
        assert told == [chunk]
    told.clear()
    store(2, later)
    rot(tmp_path, later)
    with pytest.raises(Refused, match="does not match its checksum"):
        engine.load(chunk, True)
    assert told == []  # what is pending has no good copy to be had: the protocol decides
    engine.close()


def test_a_chunk_counts_as_checked_once_what_it_is_like_is_known() -> None:
    """Else a scrub that is waited for ends before its last chunk's damage is known."""
    seen: list[int] = []

    class Engine:
        def entries(self) -> dict[bytes, None]:
            return {b"a": None, b"b": None}

        def load(self, chunk: bytes, pending: bool) -> None:
            seen.append(scrubber.checked)
            raise Refused(Code.CORRUPT, "rot")

    engines: Any = {1: Engine()}
    driver: Any = None
    scrubber = Scrubber(driver, engines, lambda target, chunk: None, 0.0)
    scrubber._one_pass(0.0)
    assert seen == [0, 1] and scrubber.checked == 2
