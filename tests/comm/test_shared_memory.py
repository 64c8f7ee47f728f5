"""comm: regions are swept when nobody lives who used them; rings lose nothing and stay bounded."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from whalefall import comm, launch
from whalefall.errors import LimitError, MissingError

HERE = str(Path(__file__).parent)


@pytest.fixture
def name() -> Iterator[str]:
    name = f"test-{os.getpid()}-{time.monotonic_ns()}"
    yield name
    Path(f"/dev/shm/whalefall-{name}").unlink(missing_ok=True)


def test_what_one_side_writes_the_other_reads(name: str) -> None:
    with comm.Region.create(name, 100) as mine, comm.Region.attach(name) as theirs:
        mine.view[3] = 7
        assert theirs.view[3] == 7
        assert theirs.nbytes == 100
    with pytest.raises(MissingError, match="no region"):
        comm.Region.attach(name)


def test_a_taken_name_a_bad_name_and_too_much_memory_are_refused(name: str) -> None:
    with comm.Region.create(name, 10):
        with pytest.raises(FileExistsError):
            comm.Region.create(name, 10)
    with pytest.raises(MissingError, match="wanted 1–128"):
        comm.Region.create("../x", 10)
    free = os.statvfs("/dev/shm")
    with pytest.raises(LimitError, match="bytes free"):
        comm.Region.create(name, free.f_blocks * free.f_frsize + (1 << 30))
    with pytest.raises(MissingError):
        comm.Region.attach(name)


def test_the_sweep_takes_only_what_nobody_uses(name: str) -> None:
    child = launch.Task(
        "owner", "comm_children:own_region", kwargs={"name": name}, path=(HERE,)
    )  # fmt: skip
    with launch.Group([child]) as group:
        end = time.monotonic() + 20
        while not Path(f"/dev/shm/whalefall-{name}").exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        assert comm.sweep(name) == []
        group.kill("owner")
        group.members["owner"].process.wait()
    region = comm.Region.attach(name)  # a survivor still uses it
    assert comm.sweep(name) == []
    region.close()
    assert comm.sweep(name) == [name]
    assert comm.sweep(name) == []


def test_a_region_without_a_name_travels_over_a_socket() -> None:
    a, b = socket.socketpair()
    with a, b, comm.Region.anonymous(64) as mine:
        mine.view[:3] = b"abc"
        mine.send_to(a)
        mine.send_to(a)
        with comm.Region.receive(b) as theirs:
            assert bytes(theirs.view[:3]) == b"abc"
        with pytest.raises(LimitError, match="at most 10"):
            comm.Region.receive(b, max_bytes=10)
        a.close()
        with pytest.raises(MissingError, match="no region came"):
            comm.Region.receive(b)


def test_messages_of_every_size_arrive_in_order_through_a_small_ring() -> None:
    with comm.Region.anonymous(256 + 192) as region:
        comm.Ring(region.view, create=True)
        sizes = np.random.default_rng(0).integers(0, 240, 300)

        def produce() -> None:
            out = comm.Ring(region.view)
            for i, n in enumerate(sizes):
                out.send(bytes([i % 256]) * int(n), b"", bytes([i % 256]), timeout_s=20)

        thread = threading.Thread(target=produce)
        thread.start()
        ring = comm.Ring(region.view)
        for i, n in enumerate(sizes):
            assert ring.recv(timeout_s=20) == bytes([i % 256]) * (int(n) + 1)
        thread.join()
        del ring


def test_a_full_ring_waits_and_an_empty_one_too() -> None:
    ring = comm.Ring(bytearray(192 + 128), create=True)
    ring.send(bytes(100))
    began = time.thread_time()
    with pytest.raises(TimeoutError, match="consumer stalls"):
        ring.send(bytes(100), timeout_s=0.2)
    assert time.thread_time() - began < 0.1, "waiting must not burn the CPU"
    assert len(ring.recv()) == 100
    with pytest.raises(TimeoutError, match="producer stalls"):
        ring.recv(timeout_s=0.05)
    with pytest.raises(LimitError, match="at most 120"):
        ring.send(bytes(121))
    ring.send(bytes(10))
    with pytest.raises(LimitError, match="buffer of 9"):
        ring.recv_into(bytearray(9))
    buffer = bytearray(12)
    assert ring.recv_into(buffer) == 10


def test_memory_that_holds_no_ring_is_refused() -> None:
    with pytest.raises(LimitError, match="not a ring"):
        comm.Ring(bytearray(1024))
    with pytest.raises(LimitError, match="at least 256"):
        comm.Ring(bytearray(100), create=True)
