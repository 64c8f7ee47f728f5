"""Reading records against the original, and a million small files against one packed file.

`whalefall bench record --original FOLDER` also times FFRecord itself, from a folder that holds its
built package; without it those rows are left out. `--samples` sets the size of the second part;
its files need as many inodes. `--folder` keeps what was written for the next run. `--cold` adds
figures with an empty page cache, which every process of the machine then has to fill again.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from whalefall.record import FileReader, FileWriter, PackedFolder
from whalefall.record.packed import pack_files
from whalefall.testing.benchmark import Row, interleave, save

BATCH = 64
MANY = 100_000


def reading(folder: Path, original: Any, rounds: int) -> list[Row]:
    """Random batches of 64 from the page cache, checksums on, one process."""
    rows = []
    for kib, count, target in ((4, 20_000, 1.5), (100, 2_000, 2.0)):
        path = folder / f"{kib}k.ffr"
        data = random.Random(0).randbytes(kib << 10)
        with FileWriter(path, count) as writer:
            for _ in range(count):
                writer.write_one(data)
        drawn = random.Random(1)
        batches = [[drawn.randrange(count) for _ in range(BATCH)] for _ in range(200)]
        contenders = {"ours": _reads(FileReader(path), batches)}
        if original is not None:
            contenders["theirs"] = _reads(original.FileReader(str(path)), batches)
        times = interleave(contenders, rounds)
        rate = {name: len(batches) * BATCH / t.median_s for name, t in times.items()}
        if original is None:
            continue
        ratio = rate["ours"] / rate["theirs"]
        rows.append(
            Row(
                f"random batch of 64, {kib} KiB samples, page cache, checked",
                "FFRecord 1.4.0 (C++, libaio, zlib)", f">= {target}x", rate["ours"],
                rate["theirs"], "samples/s", ratio, ratio >= target,
            )
        )  # fmt: skip
        path.unlink()
    return rows


def _reads(reader: Any, batches: list[list[int]]) -> Callable[[], None]:
    def run() -> None:
        for batch in batches:
            reader.read(batch)

    return run


def make_files(root: Path, count: int) -> list[Path]:
    """A tree like ImageNet's: a thousand classes, `count` files of 110 bytes."""
    paths = []
    for i in range(count):
        label = f"n{1440764 + 9173 * (i % 1000):08d}"
        folder = root / label
        if i < 1000:
            folder.mkdir(parents=True)
        path = folder / f"{label}_{i // 1000:05d}.JPEG"
        path.write_bytes(f"{i:010d}".encode() * 11)
        paths.append(path)
    return sorted(paths)


def prepare(folder: Path, count: int) -> list[Path]:
    """The files, their tar and their packed folder, where they are not there yet."""
    names = folder / "names.txt"
    if names.exists():
        return [Path(line) for line in names.read_text().splitlines()]
    paths = make_files(folder / "files", count)
    relative = [path.relative_to(folder / "files") for path in paths]
    tree: dict[str, Any] = OrderedDict()
    for number, name in enumerate(relative):
        tree.setdefault(name.parent.name, OrderedDict())[name.name] = number
    pack_files(tree, paths, folder / "packed.ffr")
    listed = folder / "names.new"
    listed.write_text("".join(f"{name}\n" for name in relative))
    subprocess.run(
        ["tar", "-C", folder / "files", "-cf", folder / "files.tar", "-T", listed], check=True
    )
    listed.rename(names)
    return relative


