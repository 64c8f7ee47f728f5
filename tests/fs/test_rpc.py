"""Strangers and nonsense at the door: refused, logged, and the server goes on."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
from collections.abc import Iterator

import pytest

from whalefall.comm import Channel
from whalefall.comm.tokens import prove_client
from whalefall.fs.core.effects import Refused, Unreachable
from whalefall.fs.core.messages import Code, Failed
from whalefall.fs.rpc import Call, Pool, Result, Server

TOKEN = b"0123456789abcdef"


@pytest.fixture
def server() -> Iterator[Server]:
    def handle(message, payload):  # type: ignore[no-untyped-def]
        if message.name == "refuse":
            raise Refused(Code.INVALID, "because")
        if message.name == "break":
            raise KeyError("oops")
        return Result(message.args), (payload,)

    started = Server(handle, TOKEN, "127.0.0.1", 0)
    started.start()
    yield started
    started.close()


def answers(server: Server) -> bool:
    pool = Pool(TOKEN)
    reply, data = pool.call((server.host, server.port), Call("echo", {"a": 1}), b"payload")
    pool.close()
    return reply == Result({"a": 1}) and bytes(data) == b"payload"


def test_errors_come_back_as_words(server: Server) -> None:
    pool = Pool(TOKEN)
    address = (server.host, server.port)
    assert pool.call(address, Call("refuse", {}))[0] == Failed(Code.INVALID, "because")
    broken, _ = pool.call(address, Call("break", {}))
    assert broken.code is Code.DISK and "KeyError" in broken.reason
    pool.close()
    assert answers(server)


def test_whoever_does_not_know_the_token_gets_nothing(server: Server) -> None:
    pool = Pool(b"another token, also long")
    with pytest.raises(Unreachable, match="token"):
        pool.call((server.host, server.port), Call("echo", {}))
    assert answers(server)


def test_frames_of_nonsense_close_the_connection_and_nothing_else(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    chance = random.Random(3)
    good = b"WFv1" + struct.pack("<IQ", 3, 0) + b"\x93\x01\x02"
    huge = b"WFv1" + struct.pack("<IQ", 1 << 31, 1 << 60)
    for turn in range(60):
        sock = socket.create_connection((server.host, server.port), timeout=5)
        channel = Channel(sock)
        if turn % 3:  # known, but talking nonsense
            prove_client(channel, TOKEN)
        noise = [huge, good, chance.randbytes(chance.randint(1, 200))][turn % 3]
        with contextlib.suppress(OSError):
            sock.sendall(noise)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(4096):
                pass
        channel.close()
    assert answers(server)
    assert any("closed the connection" in r.message for r in caplog.records)
