"""comm: frames arrive whole or not at all; sizes are checked first; strangers are turned away."""

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import whalefall.comm
from whalefall import comm
from whalefall.errors import ConfigError, LimitError

TOKEN = comm.new_token()


class Hello(msgspec.Struct):
    name: str
    count: int


def test_names_are_pinned() -> None:
    names = """
        MAX_HEADER_BYTES MAX_PAYLOAD_BYTES AuthError Channel CommError FrameProtocol Limits Region
        Ring accept connect crc32 crc32c crc32c_blocks crc_combine decode encode gather_rows
        listen new_token read_token scatter_rows sweep
    """
    assert set(whalefall.comm.__all__) == set(names.split())


@pytest.fixture
def pair() -> Iterator[tuple[comm.Channel, comm.Channel]]:
    a, b = socket.socketpair()
    with comm.Channel(a) as left, comm.Channel(b) as right:
        yield left, right


def test_a_frame_of_many_pieces_arrives_in_the_callers_buffer(
    pair: tuple[comm.Channel, comm.Channel],
) -> None:
    pieces = [np.full(n, n % 251, np.uint8) for n in range(0, 3000, 2)]  # more than one sendmsg
    target = bytearray(sum(p.nbytes for p in pieces))
    with ThreadPoolExecutor() as pool:
        sending = pool.submit(pair[0].send, Hello("x", 3), *pieces)
        header, payload = pair[1].recv(Hello, into=lambda h, n: target)
        sending.result()
    assert header == Hello("x", 3)
    assert payload.obj is target
    assert bytes(target) == b"".join(p.tobytes() for p in pieces)
    assert pair[0].bytes_sent == pair[1].bytes_received


def test_sizes_are_refused_before_memory_is_taken(pair: tuple[comm.Channel, comm.Channel]) -> None:
    pair[0].send_raw(struct.pack("<4sIQ", b"WFv1", 10, 1 << 60))
    with pytest.raises(LimitError, match="payload of 1152921504606846976 bytes"):
        pair[1].recv(dict)
    pair[1].send_raw(struct.pack("<4sIQ", b"WFv1", (1 << 32) - 1, 0))
    with pytest.raises(LimitError, match="header of 4294967295 bytes"):
        pair[0].recv(dict)


def test_nonsense_is_refused(pair: tuple[comm.Channel, comm.Channel]) -> None:
    pair[0].send_raw(b"GET / HTTP/1.1\r\n")
    with pytest.raises(comm.CommError, match="wrong port"):
        pair[1].recv(dict)
    pair[0].send({"name": 3})
    with pytest.raises(comm.CommError, match="a header that is no"):
        pair[1].recv(Hello)
    pair[0].send_raw(comm.encode(Hello("x", 1), 100), b"only this")
    pair[0].close()
    with pytest.raises(comm.CommError, match="91 bytes too early"):
        pair[1].recv(Hello)


def test_a_payload_that_does_not_fit_the_buffer_is_refused(
    pair: tuple[comm.Channel, comm.Channel],
) -> None:
    pair[0].send(Hello("x", 1), b"12345")
    with pytest.raises(comm.CommError, match="5 bytes for a buffer of 4"):
        pair[1].recv(Hello, into=lambda h, n: bytearray(4))


def test_both_sides_must_know_the_token() -> None:
    with comm.listen() as listener, ThreadPoolExecutor() as pool:
        port = listener.getsockname()[1]
        accepted = pool.submit(comm.accept, listener, TOKEN)
        with comm.connect("127.0.0.1", port, TOKEN) as client, accepted.result() as server:
            client.send(Hello("x", 1))
            assert server.recv(Hello)[0].count == 1
        accepted = pool.submit(comm.accept, listener, TOKEN)
        with pytest.raises(comm.AuthError, match="refused our token"):
            comm.connect("127.0.0.1", port, comm.new_token())
        with pytest.raises(comm.AuthError, match="turned away"):
            accepted.result()


def test_a_server_that_only_pretends_is_found_out() -> None:
    def pretend(listener: socket.socket) -> None:
        sock, _ = listener.accept()
        with sock:
            sock.sendall(b"WFauth1\0" + bytes(32))
            sock.recv(64, socket.MSG_WAITALL)
            sock.sendall(bytes(32))

    with comm.listen() as listener:
        thread = threading.Thread(target=pretend, args=(listener,))
        thread.start()
        with pytest.raises(comm.AuthError, match="does not know our token"):
            comm.connect("127.0.0.1", listener.getsockname()[1], TOKEN)
        thread.join()


