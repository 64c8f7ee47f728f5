"""Nonsense from somebody who knows the token: real servers refuse or hang up, and go on serving."""

from __future__ import annotations

import contextlib
import os
import random
import socket

import msgspec
import pytest

from whalefall.comm import CommError, connect
from whalefall.comm.frames import PREFIX
from whalefall.fs import LocalCluster
from whalefall.fs.core.messages import Failed, Query, Read, ReadDone
from whalefall.fs.rpc import Call, Result, receive
from whalefall.fs.tokens import find_token

TRIES = 60
NUMBERS = [0, 1, -1, 7, 101, 2**31, 2**63 - 1, -(2**63)]


def nonsense(chance: random.Random) -> bytes:
    """A message with wild values, and in two of three a few bytes of it changed."""
    number = lambda: chance.choice(NUMBERS)  # noqa: E731
    chunk = chance.randbytes(chance.choice([0, 3, 16, 16, 4000]))
    message = chance.choice([
        Read(number(), number(), [(chunk, number(), number())] * chance.choice([0, 1, 3, 1000])),
        Read(101, 1, [(chunk, number(), number())], True, True),
        Query(number(), number(), chunk),
        Call(chance.choice(["", "stat", "many", "chunks", "x" * 5000]), {"who": number()}),
        Call("stat", {"who": ["c", 1, 0, 0, []], "args": {"path": number()}}),
        Call("many", {"who": ["c", 1, 0, 0, []], "calls": [("list", {"path": "/", "limit": -5})]}),
    ])  # fmt: skip
    body = bytearray(msgspec.msgpack.encode(message))
    if chance.random() < 0.66:
        for _ in range(chance.randint(1, 4)):
            body[chance.randrange(2, len(body))] = chance.randrange(256)
    declared = len(body) + chance.choice([0, 0, 0, 0, -1, 3])
    return PREFIX.pack(b"WFv1", declared, chance.choice([0, 0, 0, 5, 1 << 40])) + bytes(body)


@pytest.mark.parametrize("kind", ["storage", "meta", "manager"])
def test_wild_messages_are_refused_and_the_server_goes_on(cluster: LocalCluster, kind: str) -> None:
    fs = cluster.filesystem()
    data = os.urandom(100_000)
    fs.pipe_file(f"/fuzz-{kind}", data)
    connection = fs.client.connection
    places = [
        (i.host, i.port) for i in connection.core.routing.nodes.values() if i.kind == kind
    ] or connection.managers
    token = find_token(*connection.managers[0], None)
    chance, outcomes = random.Random(11), set()
    for _ in range(TRIES):
        channel = connect(*places[0], token, timeout_s=10)
        channel.settimeout(20.0)
        with contextlib.suppress(OSError):
            channel.send_raw(nonsense(chance))
            channel.socket.shutdown(socket.SHUT_WR)  # there is no rest to wait for
        try:
            reply, _ = receive(channel)
            assert isinstance(reply, (Failed, Result, ReadDone)) or kind == "manager", reply
            outcomes.add("answered")
        except (CommError, ConnectionError):
            outcomes.add("hung up")
        channel.close()
    assert {"answered", "hung up"} <= outcomes
    assert fs.cat_file(f"/fuzz-{kind}") == data
    assert cluster.filesystem().client.stat(f"/fuzz-{kind}").length == len(data)
