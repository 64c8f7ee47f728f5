"""What the ranks run when the others go on without one that comes back (enable_shrink)."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from buffer_children import E, H, M, batch, experts, join, low_latency, weighted

from whalefall import ep
from whalefall.errors import RankFailure


def masked(buffer: ep.Buffer) -> list[int]:
    status = torch.zeros(buffer.group_size, dtype=torch.int32)
    buffer.low_latency_query_mask_buffer(status)
    return status.nonzero().flatten().tolist()


def step(buffer: ep.Buffer, n: int) -> None:
    """Dispatch and combine, by hook now and then; what comes must be that of the ranks there."""
    x, idx, weights = batch(buffer.rank)
    x, first = x * (-1) ** n, buffer.rank * (E // buffer.group_size)
    more = {"return_recv_hook": n % 3 == 2}
    got, _, handle, _, hook = low_latency(buffer, x, idx, use_fp8=False, **more)
    if hook:
        hook()
    out, _, hook = buffer.low_latency_combine(experts(got, first), idx, weights, handle, **more)
    if hook:
        hook()
    gone = torch.isin(idx // (E // buffer.group_size), torch.tensor(masked(buffer)))
    assert torch.equal(out, weighted(x, torch.where(gone, -1, idx), weights)), f"step {n}"


def until_left(buffer: ep.Buffer) -> str:
    for n in range(100_000):
        try:
            step(buffer, n)
        except RankFailure as error:
            return str(error)
    return "nothing"


def late(buffer: ep.Buffer, victim: int, gone_on: Callable[[], None], wait: Callable) -> str:
    """The victim comes to its third step when the others are far ahead."""
    for n in range(2 if buffer.rank == victim else 6):
        step(buffer, n)
    if buffer.rank != victim:
        gone_on()
        return str(masked(buffer))
    wait()
    return until_left(buffer)


def stopped(buffer: ep.Buffer, victim: int, gone_on: Callable[[], None], _: Callable) -> str:
    """The victim is stopped at some moment, and continued when the others are far ahead."""
    step(buffer, 0)
    if buffer.rank == victim:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGSTOP)).start()
        return until_left(buffer)
    left = 5
    for n in range(100_000):
        left -= masked(buffer) == [victim]
        if not left:
            break
        step(buffer, n)
    gone_on()
    return str(masked(buffer))


def by_hand(buffer: ep.Buffer, victim: int, gone_on: Callable[[], None], wait: Callable) -> str:
    """The others mask the victim for some steps, then clean the masks; so does it."""
    step(buffer, 0)
    dist.barrier()
    if buffer.rank != victim:
        buffer.low_latency_update_mask_buffer(victim, True)
        for n in range(3):
            step(buffer, n)
        gone_on()
    wait()
    buffer.low_latency_clean_mask_buffer()
    assert masked(buffer) == []
    if buffer.rank == victim:
        return until_left(buffer)
    for n in range(3):
        step(buffer, n)
    return str(masked(buffer))


def come_back(
    folder: str, rank: int, size: int, ways: list[tuple[str, int, list[str] | None]]
) -> list[str]:
    """What each rank hears in each (way, who is left, hosts)."""
    os.environ["WHALEFALL_EP_TIMEOUT"] = "1"
    group, said = join(folder, rank, size), []
    hint = ep.Buffer.get_low_latency_rdma_size_hint(M, H, size, E)
    for i, (way, victim, hosts) in enumerate(ways):
        os.environ["WHALEFALL_HOST"] = hosts[rank] if hosts else "one"
        buffer = ep.Buffer(group, 0, hint, low_latency_mode=True, enable_shrink=True)
        files = [Path(folder, f"{i} gone on {r}") for r in range(size)]

        def wait(files: list[Path] = files, victim: int = victim) -> None:
            while not all(f.exists() for r, f in enumerate(files) if r != victim):
                time.sleep(0.01)

        call = {"late": late, "stopped": stopped, "by hand": by_hand}[way]
        said.append(call(buffer, victim, files[rank].touch, wait))
        dist.barrier()
    return said
