"""Everything wrong with a file, an argument or a writer gets an error of its own."""

import os
import signal
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest

from whalefall.errors import ConfigError, CorruptError, DtypeError, MissingError, WhalefallError
from whalefall.record import ChecksumError, FileReader, FileWriter, IndexRangeError
from whalefall.record.writer import CountError


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.ffr"
    with FileWriter(path, 3) as writer:
        for i in range(3):
            writer.write_one(bytes([i]) * 20)
    return path


def patched(path, at, new, renew_crc=False):
    """Overwrite bytes; where asked, make the header's checksum right again."""
    raw = bytearray(path.read_bytes())
    raw[at : at + len(new)] = new
    if renew_crc:
        raw[:4] = struct.pack("<I", zlib.crc32(raw[4:48]))
    path.write_bytes(raw)
    return path


def test_a_flipped_byte_names_file_sample_expected_and_found(file):
    expected, found = zlib.crc32(bytes([1]) * 20), zlib.crc32(bytes([1]) * 19 + bytes([0]))
    patched(file, 48 + 39, b"\0")
    with pytest.raises(ChecksumError) as error:
        FileReader(file).read([0, 1])
    for part in (str(file), "sample 1", f"{expected:08x}", f"{found:08x}"):
        assert part in str(error.value)
    with pytest.raises(ChecksumError):
        FileReader(file, check_data=False).validate_sample(1)
    assert FileReader(file, check_data=False).read_one(1)[-1] == 0
    assert FileReader(file).read_one(2)[0] == 2


@pytest.mark.parametrize("at", [4, 13, 30])
def test_a_damaged_header_is_refused(file, at):
    patched(file, at, b"\xee")
    with pytest.raises(CorruptError):
        FileReader(file)


def test_validate_reads_the_headers_again(file):
    reader = FileReader(file)
    reader.validate()
    patched(file, 13, b"\xee")
    with pytest.raises(ChecksumError, match="header"):
        reader.validate()


@pytest.mark.parametrize("size", [0, 5, 11])
def test_a_file_shorter_than_a_header_is_refused(file, size):
    os.truncate(file, size)
    with pytest.raises(CorruptError, match=f"has {size} bytes"):
        FileReader(file)


@pytest.mark.parametrize("size", [13, 47, 60, 80])
def test_a_cut_file_is_refused_when_opened(file, size):
    os.truncate(file, size)
    with pytest.raises(CorruptError):
        FileReader(file)


def test_a_file_cut_in_its_last_sample_fails_there_only(file):
    os.truncate(file, 48 + 59)
    reader = FileReader(file)
    reader.read([0, 1])
    with pytest.raises(ChecksumError, match="sample 2"):
        reader.read_one(2)


def test_a_file_cut_while_it_is_open_is_an_error(file):
    reader = FileReader(file)
    os.truncate(file, 60)
    with pytest.raises(CorruptError, match="truncated while it was open"):
        reader.read([0, 1, 2])


@pytest.mark.parametrize("count", [-1, 4, 2**62])
def test_a_wrong_number_of_samples_is_refused_before_memory_is_taken(file, count):
    patched(file, 4, struct.pack("<q", count), renew_crc=count == 4)
    with pytest.raises(CorruptError):
        FileReader(file)


def test_offsets_must_grow_and_begin_after_the_header(file):
    patched(file, 24 + 8, struct.pack("<q", 20), renew_crc=True)
    with pytest.raises(CorruptError, match="offset 1 is 20"):
        FileReader(file)
    patched(file, 24 + 8, struct.pack("<q", 68), renew_crc=True)
    FileReader(file)
    patched(file, 24, struct.pack("<q", 44), renew_crc=True)
    with pytest.raises(CorruptError, match="first offset is 44, wanted 48"):
        FileReader(file)


def test_a_header_of_zeros_is_a_torn_file(tmp_path):
    path = tmp_path / "a.ffr"
    path.write_bytes(bytes(100))
    with pytest.raises(CorruptError, match="stopped before close"):
        FileReader(path)


@pytest.mark.parametrize("index", [3, -1, -4, 10**12])
def test_an_index_outside_is_refused(file, index):
    with pytest.raises(IndexRangeError, match=rf"{index}.*0 … 2"):
        FileReader(file).read([0, index])


