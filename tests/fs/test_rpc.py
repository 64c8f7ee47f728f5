"""Strangers and nonsense at the door: refused, logged, and the server goes on."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from whalefall.comm import Channel, channel
from whalefall.comm.tokens import prove_client
from whalefall.fs import rpc
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


def test_accepting_goes_on_after_a_failure(server: Server) -> None:
    class Exhausted:
        """A listener that fails twice, then is closed."""

        def __init__(self) -> None:
            self.codes = [errno.EBADF, errno.ECONNABORTED, errno.EMFILE]

        def accept(self) -> None:
            code = self.codes.pop()
            raise OSError(code, os.strerror(code))

    listener = Exhausted()
    server._accept(listener)  # type: ignore[arg-type]
    assert listener.codes == []


FLOODED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
from whalefall.fs.rpc import Result, Server
server = Server(lambda m, p: (Result(m.args), (p,)), b"0123456789abcdef", "127.0.0.1", 0)
server.start()
print(server.port, flush=True)
sys.stdin.read()
"""


def test_a_flood_of_silent_strangers_does_not_keep_others_out() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", FLOODED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    port = int(child.stdout.readline())
    flood = [socket.create_connection(("127.0.0.1", port), timeout=5) for _ in range(100)]
    pool, end_s = Pool(TOKEN), time.monotonic() + 30
    while True:
        try:
            reply, _ = pool.call(("127.0.0.1", port), Call("echo", {"a": 1}), timeout_s=10)
            break
        except Unreachable:
            assert time.monotonic() < end_s
    assert reply == Result({"a": 1})
    pool.close()
    for sock in flood:
        sock.close()
    child.communicate("", timeout=10)


def test_the_oldest_stranger_goes_when_there_are_too_many(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "MAX_STRANGERS", 3)
    address = (server.host, server.port)
    pool = Pool(TOKEN)
    assert isinstance(pool.call(address, Call("echo", {}))[0], Result)
    strangers = [socket.create_connection(address, timeout=5) for _ in range(4)]
    greeting = 40
    assert len(strangers[0].recv(greeting)) == greeting and strangers[0].recv(1) == b""
    assert len(strangers[3].recv(greeting)) == greeting
    strangers[3].settimeout(0.2)
    with pytest.raises(TimeoutError):
        strangers[3].recv(1)
    channels = list(server._channels)
    assert isinstance(pool.call(address, Call("echo", {}))[0], Result)
    assert set(server._channels) <= set(channels)  # it was the same connection
    pool.close()
    for sock in strangers:
        sock.close()


def test_a_local_socket_of_another_user_is_not_spoken_to(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = (server.host, server.port)
    unix, tcp = socket.AF_UNIX, socket.AF_INET
    for owner, family in ((os.geteuid(), unix), (0, unix), (os.geteuid() + 1, tcp)):
        monkeypatch.setattr(channel, "_owner", lambda sock, owner=owner: owner)
        pool = Pool(TOKEN)
        assert isinstance(pool.call(address, Call("echo", {}))[0], Result)
        (kept,) = pool._idle[address]
        assert kept.socket.family == family
        pool.close()
    monkeypatch.undo()
    near, far = socket.socketpair(socket.AF_UNIX)
    assert channel._owner(near) == os.geteuid()
    near.close()
    far.close()


def test_a_local_name_that_is_taken_costs_the_local_way_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    listener = channel.listen()
    port = listener.getsockname()[1]
    listener.close()
    squatter = channel.listen_local("127.0.0.1", port)  # never answers
    server = Server(lambda m, p: (Result(m.args), (p,)), TOKEN, "127.0.0.1", port)
    assert "TCP only" in caplog.text
    server.start()
    pool, began_s = Pool(TOKEN), time.monotonic()
    reply, _ = pool.call((server.host, port), Call("echo", {"a": 1}), timeout_s=1.0)
    assert reply == Result({"a": 1}) and time.monotonic() - began_s < 5
    pool.close()
    server.close()
    squatter.close()
