"""Small samples are copied out of the mapped file: the same bytes, and no crash when it is cut."""

import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from whalefall.errors import CorruptError
from whalefall.record import ChecksumError, FileReader, FileWriter
from whalefall.record.checksum import native

COUNT, SIZE = 64, 5000
needs_native = pytest.mark.skipif(native() is None, reason="no compiler")


def sample(i: int) -> bytes:
    return bytes([i]) * SIZE


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "small.ffr"
    with FileWriter(path, COUNT) as writer:
        for i in range(COUNT):
            writer.write_one(sample(i))
    return path


@needs_native
def test_a_checked_read_maps_the_file_and_gives_what_pread_gives(file):
    checked, plain = FileReader(file), FileReader(file, check_data=False)
    indices = [3, 0, COUNT - 1, 3]
    for got, other, i in zip(checked.read(indices), plain.read(indices), indices, strict=True):
        assert bytes(got) == bytes(other) == sample(i)
    assert len(checked._source._maps) == 1 and not plain._source._maps


@pytest.mark.parametrize("left", [4096 * 20, 4096 * 20 + 100, 0])
def test_a_sample_behind_a_cut_is_an_error_and_those_before_it_are_read(file, left):
    reader = FileReader(file)
    assert bytes(reader.read_one(COUNT - 1)) == sample(COUNT - 1)
    os.truncate(file, left)
    with pytest.raises(CorruptError, match="truncated while it was open"):
        reader.read([40, 41])
    with pytest.raises(CorruptError, match="truncated while it was open"):
        reader.read([left // SIZE])  # the cut goes through it
    if left:
        assert bytes(reader.read_one(0)) == sample(0)


def test_a_byte_that_turns_in_a_mapped_file_is_found(file):
    reader = FileReader(file)
    reader.read([5])
    offset = int(reader.get_offsets(0)[5]) + 77
    with open(file, "r+b") as raw:
        raw.seek(offset)
        raw.write(b"\xee")
    with pytest.raises(ChecksumError, match="sample 5"):
        reader.read([4, 5])


def test_samples_of_one_size_share_memory_that_is_not_used_again_while_they_live(file):
    reader = FileReader(file)
    kept = [(i, reader.read([i] * 40)) for i in range(20)]
    assert all(bytes(array) == sample(i) for i, arrays in kept for array in arrays)
    assert all(array.flags.writeable and array.dtype == np.uint8 for array in kept[0][1])


def test_closing_a_reader_under_another_threads_read_is_an_error_at_most(file):
    stop = threading.Event()
    strange = []

    def read(reader):
        try:
            while not stop.is_set():
                assert bytes(reader.read([1, 2, 3] * 10)[29]) == sample(3)
        except (OSError, RuntimeError, CorruptError, IndexError, ValueError) as error:
            if isinstance(error, ChecksumError):
                strange.append(error)

    for _ in range(20):
        reader = FileReader(file)
        thread = threading.Thread(target=read, args=(reader,))
        thread.start()
        reader.close()
        stop.set()
        thread.join()
        stop.clear()
    assert not strange


@needs_native
def test_a_bus_error_of_somebody_else_still_ends_the_process(file):
    code = f"""
import ctypes, os, signal
from whalefall.record import FileReader
FileReader({str(file)!r}).read([1])
os.kill(os.getpid(), signal.SIGBUS)  # handled once by ours, which steps aside
os.kill(os.getpid(), signal.SIGBUS)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -signal.SIGBUS