@pytest.mark.parametrize("indices", [[0.0], ["0"], [[0]], 0])
def test_indices_must_be_a_list_of_integers(file, indices):
    with pytest.raises(DtypeError):
        FileReader(file).read(indices)


def test_paths_that_are_no_data_set_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    for wrong in (tmp_path / "none.ffr", tmp_path / "none", tmp_path, []):
        with pytest.raises(MissingError):
            FileReader(wrong)
    with pytest.raises(ConfigError, match=r"does not end in \.ffr"):
        FileReader(tmp_path / "a.txt")
    with pytest.raises(DtypeError):
        FileReader(3)


@pytest.mark.parametrize("written", [0, 2])
def test_fewer_samples_than_announced_leave_no_file(tmp_path, written):
    writer = FileWriter(tmp_path / "a.ffr", 3)
    for _ in range(written):
        writer.write_one(b"x")
    with pytest.raises(CountError, match=f"{written} samples written, wanted 3"):
        writer.close()
    writer.close()
    assert os.listdir(tmp_path) == []


def test_a_sample_too_many_is_refused_and_the_file_still_good(tmp_path):
    with FileWriter(tmp_path / "a.ffr", 1) as writer:
        writer.write_one(b"x")
        with pytest.raises(CountError):
            writer.write_one(b"y")
    assert FileReader(tmp_path / "a.ffr").n == 1


def test_an_exception_in_the_body_is_kept_and_leaves_no_file(tmp_path):
    def body():
        with FileWriter(tmp_path / "a.ffr", 2) as writer:
            writer.write_one(b"x")
            raise KeyError

    with pytest.raises(KeyError):
        body()
    assert os.listdir(tmp_path) == []


def test_the_old_file_stays_until_the_new_one_is_whole(file):
    writer = FileWriter(file, 1)
    writer.write_one(b"new")
    assert FileReader(file).n == 3
    writer.close()
    assert FileReader(file).read_one(0).tobytes() == b"new"


@pytest.mark.parametrize("sample", ["text", 5, None, object(), np.array([object()])])
def test_a_sample_must_be_bytes(tmp_path, sample):
    with pytest.raises(TypeError):
        FileWriter(tmp_path / "a.ffr", 1).write_one(sample)


@pytest.mark.parametrize(
    "sample",
    [
        np.arange(10, dtype=np.float32),
        np.arange(12, dtype=np.uint8).reshape(3, 4)[:, ::2],
        np.zeros((2, 0), np.uint8),
        np.float64(1.5),
        memoryview(b"abcdef")[::2],
        bytearray(b""),
    ],
)
def test_all_bytes_of_an_array_are_written(tmp_path, sample):
    wanted = sample.tobytes() if hasattr(sample, "tobytes") else bytes(sample)
    with FileWriter(tmp_path / "a.ffr", 1) as writer:
        writer.write_one(sample)
    assert FileReader(tmp_path / "a.ffr").read_one(0).tobytes() == wanted


def test_writers_refuse_wrong_names_and_counts(tmp_path):
    with pytest.raises(ConfigError, match=r"\.ffr"):
        FileWriter(tmp_path / "a.bin", 1)
    with pytest.raises(ConfigError, match="n is -1"):
        FileWriter(tmp_path / "a.ffr", -1)
    for n, why in ((1.5, "n is 1.5"), ("3", "n is '3'"), (None, "n is None")):
        with pytest.raises(DtypeError, match=f"FileWriter: {why}, wanted a whole number"):
            FileWriter(tmp_path / "a.ffr", n)  # type: ignore[arg-type]
    with pytest.raises(MissingError, match="does not exist"):
        FileWriter(tmp_path / "none" / "a.ffr", 1)


KILLED = """
import os, signal, sys
from whalefall.record import FileWriter
writer = FileWriter(sys.argv[1], 50)
point = int(sys.argv[2])
for i in range(50):
    if i == point:
        writer._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    writer.write_one(bytes(100_000))
os.fsync = lambda number: os.kill(os.getpid(), signal.SIGKILL)
writer.close()
"""


@pytest.mark.parametrize("point", [0, 25, 50])
def test_a_killed_writer_leaves_nothing_that_opens(tmp_path, point):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "a.ffr"), str(point)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not list(tmp_path.glob("*.ffr"))
    with pytest.raises(WhalefallError):
        FileReader(tmp_path / "a.ffr")
