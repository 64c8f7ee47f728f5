"""FileReader: indices over several files, views, memory of the caller, pickle, fork, URLs."""

import multiprocessing
import os
import pickle

import fsspec
import numpy as np
import pytest

from whalefall.errors import DtypeError, MissingError, ShapeError
from whalefall.record import FileReader, FileWriter, source
from whalefall.record.reader import ClosedError


@pytest.fixture
def folder(tmp_path):
    """Three files of 4, 0 and 3 samples; sample i of all is 10 + i bytes of value i."""
    at = 0
    for number, count in enumerate((4, 0, 3)):
        with FileWriter(tmp_path / f"{number}.ffr", count) as writer:
            for _ in range(count):
                writer.write_one(bytes([at]) * (10 + at))
                at += 1
    return tmp_path


def test_an_index_counts_over_all_files(folder):
    with FileReader(folder) as reader:
        assert reader.n == len(reader) == 7
        got = reader.read([6, 0, 4, 3, 4])
        assert [(len(s), s[0]) for s in got] == [(16, 6), (10, 0), (14, 4), (13, 3), (14, 4)]
        assert reader.locate(5) == (str(folder / "2.ffr"), 1)


def test_a_list_keeps_its_order_and_a_folder_sorts(folder):
    names = [str(folder / f"{i}.ffr") for i in (2, 0)]
    assert FileReader(names).read_one(0)[0] == 4
    assert FileReader(folder).fnames == [str(folder / f"{i}.ffr") for i in range(3)]


@pytest.mark.parametrize("indices", [[], (), np.array([], np.int64)])
def test_no_indices_give_no_samples(folder, indices):
    assert FileReader(folder).read(indices) == []


@pytest.mark.parametrize("kind", [np.int32, np.uint8, np.int64])
def test_numpy_integers_are_indices(folder, kind):
    assert FileReader(folder).read(np.array([5], kind))[0][0] == 5
    assert FileReader(folder).read_one(kind(2))[0] == 2


def test_samples_are_writable_and_do_not_touch_each_other(folder):
    first, second = FileReader(folder).read([1, 1])
    first[:] = 99
    assert second.tolist() == [1] * 11


def test_read_into_fills_the_callers_memory(folder):
    arena = np.full(64, 255, np.uint8)
    bounds = FileReader(folder).read_into([2, 0], arena)
    assert bounds.tolist() == [0, 12, 22]
    assert arena[:12].tolist() == [2] * 12
    assert arena[22:].tolist() == [255] * 42
    plain = bytearray(12)
    FileReader(folder).read_into([2], plain)
    assert plain == bytes([2]) * 12


def test_read_into_refuses_an_arena_that_is_too_small(folder):
    with pytest.raises(ShapeError, match="21 bytes, wanted at least 22"):
        FileReader(folder).read_into([2, 0], bytearray(21))
    with pytest.raises(DtypeError, match="read-only"):
        FileReader(folder).read_into([2, 0], bytes(64))


def test_sizes_come_from_the_index(folder):
    assert FileReader(folder).sizes([6, 0]).tolist() == [16, 10]


def test_pickle_opens_the_files_again(folder):
    copy = pickle.loads(pickle.dumps(FileReader(folder, check_data=False)))
    assert copy.check_data is False
    assert copy.read_one(6)[0] == 6


def test_a_forked_child_reads_after_its_parent_did(folder):
    reader = FileReader(folder)
    reader.read([0, 1, 2, 3, 4])
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.map(_first_bytes(reader), [[3, 4, 5, 6]]) == [[3, 4, 5, 6]]


class _first_bytes:
    def __init__(self, reader):
        self.reader = reader

    def __call__(self, indices):
        return [int(sample[0]) for sample in self.reader.read(indices)]


def test_close_is_repeatable_and_reading_then_refused(folder):
    reader = FileReader(folder)
    reader.close()
    reader.close()
    with pytest.raises(ClosedError, match="closed"):
        reader.read([0])


def test_closing_gives_descriptors_back(folder):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with FileReader(folder):
            pass
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_index_of_a_file_is_parsed_once_and_again_when_it_changes(folder, monkeypatch):
    parsed = []
    monkeypatch.setattr(
        "whalefall.record.reader.parse", lambda *a: parsed.append(a[0]) or _parse(*a)
    )
    from whalefall.record.layout import parse as _parse

    one, two = (FileReader(folder / "0.ffr") for _ in range(2))
    assert len(parsed) == 1
    assert one.get_offsets(0) is two.get_offsets(0)
    with FileWriter(folder / "0.ffr", 1) as writer:
        writer.write_one(b"new")
    assert FileReader(folder / "0.ffr").n == 1


def test_without_a_compiler_the_same_bytes_come(folder, monkeypatch):
    monkeypatch.setattr(source, "_read_batch", lambda: None)
    assert [int(s[0]) for s in FileReader(folder).read([6, 0])] == [6, 0]
    path = folder / "0.ffr"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(RuntimeError, match="sample 3"):
        FileReader(folder).read([3])


def test_urls_are_read_and_written():
    fs = fsspec.filesystem("memory")
    fs.mkdirs("/set", exist_ok=True)
    for part in range(2):
        with FileWriter(f"memory://set/{part}.ffr", 3) as writer:
            for i in range(3):
                writer.write_one(bytes([3 * part + i]) * 5)
    with FileReader("memory://set") as reader:
        assert [s.tolist() for s in reader.read([5, 0])] == [[5] * 5, [0] * 5]
    assert not [name for name in fs.ls("/set", detail=False) if name.endswith("tmp")]
    raw = bytearray(fs.cat_file("/set/0.ffr"))
    raw[-1] ^= 1
    fs.pipe_file("/set/0.ffr", bytes(raw))
    with pytest.raises(RuntimeError, match="sample 2"):
        FileReader("memory://set").read([2])
    with pytest.raises(MissingError):
        FileReader("memory://set/none.ffr")


def test_memory_is_used_again_only_when_nobody_holds_a_sample(tmp_path):
    samples = [bytes([i]) * 50_000 for i in range(8)]
    with FileWriter(tmp_path / "big.ffr", 8) as writer:
        for sample in samples:
            writer.write_one(sample)
    reader = FileReader(tmp_path / "big.ffr")
    kept = [reader.read([i, (i + 1) % 8, i])[1] for i in range(8)]
    for _ in range(20):
        reader.read([7, 6, 5])
    assert [k.tobytes() for k in kept] == samples[1:] + samples[:1]
    first = reader.read([0, 1, 2])
    where = {sample.ctypes.data for sample in first}
    del first
    # Blocks are taken in turn, and other tests left some: as many as are kept at most.
    again = [sample.ctypes.data for _ in range(300) for sample in reader.read([0, 1, 2])]
    assert where & set(again)
