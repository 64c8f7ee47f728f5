"""ep.arena: memory is handed out again once nobody holds it, and never before."""

import threading

import numpy as np
import torch

from whalefall import comm
from whalefall.ep.arena import RECENT_PARTS, Arena
from whalefall.ep.shared import SharedArena

MIB = 1 << 20


def place(array: np.ndarray) -> int:
    return array.ctypes.data


def test_memory_that_nobody_holds_is_handed_out_again() -> None:
    arena = Arena()
    array = arena.empty((MIB,), np.uint8)
    first = place(array)
    del array
    assert place(arena.empty((MIB // 2, 2), np.uint8)) == first


def test_memory_is_not_handed_out_while_a_view_or_a_tensor_is_alive() -> None:
    arena = Arena()
    view = arena.empty((MIB,), np.uint8)[5:9]
    tensor = torch.frombuffer(arena.block(MIB), dtype=torch.uint8).view(torch.int32)
    taken = {place(view) - 5, tensor.data_ptr()}
    held = [arena.block(MIB) for _ in range(2 * RECENT_PARTS)]
    assert len(taken | {place(a) for a in held}) == 2 + len(held)


def test_what_is_no_longer_among_the_recent_comes_back_too() -> None:
    arena = Arena()
    held = [arena.block(MIB) for _ in range(2 * RECENT_PARTS)]
    places = {place(a) for a in held}
    held.clear()
    again = [arena.block(MIB) for _ in range(2 * RECENT_PARTS)]
    assert {place(a) for a in again} == places


def test_small_requests_do_not_take_large_blocks() -> None:
    arena = Arena()
    arena.block(64 * MIB)
    assert arena.block(MIB).nbytes < 2 * MIB


def test_threads_never_get_the_same_piece() -> None:
    with comm.Region.create("ep-test-arena", 64 * MIB, reserve=False) as region:
        shared = SharedArena(region, 0, 64 * MIB)
        together, seen = threading.Barrier(4), [set[int]() for _ in range(100)]

        def work() -> None:
            for places in seen:
                part = shared.take(MIB)
                assert part is not None
                places.add(part.offset)
                together.wait()
                del part
                together.wait()

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        shared.clear()
        assert all(len(places) == 4 for places in seen)
