"""Data sets in several files: written in parallel, appended, failing workers."""

import os

import pytest

from whalefall.errors import ConfigError, MissingError
from whalefall.record import FileReader, append_shards, dump
from whalefall.record.shards import ShardError

SAMPLES = [bytes([i]) * (i + 1) for i in range(10)]


def contents(folder):
    with FileReader(folder) as reader:
        return [sample.tobytes() for sample in reader.read(range(reader.n))]


@pytest.mark.parametrize("nfiles", [2, 3, 5])
def test_shards_hold_the_samples_in_order(tmp_path, nfiles):
    counts = []
    names = dump(SAMPLES, tmp_path / "set", nfiles, workers=2, progress=counts.append)
    assert [n.name for n in names] == [f"PART_{i:05d}.ffr" for i in range(nfiles)]
    assert contents(tmp_path / "set") == SAMPLES
    assert counts[-1] == 10


def test_one_file_is_written_under_its_name(tmp_path):
    dump(SAMPLES, tmp_path / "a.ffr", 1)
    assert contents(tmp_path / "a.ffr") == SAMPLES


def test_too_few_samples_make_fewer_files_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="10 samples make 5 files, not 6"):
        dump(SAMPLES, tmp_path / "set", 6)
    assert contents(tmp_path / "set") == SAMPLES


def test_no_samples_make_one_empty_file(tmp_path):
    with pytest.warns(UserWarning, match="0 samples"):
        dump([], tmp_path / "set", 4)
    assert contents(tmp_path / "set") == []


def test_appended_shards_keep_old_indices(tmp_path):
    dump(SAMPLES, tmp_path / "set", 2)
    new = append_shards([b"eleven", b"twelve"], tmp_path / "set", 2)
    assert [n.name for n in new] == ["PART_00002.ffr", "PART_00003.ffr"]
    assert contents(tmp_path / "set") == [*SAMPLES, b"eleven", b"twelve"]


def test_a_second_dump_does_not_mix_with_an_old_one(tmp_path):
    dump(SAMPLES, tmp_path / "set", 5)
    with pytest.raises(ConfigError, match="append_shards"):
        dump(SAMPLES, tmp_path / "set", 2)
    (tmp_path / "set" / "other.ffr").write_bytes(b"")
    with pytest.raises(ConfigError, match="PART_"):
        append_shards(SAMPLES, tmp_path / "set")
    with pytest.raises(MissingError):
        append_shards(SAMPLES, tmp_path / "none")
    with pytest.raises(ConfigError, match="nfiles is 0"):
        dump(SAMPLES, tmp_path / "x", 0)


class Failing(list):
    def __getitem__(self, index):
        if index == 7:
            if self.hard:
                os._exit(9)
            raise ValueError("sample 7 is bad")
        return super().__getitem__(index)


@pytest.mark.parametrize(("hard", "why"), [(False, "sample 7 is bad"), (True, "status 9")])
def test_a_failed_worker_is_noticed(tmp_path, hard, why):
    data = Failing(SAMPLES)
    data.hard = hard
    with pytest.raises(ShardError, match=rf"PART_0000\d.ffr could not be written.*{why}"):
        dump(data, tmp_path / "set", 3, workers=2)
    for path in (tmp_path / "set").glob("*.ffr"):
        FileReader(path).validate()