def test_a_server_that_goes_during_the_proof_has_refused_nobody() -> None:
    def leave(listener: socket.socket) -> None:
        with listener.accept()[0] as sock:
            sock.sendall(b"WFauth1\0" + bytes(32))
            sock.recv(64, socket.MSG_WAITALL)

    with comm.listen() as listener, ThreadPoolExecutor() as pool:
        left = pool.submit(leave, listener)
        with pytest.raises(comm.CommError, match="closed before it answered our proof"):
            comm.connect("127.0.0.1", listener.getsockname()[1], TOKEN)
        left.result()


def test_the_asyncio_side_says_that_it_refuses_a_token() -> None:
    def talk(port: int) -> None:
        with pytest.raises(comm.AuthError, match="refused our token"):
            comm.connect("127.0.0.1", port, comm.new_token())

    async def body(port: int, servers: list[Echo]) -> None:
        await asyncio.to_thread(talk, port)
        _, client = await asyncio.get_running_loop().create_connection(
            lambda: Echo(comm.new_token(), False), "127.0.0.1", port
        )
        with pytest.raises(comm.AuthError, match="refused our token"):
            await client.ready

    asyncio.run(served(body))


def test_the_token_file_is_private(tmp_path: Path) -> None:
    path = tmp_path / "token"
    token = comm.read_token(path, create=True)
    assert comm.read_token(path, create=True) == token
    assert [p.name for p in tmp_path.iterdir()] == ["token"]
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        comm.read_token(path)
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(ConfigError, match="5 bytes"):
        comm.read_token(path)


class Echo(comm.FrameProtocol):
    """Answers each frame; as a client, keeps what came."""

    def __init__(self, token: bytes, server: bool, **more: Any) -> None:
        super().__init__(token, server, **more)
        self.got: asyncio.Queue[tuple[Hello, bytes]] = asyncio.Queue()
        self.ended: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()

    def frame_received(self, header: bytes, payload: bytes) -> None:
        hello = comm.decode(header, Hello)
        if self.server:
            self.send(Hello(hello.name, hello.count + 1), payload, payload)
        else:
            self.got.put_nowait((hello, payload))

    def closed(self, error: Exception | None) -> None:
        self.ended.set_result(error)


async def served(
    body: Callable[[int, list[Echo]], Any], limits: comm.Limits = comm.Limits()
) -> None:
    servers: list[Echo] = []

    def make() -> Echo:
        servers.append(Echo(TOKEN, True, limits=limits))
        return servers[-1]

    loop = asyncio.get_running_loop()
    server = await loop.create_server(make, "127.0.0.1", 0)
    async with asyncio.timeout(20):
        await body(server.sockets[0].getsockname()[1], servers)
    server.close()


def test_control_frames_go_both_ways_over_asyncio() -> None:
    async def body(port: int, servers: list[Echo]) -> None:
        loop = asyncio.get_running_loop()
        _, client = await loop.create_connection(lambda: Echo(TOKEN, False), "127.0.0.1", port)
        await client.ready
        for i in range(50):
            client.send(Hello("x", i), bytes(i))
            await client.drained()
        for i in range(50):
            assert await client.got.get() == (Hello("x", i + 1), bytes(2 * i))
        client.close()
        assert await servers[0].ended is None

    asyncio.run(served(body))


def test_a_blocking_channel_talks_to_the_asyncio_side() -> None:
    def talk(port: int) -> Hello:
        with comm.connect("127.0.0.1", port, TOKEN) as channel:
            channel.send(Hello("y", 1), b"ab")
            header, payload = channel.recv(Hello)
            assert bytes(payload) == b"abab"
            return header

    async def body(port: int, servers: list[Echo]) -> None:
        assert await asyncio.to_thread(talk, port) == Hello("y", 2)

    asyncio.run(served(body))


@pytest.mark.parametrize(
    ("token", "first", "error"),
    [
        (comm.new_token(), b"", comm.AuthError),
        (TOKEN, comm.encode(Hello("x", 1), 5), comm.CommError),  # ends inside a frame
        (TOKEN, comm.encode(Hello("x", 1), 1 << 20), LimitError),
        (TOKEN, comm.encode({"no": 1}), comm.CommError),
    ],
    ids=["stranger", "early end", "above the limit", "other header"],
)
def test_the_asyncio_side_closes_on_strangers_and_nonsense(
    token: bytes, first: bytes, error: type[Exception]
) -> None:
    def talk(port: int) -> None:
        try:
            with comm.connect("127.0.0.1", port, token) as channel:
                channel.send_raw(first)
                channel.socket.shutdown(socket.SHUT_WR)
                assert channel.socket.recv(1) == b""
        except (comm.AuthError, ConnectionError):
            pass

    async def body(port: int, servers: list[Echo]) -> None:
        await asyncio.to_thread(talk, port)
        assert isinstance(await servers[0].ended, error)

    asyncio.run(served(body, comm.Limits(payload_bytes=1000)))
