"""comm: checksums and row copies agree with zlib, published values and numpy."""

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whalefall import comm
from whalefall.comm.library import library, span
from whalefall.errors import ConfigError, DtypeError, LimitError, ShapeError

LENGTHS = (0, 1, 7, 8, 9, 15, 16, 63, 64, 127, 128, 129, 143, 144, 191, 192, 1000, 65537)


def bitwise_crc32c(data: bytes) -> int:
    c = 0xFFFFFFFF
    for byte in data:
        c ^= byte
        for _ in range(8):
            c = (c >> 1) ^ (0x82F63B78 if c & 1 else 0)
    return c ^ 0xFFFFFFFF


@pytest.mark.parametrize("length", LENGTHS)
def test_crc32_is_zlibs_at_every_length_and_alignment(length: int) -> None:
    data = np.random.default_rng(length).bytes(length + 1)
    for piece in (data[:-1], memoryview(data)[1:]):
        assert comm.crc32(piece) == zlib.crc32(piece)
        assert comm.crc32(piece, 12345) == zlib.crc32(piece, 12345)


@pytest.mark.parametrize("length", [n for n in LENGTHS if n < 2000])
def test_crc32c_is_the_bitwise_definition_with_and_without_special_instructions(
    length: int,
) -> None:
    data = np.random.default_rng(length).bytes(length)
    start, count = span(data)
    for table_only in (0, 1):
        assert library().wf_crc32c(0, start, count, table_only) == bitwise_crc32c(data)


def test_crc32c_of_the_published_examples() -> None:
    # RFC 3720, appendix B.4
    assert comm.crc32c(b"123456789") == 0xE3069283
    assert comm.crc32c(bytes(32)) == 0x8A9136AA
    assert comm.crc32c(b"\xff" * 32) == 0x62A8AB43
    assert comm.crc32c(bytes(range(32))) == 0x46DD794E


@given(st.binary(max_size=600), st.integers(0, 600))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_crcs_continue_and_combine(data: bytes, cut: int) -> None:
    a, b = data[:cut], data[cut:]
    assert comm.crc32c(b, comm.crc32c(a)) == comm.crc32c(data)
    assert comm.crc_combine(comm.crc32c(a), comm.crc32c(b), len(b)) == comm.crc32c(data)
    assert comm.crc_combine(zlib.crc32(a), zlib.crc32(b), len(b), False) == zlib.crc32(data)


def test_blocks_have_each_its_own_crc() -> None:
    data = np.random.default_rng(0).bytes(1000)
    wanted = [comm.crc32c(data[i : i + 300]) for i in range(0, 1000, 300)]
    assert comm.crc32c_blocks(data, 300).tolist() == wanted
    assert comm.crc32c_blocks(b"", 300).tolist() == []
    with pytest.raises(ConfigError, match="block_bytes is 0"):
        comm.crc32c_blocks(data, 0)


def test_any_buffer_is_taken_but_a_strided_one() -> None:
    data = np.arange(64, dtype=np.float32)
    assert comm.crc32c(data) == comm.crc32c(data.tobytes()) == comm.crc32c(bytearray(data))
    with pytest.raises(DtypeError, match="contiguous"):
        comm.crc32c(data[::2])


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("width", [1, 7, 512])
def test_gather_and_scatter_are_numpys_indexing(rows: int, width: int) -> None:
    rng = np.random.default_rng(rows)
    source = rng.standard_normal((6, width + 3)).astype(np.float32)[:, :width]  # rows with gaps
    index = rng.integers(0, 6, rows)
    assert np.array_equal(comm.gather_rows(source, index), source[index])
    out, wanted = np.zeros((6, width), np.float32), np.zeros((6, width), np.float32)
    order = rng.permutation(6)[:rows]
    wanted[order] = source[:rows]
    assert np.array_equal(comm.scatter_rows(source[:rows], order, out), wanted)


def test_bad_rows_are_refused_before_anything_is_written() -> None:
    source, out = np.ones((4, 2), np.float32), np.zeros((3, 2), np.float32)
    with pytest.raises(LimitError, match=r"index\[1\] is 3, wanted 0 … 2"):
        comm.scatter_rows(source[:2], np.array([0, 3]), out)
    assert not out.any()
    with pytest.raises(LimitError, match=r"index\[0\] is -1"):
        comm.gather_rows(source, np.array([-1]))
    with pytest.raises(ShapeError, match="wanted 1 as the index"):
        comm.gather_rows(source, np.array([0]), out)
    with pytest.raises(DtypeError, match="out is float64"):
        comm.gather_rows(source, np.array([0]), np.zeros((1, 2)))
    with pytest.raises(DtypeError, match="wanted int64"):
        comm.gather_rows(source, np.array([0], np.int32))
    with pytest.raises(ShapeError, match="rows must be contiguous"):
        comm.gather_rows(np.ones((2, 4), np.float32)[:, ::2], np.array([0]))
