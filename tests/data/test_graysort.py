"""GraySort: published checksums, records against a plain definition, sorting in little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from whalefall.data import Session
from whalefall.data.graysort import (
    Summary,
    gray_sort,
    make_records,
    sort_file,
    summarize,
    valsort,
)
from whalefall.errors import ConfigError, MissingError

A, C = 0x2360ED051FC65DA44385DF649FCCF645, 0x4A696D47726179524950202020202001
MASKS = [
    "00000000000000000000",
    "f0e8e4e2e1d8d4d2d1cc",
    "cac9c6c5c3b8b4b2b1ac",
    "aaa9a6a5a39c9a999695",
    "938e8d8b87787472716c",
    "6a696665635c5a595655",
    "534e4d4b473c3a393635",
    "332e2d2b271e1d1b170f",
    "c8c4c2c1989492918ce0",
    "170f332e2d2b271e1d1b",
]


def state(steps: int) -> int:
    """The generator's state after so many steps, by the closed form in the integers."""
    power = pow(A, steps, (A - 1) << 128)
    return C * ((power - 1) // (A - 1)) % (1 << 128)


def plain_record(index: int) -> bytes:
    parts = []
    for part, mask in enumerate(MASKS):
        number = state(index + 1 + part) >> 48
        parts.append((number ^ int(mask, 16)).to_bytes(10, "big"))
    return b"".join(parts)


def plain_ascii_record(index: int) -> bytes:
    number = state(index + 1)
    high, low = number >> 64, number & (1 << 64) - 1
    key = [32 + high // 95**i % 95 for i in range(8)] + [32 + low // 95**i % 95 for i in range(2)]
    digits = "".join(c * 4 for c in f"{low % (1 << 52):013X}")
    return bytes(key) + f"  {index:032X}  {digits}\r\n".encode()


def test_known_checksums() -> None:
    assert summarize(make_records(1000)).checksum == 0x1EA6370B955
    assert summarize(make_records(1000, skewed=True)).checksum == 0x1E96301166B
    assert make_records(1).tobytes().startswith(b"JimGrayRIP")


@pytest.mark.parametrize("index", [0, 1, 9, 10, 12345, 10**12, (1 << 63) + 7])
def test_a_record_follows_from_its_number_alone(index: int) -> None:
    assert make_records(1, index).tobytes() == plain_record(index)
    assert make_records(1, index, ascii=True).tobytes() == plain_ascii_record(index)
    both = make_records(40_000, index)
    assert both[-1].tobytes() == plain_record(index + 39_999)


def test_skewed_keys_keep_the_rest_of_the_record() -> None:
    plain, skewed = make_records(5000, 77), make_records(5000, 77, skewed=True)
    assert (plain[:, 6:] == skewed[:, 6:]).all()
    share = (plain[:, :6] != skewed[:, :6]).any(axis=1).mean()
    assert 0.7 < share < 0.76  # 48 of 64 records, less those replaced by equal bits


def test_summary_counts_order_duplicates_and_crcs() -> None:
    records = make_records(5000)
    order = np.lexsort(records[:, 9::-1].T)
    ordered = np.concatenate([records[order], records[order][-1:]])
    found = summarize(ordered)
    assert (found.records, found.unordered, found.duplicates) == (5001, 0, 1)
    assert found.checksum == sum(zlib.crc32(row.tobytes()) for row in ordered)
    ordered[[1000, 1001]] = ordered[[1001, 1000]]
    broken = summarize(ordered)
    assert (broken.unordered, broken.first_unordered) == (1, 1001)


@pytest.mark.parametrize("cut", [0, 1, 999, 1000, 2000])
def test_summaries_of_parts_merge(cut: int) -> None:
    records = np.repeat(make_records(1000), 2, axis=0)
    whole = summarize(records)
    assert summarize(records[:cut]) + summarize(records[cut:]) == whole
    assert Summary() + whole == whole


@pytest.mark.parametrize("kind", ["plain", "skewed", "ascii", "equal", "two keys", "hot key"])
@pytest.mark.parametrize("memory", [None, 16 << 20])
def test_sorted_is_a_stable_permutation(tmp_path: Path, kind: str, memory: int | None) -> None:
    records = make_records(200_000, skewed=kind == "skewed", ascii=kind == "ascii").copy()
    if kind == "equal":
        records[:, :10] = 255
    elif kind == "two keys":
        records[:, :10] = np.arange(200_000)[:, None] % 2
    elif kind == "hot key":
        records[np.arange(200_000) % 10 != 0, :10] = 7
    (tmp_path / "in").write_bytes(records.tobytes())
    assert sort_file(str(tmp_path / "in"), str(tmp_path / "out"), memory) == 200_000
    got = np.fromfile(tmp_path / "out", np.uint8).reshape(-1, 100)
    keys = records[:, :10].copy().view(">u8,>u2").ravel()
    assert (got == records[np.argsort(keys, kind="stable", order=["f0", "f1"])]).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 16385])
