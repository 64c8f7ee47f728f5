"""The bytes of a file, against the published layout written down here by hand."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whalefall.record import FileReader, FileWriter


def by_hand(samples: list[bytes]) -> bytes:
    """A file's bytes by struct and zlib alone."""
    offsets, at = [], 12 + 12 * len(samples)
    for sample in samples:
        offsets.append(at)
        at += len(sample)
    n = len(samples)
    body = struct.pack(f"<q{n}I{n}q", n, *map(zlib.crc32, samples), *offsets)
    return struct.pack("<I", zlib.crc32(body)) + body + b"".join(samples)


def write(path: Path, samples: list[bytes]) -> Path:
    with FileWriter(path, len(samples)) as writer:
        for sample in samples:
            writer.write_one(sample)
    return path


def test_an_empty_file_is_the_published_twelve_bytes(tmp_path):
    assert write(tmp_path / "a.ffr", []).read_bytes() == bytes.fromhex("69df2265" + "00" * 8)


@settings(max_examples=60, deadline=None)
@given(samples=st.lists(st.binary(max_size=700), max_size=9))
def test_written_bytes_are_the_layouts(tmp_path_factory, samples):
    folder = tmp_path_factory.mktemp("format")
    assert write(folder / "a.ffr", samples).read_bytes() == by_hand(samples)


@settings(max_examples=40, deadline=None)
@given(samples=st.lists(st.binary(max_size=700), min_size=1, max_size=9), data=st.data())
def test_files_written_by_hand_are_read_in_request_order(tmp_path_factory, samples, data):
    path = tmp_path_factory.mktemp("format") / "a.ffr"
    path.write_bytes(by_hand(samples))
    indices = data.draw(st.lists(st.integers(0, len(samples) - 1), max_size=20))
    with FileReader(path) as reader:
        got = [sample.tobytes() for sample in reader.read(indices)]
    assert got == [samples[i] for i in indices]


def test_a_large_sample_is_read_in_parts_and_checked(tmp_path):
    sample = np.random.default_rng(0).bytes((5 << 17) + 13)
    with FileReader(write(tmp_path / "a.ffr", [b"x", sample])) as reader:
        assert reader.read_one(1).tobytes() == sample


def test_old_files_without_header_checksum_open_with_a_warning(tmp_path):
    path = tmp_path / "a.ffr"
    path.write_bytes(bytes(4) + by_hand([b"abc", b"de"])[4:])
    with pytest.warns(UserWarning, match="old file"):
        reader = FileReader(path)
    assert reader.read_one(1).tobytes() == b"de"


def test_offsets_and_checksums_are_those_of_the_file(tmp_path):
    samples = [b"abc", b"", b"de"]
    with FileReader(write(tmp_path / "a.ffr", samples)) as reader:
        assert reader.get_offsets(0).tolist() == [48, 51, 51, 53]
        assert reader.get_checksums(0).tolist() == [zlib.crc32(s) for s in samples]
        assert reader.get_offsets(0).dtype == np.int64
        assert reader.get_checksums(0).dtype == np.uint32
