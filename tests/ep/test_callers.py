"""ep: strangers on a port, and ranks that go while all connect, end or hold up nothing."""

import contextlib
import socket
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from whalefall import comm, launch
from whalefall.ep import TcpGroup
from whalefall.ep.callers import Caller
from whalefall.errors import RankFailure

TOKEN = comm.new_token()


def raw(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port))


def closes(port: int) -> None:
    raw(port).close()


def resets(port: int) -> None:
    sock = raw(port)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def asks_for_a_page(port: int) -> socket.socket:
    sock = raw(port)
    sock.sendall(b"GET / HTTP/1.0\r\n\r\n" * 10)
    return sock


def proves_itself_and_goes(port: int) -> None:
    comm.connect("127.0.0.1", port, TOKEN).close()


def is_no_rank(port: int) -> comm.Channel:
    channel = comm.connect("127.0.0.1", port, TOKEN)
    channel.send(Caller(7))
    return channel


STRANGERS = [closes, resets, asks_for_a_page, raw, proves_itself_and_goes, is_no_rank]


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def rank_0(pool: ThreadPoolExecutor, port: int, size: int, timeout_s: float = 5.0):
    made = pool.submit(TcpGroup, "127.0.0.1", port, 0, size, TOKEN, timeout_s)
    while not made.done():
        try:
            raw(port).close()  # it listens
            return made
        except ConnectionRefusedError:
            pass
    return made


@pytest.mark.parametrize("stranger", STRANGERS, ids=lambda f: f.__name__)
def test_a_stranger_does_not_keep_the_ranks_from_meeting(port, stranger: Callable) -> None:
    with ThreadPoolExecutor() as pool:
        made = rank_0(pool, port, 2)
        kept = stranger(port)
        with (
            kept or contextlib.nullcontext(),
            contextlib.closing(TcpGroup("127.0.0.1", port, 1, 2, TOKEN, 5.0)) as other,
            contextlib.closing(made.result()) as first,
        ):
            gathered = pool.submit(first.all_gather, b"a")
            assert other.all_gather(b"b") == gathered.result() == [b"a", b"b"]


def test_a_caller_with_a_wrong_number_is_told_of_when_time_is_up(port) -> None:
    with ThreadPoolExecutor() as pool:
        made = rank_0(pool, port, 2, 0.5)
        with is_no_rank(port):
            with pytest.raises(RankFailure, match=r"ranks \[1\] did not .*rank 7 came unc") as late:
                made.result()
        assert late.value.rank == 1


def test_a_rank_that_goes_before_the_ranks_gather_is_named_to_all(port) -> None:
    with ThreadPoolExecutor() as pool:
        made = rank_0(pool, port, 3)
        gone, other = (TcpGroup("127.0.0.1", port, r, 3, TOKEN, 5.0) for r in (1, 2))
        gone.close()
        with contextlib.closing(made.result()) as first, contextlib.closing(other):
            for call in [pool.submit(group.all_gather, b"") for group in (first, other)]:
                with pytest.raises(RankFailure, match="rank 1 is gone") as named:
                    call.result()
                assert named.value.rank == 1


def others(start, tmp_path, way: str) -> list[list]:
    """What ranks 0, 2 and 3 say, two a host, when rank 1 does something while all connect."""
    tasks = start("while_all_connect", 4, module="connect_children", folder=str(tmp_path), way=way)
    said = []
    with launch.Group(tasks) as group:
        for member in (group.members[f"rank {r}"] for r in (0, 2, 3)):
            member.process.wait(timeout=100)
            assert member.exit().code == 0, str(member.exit())
            said.append(member.value())
    return said


@pytest.mark.ranks
@pytest.mark.parametrize("way", ["dies at once", "dies after it was called"])
def test_a_rank_that_dies_while_all_connect_is_named(start, tmp_path, way: str) -> None:
    for rank, (kind, lost, words) in zip((0, 2, 3), others(start, tmp_path, way), strict=True):
        assert "within" not in words  # at once
        # rank 2 has nothing to do with rank 1, and gloo does not tell
        assert (kind, lost) in [("RankFailure", 1), ("RankFailure", None)][: 1 + (rank == 2)]


@pytest.mark.ranks
def test_a_rank_that_hangs_while_all_connect_is_named_in_time(start, tmp_path) -> None:
    kind, lost, words = others(start, tmp_path, "hangs")[2]
    assert (kind, lost) == ("RankFailure", 1) and "did not connect within 2.0 s" in words


@pytest.mark.ranks
def test_a_stranger_does_not_keep_hosts_from_connecting(start, tmp_path) -> None:
    assert others(start, tmp_path, "lets a stranger in") == [["made", None, ""]] * 3
