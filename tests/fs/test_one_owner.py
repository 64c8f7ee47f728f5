"""A folder has one owner: two clusters, two processes or two engines never serve the same data."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from whalefall.errors import ConfigError
from whalefall.fs import LocalCluster
from whalefall.fs.lock import FolderLock
from whalefall.fs.process import Settings, own
from whalefall.fs.storage.engine import ChunkEngine


def up(folder: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "whalefall", "fs", "up", str(folder), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


@pytest.mark.ranks
def test_a_second_cluster_on_a_folder_is_refused_at_once(tmp_path: Path) -> None:
    one = up(tmp_path, "--nodes", "1", "--replicas", "1")
    try:
        assert "1 nodes" in first_line(one)
        port = (tmp_path / "port").read_bytes()
        began_s = time.monotonic()
        two = up(tmp_path, "--nodes", "1", "--replicas", "1")
        words, _ = two.communicate(timeout=60)
        assert two.returncode == 2, words
        assert words.count("\n") == 1 and f"{tmp_path} is in use by pid {one.pid}; stop" in words
        assert time.monotonic() - began_s < 20  # most of it imports
        assert (tmp_path / "port").read_bytes() == port
        with pytest.raises(ConfigError, match=f"in use by pid {one.pid}"):
            LocalCluster(tmp_path, nodes=1, replicas=1).start()
    finally:
        one.send_signal(signal.SIGTERM)
        words, _ = one.communicate(timeout=60)
    assert one.returncode == 0 and words == "ending\n"
    with LocalCluster(tmp_path, nodes=1, replicas=1) as cluster:  # it is free again
        with pytest.raises(ConfigError, match=f"in use by pid {os.getpid()}"):
            LocalCluster(tmp_path, nodes=1, replicas=1).start()
        cluster.filesystem().pipe_file("/f", b"there")


@pytest.mark.ranks
@pytest.mark.parametrize("role", ["storage", "manager", "meta"])
def test_what_a_killed_parent_left_is_waited_for_and_keeps_a_new_one_out(
    tmp_path: Path, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock of each process alone, the parent's being free."""
    folder = tmp_path / "storage-1" if role == "storage" else tmp_path
    number = {"storage": 1, "manager": 0, "meta": 1001}[role]
    settings = Settings(
        role=role, number=number, folder=str(folder), managers=[], token_file="token"
    )
    left = own(settings)
    monkeypatch.setattr("whalefall.fs.cluster.LEFT_S", 0.2)
    monkeypatch.setattr("whalefall.fs.process.LEFT_S", 0.2)
    cluster = LocalCluster(tmp_path, nodes=1, replicas=1, lease_s=1.0)
    with pytest.raises(ConfigError, match=f"{folder} is in use by pid {os.getpid()}"):
        cluster.start()
    assert not (tmp_path / "port").exists()
    with pytest.raises(ConfigError, match="is in use"):
        own(settings)
    left.release()
    own(settings).release()
    with cluster:
        for name in ("manager", "meta-1", "storage-1"):
            cluster.kill(name)
            cluster.restart(name)  # a kill frees the lock
        with pytest.raises(ConfigError, match="in use by pid"):
            own(settings)


def test_a_port_that_is_taken_is_said_at_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1 cannot be had"):
            LocalCluster(tmp_path, port=port).start()
    FolderLock(tmp_path).release()  # it let go of it


def test_a_folder_frees_itself_with_its_owner(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; from whalefall.fs.lock import FolderLock; "
        "lock = FolderLock(pathlib.Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert first_line(process) == "held\n"
        with pytest.raises(ConfigError, match=f"pid {process.pid}; stop it first"):
            FolderLock(tmp_path, wait_s=0.1)
    finally:
        process.kill()
        process.communicate()
    lock = FolderLock(tmp_path, wait_s=5.0)
    lock.release()
    lock.release()


def test_an_engine_opens_a_folder_once(tmp_path: Path) -> None:
    engine = ChunkEngine(tmp_path)
    with pytest.raises(ConfigError, match=f"{tmp_path} is in use by pid {os.getpid()}"):
        ChunkEngine(tmp_path)
    engine.close()
    ChunkEngine(tmp_path).close()


def test_an_engine_that_cannot_open_leaves_its_folder_free(tmp_path: Path) -> None:
    (tmp_path / "meta.sqlite").write_bytes(b"no database" * 1000)
    for _ in range(2):
        with pytest.raises(Exception, match="not a database"):
            ChunkEngine(tmp_path)
