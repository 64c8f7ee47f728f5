"""Targets that cannot be written, disks that are full, and what killed writers leave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from whalefall.data import Session, init, storage
from whalefall.data.errors import SqlError, WriteError
from whalefall.data.graysort import gensort
from whalefall.data.graysort.sort import sort_file
from whalefall.data.scratch import scratch_folder
from whalefall.errors import ConfigError


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount on this system")
    if done.returncode != 0:
        pytest.skip(f"a small disk needs the right to mount: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def noise(session: Session) -> Any:
    """4 MB that do not compress."""
    return session.partial_sql("select md5(i::varchar) as s from range(120000) t(i)")


def one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text, text
    return text


def test_a_full_disk_leaves_the_earlier_result(sp: Session, small_disk: Path) -> None:
    out = small_disk / "out"
    sp.from_items([1]).write_parquet(str(out))
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(WriteError, match=r"^DataSinkTask.*No space left.*free space") as caught:
        noise(sp).write_parquet(str(out))
    assert str(out) in one_line(caught.value) and caught.value.errno == 28
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in small_disk.iterdir()] == ["out"]
    with pytest.raises(WriteError, match="No space left"):
        noise(sp).write_parquet(f"local://{small_disk}/remote")
    assert [p.name for p in small_disk.iterdir()] == ["out"]


def test_a_full_data_root_is_named(small_disk: Path) -> None:
    with init(data_root=str(small_disk), cpus=1) as session:
        rows = session.from_arrow(noise_table(4)).map(lambda row: row)
        with pytest.raises(WriteError, match=r"^TableSourceTask.*not written: .*No space"):
            rows.compute()
        with pytest.raises(WriteError, match=r"^ArrowBatchTask.*not written: .*No space") as caught:
            session.from_items([1]).map_batches(lambda _: noise_table(4)).compute()
        one_line(caught.value)
        with pytest.raises(SqlError, match=r"SQL node.*No space left"):
            noise(session).compute()


def noise_table(megabytes: int) -> Any:
    import pyarrow as pa

    return pa.table({"s": [os.urandom(1000) for _ in range(1000 * megabytes)]})


def test_a_full_disk_leaves_no_file_of_records(small_disk: Path, tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="No space left"):
        gensort(str(small_disk / "in"), 100_000)
    gensort(str(tmp_path / "in"), 100_000)
    with pytest.raises(WriteError, match="No space left"):
        sort_file(str(tmp_path / "in"), str(small_disk / "out"))
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("file", "file is a file, wanted a folder"),
        ("file/below/out", "file is no folder; a part of the path is a file"),
        ("nope://x/out", "nope"),
        ("", "is '', wanted a path or an fsspec URL"),
    ],
)
def test_a_bad_target_is_refused_before_anything_runs(
    sp: Session, tmp_path: Path, target: str, message: str
) -> None:
    (tmp_path / "file").write_text("mine")
    path = target if "://" in target or not target else str(tmp_path / target)
    before = sp.num_tasks_executed
    for write in (
        lambda frame: frame.write_parquet(path),
        lambda frame: frame.write_ffrecord(path, "item"),
    ):
        with pytest.raises((ConfigError, WriteError), match=message) as caught:
            write(sp.from_items(["a"]).map("item"))
        one_line(caught.value)
    assert sp.num_tasks_executed == before
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_relative_target_may_be_new(
    sp: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sp.from_items([1]).write_parquet("new/deep/")
    sp.from_items([2]).write_parquet("other")
    assert sp.read_parquet("new/deep").take_all() == [{"item": 1}]
    assert sp.read_parquet("other/*.parquet").take_all() == [{"item": 2}]


def test_a_folder_of_another_user_is_refused(
    sp: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(WriteError, match="denied; choose a folder that this user may") as caught:
        sp.from_items([1]).write_parquet(str(tmp_path / "a" / "out"))
    one_line(caught.value)


def test_a_store_that_fails_keeps_nothing(
    sp: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("quota of the bucket\nand more")

    url = f"local://{tmp_path}/out"
    monkeypatch.setattr(storage, "_take_place", refuse)
    with pytest.raises(WriteError, match=r"out: not written: RuntimeError: quota of the bucket$"):
        sp.from_items([1]).write_parquet(url)
    assert list(tmp_path.iterdir()) == []


WRITER = """
import sys, time
from whalefall.data.scratch import scratch_folder
with scratch_folder(sys.argv[1]) as folder:
    open(folder + "/part", "w").close()
    print(folder, flush=True)
    time.sleep(600)
"""


def test_folders_of_killed_writers_go_and_those_of_live_ones_stay(
    sp: Session, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", WRITER, str(out)]
    writers = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in "ab"]
    try:
        dead, alive = (Path(w.stdout.readline().strip()) for w in writers if w.stdout)
        other_host = tmp_path / ".out.00000000-12345678.tmp"
        other_host.mkdir()
        writers[0].send_signal(signal.SIGKILL)
        writers[0].wait()
        assert (dead / "part").exists()
        sp.from_items([1]).write_parquet(str(out))
        assert not dead.exists()
        assert (alive / "part").exists() and other_host.exists()
        assert sorted(tmp_path.iterdir()) == sorted([out, alive, other_host])
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()


def test_a_scratch_folder_goes_with_its_block(tmp_path: Path) -> None:
    with scratch_folder(str(tmp_path / "x")) as first, scratch_folder(str(tmp_path / "x")) as other:
        assert first != other and os.path.isdir(first) and os.path.isdir(other)
        os.rename(other, tmp_path / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_the_spill_of_a_killed_sort_goes_with_the_next(tmp_path: Path) -> None:
    gensort(str(tmp_path / "in"), 400_000)
    text = (
        "import sys; from whalefall.data.graysort import sort as s\n"
        "s.Sorter.emit = lambda *a: (print('spilled', flush=True), __import__('time').sleep(600))\n"
        "s.sort_file(sys.argv[1], sys.argv[2], 16 << 20)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", text, str(tmp_path / "in"), str(tmp_path / "out")]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "spilled\n"
        process.kill()
    end = time.monotonic() + 10
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    assert sorted(p.name[:4] for p in tmp_path.iterdir()) == [".out", "in"]
    sort_file(str(tmp_path / "in"), str(tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
