"""Batched reads in native code: the right bytes, each checked, whatever is kept from before."""

from __future__ import annotations

import array
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from whalefall.fs import LocalCluster
from whalefall.fs.client.filesystem import FileSystemClient, Range
from whalefall.fs.core.layout import chunk_id
from whalefall.fs.core.messages import Code, Failed, Read, ReadDone
from whalefall.fs.storage import native_io

SIZE = 3 * native_io.BLOCK_BYTES + 10_000  # the last block ends in the middle of a 4 KiB unit


class Chunk:
    """A content in a file, and how it is read."""

    def __init__(self, path: Path, data: bytes, place: int = 0) -> None:
        self.place, self.size = place, len(data)
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT)
        self.crcs, _ = native_io.write(self.fd, False, place, data)

    def read(self, *pieces: tuple[int, int]) -> tuple[list[int], bytes]:
        content = native_io.content(self.fd, self.place, self.size, self.crcs)
        plan = array.array("q", [number for piece in pieces for number in piece])
        out = bytearray(sum(plan[1::2]))
        address, _ = native_io.address(out)
        return native_io.read_batch([content] * len(pieces), plan, address), bytes(out)

    def flip(self, offset: int) -> None:
        byte = os.pread(self.fd, 1, self.place + offset)
        os.pwrite(self.fd, bytes([byte[0] ^ 1]), self.place + offset)


@pytest.fixture
def data() -> bytes:
    return random.Random(5).randbytes(SIZE)


@pytest.fixture
def chunk(tmp_path: Path, data: bytes) -> Iterator[Chunk]:
    made = Chunk(tmp_path / "slots", data, place=native_io.BLOCK_BYTES * 7)
    yield made
    os.close(made.fd)


def test_any_pieces_are_the_bytes_the_first_time_and_later(chunk: Chunk, data: bytes) -> None:
    chance = random.Random(1)
    edges = [(0, 1), (SIZE - 1, 1), (4095, 2), (65535, 2), (0, SIZE), (SIZE - 10_000, 9000)]
    for _ in range(40):
        pieces = edges + [
            (start, chance.randint(1, min(chance.choice([9, 4096, 70_000]), SIZE - start)))
            for start in (chance.randrange(SIZE) for _ in range(20))
        ]
        status, found = chunk.read(*pieces)
        assert not any(status)
        assert found == b"".join(data[start : start + length] for start, length in pieces)


def test_a_byte_that_turns_after_its_block_was_read_is_found(chunk: Chunk, data: bytes) -> None:
    for offset in (0, 4096 * 5 + 17, SIZE - 1):
        at = offset // 4096 * 4096
        piece = (at, min(4096, SIZE - at))
        assert chunk.read(piece)[0] == chunk.read(piece)[0] == [0]
        chunk.flip(offset)
        assert chunk.read(piece)[0] == [native_io.CORRUPT]
        chunk.flip(offset)
        assert chunk.read(piece) == ([0], data[at : at + piece[1]])


def test_one_bad_piece_leaves_the_others_of_its_batch(chunk: Chunk, data: bytes) -> None:
    chunk.flip(70_000)
    status, found = chunk.read((0, 100), (69_990, 20), (140_000, 50))
    assert status == [0, native_io.CORRUPT, 0]
    assert found[:100] == data[:100] and found[-50:] == data[140_000:140_050]


def test_what_is_kept_of_a_block_vouches_for_no_other_content(tmp_path: Path, data: bytes) -> None:
    """A lost write: the slot still has the content before, whose units' checksums are kept."""
    before = Chunk(tmp_path / "slots", data)
    assert before.read((4096, 4096))[0] == [0]
    after = Chunk(tmp_path / "slots", data[::-1])
    os.pwrite(after.fd, data, 0)
    before.crcs = after.crcs
    assert before.read((4096, 4096))[0] == [native_io.CORRUPT]
    os.close(before.fd)
    os.close(after.fd)


def test_a_file_cut_short_is_no_content(chunk: Chunk) -> None:
    assert chunk.read((0, 4096))[0] == [0]
    os.ftruncate(chunk.fd, chunk.place + 2048)
    assert chunk.read((0, 4096), (SIZE - 5, 5))[0] == [native_io.CORRUPT] * 2


# ---- through a cluster


def test_small_reads_of_many_chains_share_a_connection_and_fill_each_its_buffer(
    cluster: LocalCluster,
) -> None:
    client: FileSystemClient = cluster.filesystem().client
    data = os.urandom(3 << 20)
    cluster.filesystem().pipe_file("/small-reads", data)
    inode = client.stat("/small-reads")
    offsets = [random.Random(2).randrange(len(data) - 5000) for _ in range(200)]
    buffers = [bytearray(5000) for _ in offsets]
    client.read_ranges(
        [Range(inode, offset, 5000, into) for offset, into in zip(offsets, buffers, strict=True)]
    )
    assert all(data[o : o + 5000] == b for o, b in zip(offsets, buffers, strict=True))


def test_impossible_reads_are_refused_in_words(cluster: LocalCluster) -> None:
    connection = cluster.filesystem().client.connection
    data = os.urandom(1 << 20)
    cluster.filesystem().pipe_file("/impossible", data)
    inode = cluster.filesystem().client.stat("/impossible")
    chunk = chunk_id(inode.id, 0)
    chain = connection.core.routing.chains[inode.layout.chains[0]]  # type: ignore[union-attr]
    member = chain.serving()[-1]
    info = connection.core.routing.nodes[member.node]
    for ios, word in (([(chunk, -5, 10)], "negative"), ([(chunk, 0, 1 << 20)] * 600, "at most")):
        reply, _ = connection.pool.call(
            (info.host, info.port), Read(member.target, chain.version, ios)
        )
        assert isinstance(reply, Failed) and reply.code is Code.INVALID and word in reply.reason
    reply, found = connection.pool.call(
        (info.host, info.port), Read(member.target, chain.version, [(chunk, 9, 1)])
    )
    assert isinstance(reply, ReadDone) and bytes(found) == data[9:10]