def test_sizes_at_the_edges(tmp_path: Path, count: int) -> None:
    (tmp_path / "f").write_bytes(make_records(count).tobytes())
    sort_file(str(tmp_path / "f"), str(tmp_path / "f"))  # in place
    found = valsort([str(tmp_path / "f")])
    assert found.ok and found.records == count
    assert found.checksum == summarize(make_records(count)).checksum


def test_bad_files_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "odd").write_bytes(b"x" * 150)
    with pytest.raises(ConfigError, match="150 bytes"):
        sort_file(str(tmp_path / "odd"), str(tmp_path / "out"))
    with pytest.raises(MissingError, match="none"):
        valsort([str(tmp_path / "none")])
    (tmp_path / "ok").write_bytes(make_records(10).tobytes())
    with pytest.raises(ConfigError, match="wanted at least"):
        sort_file(str(tmp_path / "ok"), str(tmp_path / "out"), 1000)
    assert not (tmp_path / "out").exists()


def run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "whalefall", "data", *args]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


def test_command_line(tmp_path: Path) -> None:
    source, target = str(tmp_path / "a"), str(tmp_path / "b")
    assert run("gensort", "1000", source).returncode == 0
    unsorted = run("valsort", source)
    assert unsorted.returncode == 1 and "Checksum: 1ea6370b955" in unsorted.stdout
    assert run("sort", source, target, "--memory", "64MB").returncode == 0
    found = run("valsort", "--json", target)
    assert found.returncode == 0
    assert json.loads(found.stdout) == {
        "records": 1000,
        "checksum": "1ea6370b955",
        "duplicates": 0,
        "unordered": 0,
        "first_unordered": None,
    }
    bad = run("sort", source, target, "--memory", "much")
    assert bad.returncode == 2 and bad.stderr.startswith("ConfigError: size is 'much'")


@pytest.mark.parametrize("kind", ["plain", "skewed", "hot key", "one record"])
def test_as_a_plan_it_is_the_same_sort(sp: Session, tmp_path: Path, kind: str) -> None:
    sizes = (3000, 0, 5001) if kind != "one record" else (0, 1)
    records = make_records(sum(sizes), skewed=kind == "skewed").copy()
    if kind == "hot key":
        records[np.arange(len(records)) % 5 != 0, :10] = 7
    (tmp_path / "in").mkdir()
    for index, end in enumerate(np.cumsum(sizes)):
        part = records[end - sizes[index] : end]
        (tmp_path / "in" / f"{index}.dat").write_bytes(part.tobytes())
    gray_sort(sp, str(tmp_path / "in"), str(tmp_path / "out"), npartitions=7)
    parts = sorted((tmp_path / "out").glob("*.dat"))
    assert [p.name for p in parts] == [f"part-{i:05d}.dat" for i in range(7)]
    got = np.concatenate([np.fromfile(p, np.uint8) for p in parts]).reshape(-1, 100)
    keys = records[:, :10].copy().view(">u8,>u2").ravel()
    assert (got == records[np.argsort(keys, kind="stable", order=["f0", "f1"])]).all()
    if kind == "plain":
        assert max(p.stat().st_size for p in parts) < 1.5 * len(records) / 7 * 100


def test_a_plan_without_whole_records_is_refused(sp: Session, tmp_path: Path) -> None:
    (tmp_path / "odd").write_bytes(b"x" * 150)
    with pytest.raises(ConfigError, match="150 bytes"):
        gray_sort(sp, str(tmp_path / "odd"), str(tmp_path / "out"))
    with pytest.raises(MissingError, match="no file matches"):
        gray_sort(sp, str(tmp_path / "*.dat"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