def claim(folder: Path, count: int, rounds: int, cold: bool) -> list[Row]:
    """Open and list, and the first random batch of 256: files, tar, packed."""
    relative = prepare(folder, count)
    wanted = random.Random(2).sample([str(name) for name in relative], 256)
    contenders = {
        "lazy": lambda batch: _lazy(folder / "packed.ffr", wanted if batch else []),
        "packed": lambda batch: _packed(folder / "packed.ffr", wanted if batch else []),
        "files": lambda batch: _walked(folder / "files", wanted if batch else []),
        "files, each with its size": lambda batch: _sized(folder / "files"),
        "tar": lambda batch: _tarred(folder / "files.tar", wanted if batch else []),
    }
    rows = []
    for state in ("warm", "cold") if cold else ("warm",):
        for batch in (False, True):
            samples: dict[str, list[float]] = {name: [] for name in contenders}
            for turn in range(rounds):
                for name, call in contenders.items():
                    if name == "tar" and count > MANY and (turn or batch or state == "cold"):
                        continue  # it takes minutes
                    if name.endswith("size") and (batch or (turn and count > MANY)):
                        continue
                    if state == "cold":
                        _drop_caches()
                    start = time.perf_counter()
                    listed, opened = call(batch)
                    samples[name].append(time.perf_counter() - start)
                    assert listed == count
                    del opened  # freeing a million names is no part of opening them
            rows += _claim_rows(state, batch, count, samples)
    return rows


def _claim_rows(state: str, batch: bool, count: int, samples: dict[str, list[float]]) -> list[Row]:
    median = {name: sorted(times)[len(times) // 2] for name, times in samples.items() if times}
    what = f"{count:,} small samples, {state}: open and list"
    what += ", then a random batch of 256" if batch else ""
    rows = []
    peers = [name for name in median if name not in ("lazy", "packed")]
    for ours, how in (("lazy", "names made when asked for"), ("packed", "names as lists of str")):
        for peer in peers:
            ratio = median[peer] / median[ours]
            has_target = peer.startswith("files") and not batch
            reached = ratio >= 50 and median[ours] < 0.3
            published = "; published: ImageNet in 0.29 s instead of 15 s"
            rows.append(
                Row(
                    what, f"the same samples as {peer}", "< 0.3 s, >= 50x" if has_target else "",
                    median[ours], median[peer], "s", ratio, reached if has_target else None,
                    how + (published if has_target and peer == "files" else ""),
                )
            )  # fmt: skip
    return rows


def _lazy(path: Path, wanted: list[str]) -> tuple[int, Any]:
    packed = PackedFolder(path)
    listed = len(packed.names)
    packed.read(wanted)
    return listed, packed


def _sized(root: Path) -> tuple[int, Any]:
    """A walk that learns each file's size, as a packed folder's reader has them too."""
    sizes = 0
    listed = 0
    waiting = [str(root)]
    while waiting:
        for entry in os.scandir(waiting.pop()):
            if entry.is_dir():
                waiting.append(entry.path)
            else:
                sizes += entry.stat().st_size
                listed += 1
    return listed, sizes


def _packed(path: Path, wanted: list[str]) -> tuple[int, Any]:
    packed = PackedFolder(path)
    listed = sum(len(packed.list(folder)) for folder in packed.list())
    packed.read(wanted)
    return listed, packed


def _walked(root: Path, wanted: list[str]) -> tuple[int, Any]:
    listed = sum(len(files) for _, _, files in os.walk(root))
    for name in wanted:
        (root / name).read_bytes()
    return listed, None


def _tarred(path: Path, wanted: list[str]) -> tuple[int, Any]:
    with tarfile.open(path) as tar:
        names = {member.name: member for member in tar}
        for name in wanted:
            tar.extractfile(names[name]).read()  # type: ignore[union-attr]
    return len(names), names


def _drop_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--original", type=Path, help="folder of the built ffrecord package")
    parser.add_argument("--samples", type=int, default=1_281_167, help="small samples, as files")
    parser.add_argument("--folder", type=Path, help="where to write, kept (default: temporary)")
    parser.add_argument("--cold", action="store_true", help="drop the page cache, too")
    parser.add_argument("--quick", action="store_true", help="10,000 small samples, 3 rounds")
    args = parser.parse_args()
    original = None
    if args.original is not None:
        sys.path.insert(0, str(args.original))
        original = importlib.import_module("ffrecord")
    folder = args.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    try:
        rows = reading(folder, original, 3 if args.quick else 9)
        rows += claim(folder, 10_000 if args.quick else args.samples, 3, args.cold)
        save("record", rows, {"FFRecord": "1.4.0 (3f6380c)"} if original else {})
    finally:
        if args.folder is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
