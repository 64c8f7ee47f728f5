"""What the ranks run when low-latency calls are left in halves: hooks, destroyed buffers."""

import os
import threading
import time

import torch
import torch.distributed as dist
from buffer_children import E, H, M, batch, experts, join, low_latency

from whalefall import ep
from whalefall.errors import ConfigError, RankFailure


def made(folder: str, rank: int, size: int, hosts: list[str] | None) -> ep.Buffer:
    if hosts:
        os.environ["WHALEFALL_HOST"] = hosts[rank]
    hint = ep.Buffer.get_low_latency_rdma_size_hint(M, H, size, E)
    group = join(folder, rank, size)
    return ep.Buffer(group, 1 << 20, hint, low_latency_mode=True, explicitly_destroy=True)


def leave_with_hooks(folder: str, rank: int, size: int) -> list:
    """Rank 0 destroys its buffer while rank 1's rows wait for a slot that its hooks keep."""
    buffer = made(folder, rank, size, ["a", "b"])
    x, idx, _ = batch(rank)
    calls = [low_latency(buffer, x, idx, return_recv_hook=True) for _ in range(2)]
    if rank:
        try:
            calls[0][-1]()
            calls[1][-1]()
            dist.barrier()
            low_latency(buffer, x, idx)
        except RankFailure as error:
            return [error.rank]
    dist.barrier()
    time.sleep(0.5)  # the third dispatch is here
    buffer.destroy()
    time.sleep(0.2)
    return [t.name for t in threading.enumerate() if t.name.startswith("ep ")]


def change_before_the_hook(
    folder: str, rank: int, size: int, hosts: list[str] | None
) -> dict[str, bool]:
    """Whether the results are those of what was given at the call, whatever becomes of it."""
    buffer, same = made(folder, rank, size, hosts), {}
    x, idx, weights = batch(rank)
    for fp8 in (False, True):
        wanted, count, handle, *_ = low_latency(buffer, x, idx, use_fp8=fp8)
        given = x.clone(), idx.clone()
        got, *_, hook = low_latency(buffer, *given, use_fp8=fp8, return_recv_hook=True)
        for t in given:
            t.zero_()
        hook()
        for i, (a, b) in enumerate(zip(got, wanted, strict=True) if fp8 else [(got, wanted)]):
            rows = [(a[e, :n].float(), b[e, :n].float()) for e, n in enumerate(count.tolist())]
            same[f"dispatch, fp8 {fp8}, {i}"] = all(torch.equal(a, b) for a, b in rows)
    got, _, handle, *_ = low_latency(buffer, x, idx, use_fp8=False)
    returned = experts(got, rank * (E // size))
    for more in ({}, {"use_logfmt": True}):
        wanted = buffer.low_latency_combine(returned, idx, weights, handle, **more)[0]
        given = returned.clone(), idx.clone(), weights.clone()
        out, _, hook = buffer.low_latency_combine(*given, handle, **more, return_recv_hook=True)
        for t in given:
            t.zero_()
        hook()
        same[f"combine {more}"] = torch.equal(out, wanted)
    dist.barrier()
    buffer.destroy()
    return same


def take_the_next_buffer(folder: str, rank: int, size: int) -> dict[str, object]:
    """What comes of a zero-copy combine after other calls, and of a buffer taken by two handles."""
    buffer, (x, idx, weights) = made(folder, rank, size, None), batch(rank)
    got, _, first, *_ = low_latency(buffer, x, idx, use_fp8=False)
    returned = experts(got, rank * (E // size))
    wanted = buffer.low_latency_combine(returned, idx, weights, first)[0]
    second = low_latency(buffer, x, idx, use_fp8=False)[2]

    def take(handle: tuple) -> torch.Tensor:
        memory = buffer.get_next_low_latency_combine_buffer(handle)
        memory[:] = returned
        return memory

    def add_up(handle: tuple) -> object:
        try:
            got = buffer.low_latency_combine(returned, idx, weights, handle, zero_copy=True)[0]
        except ConfigError as error:
            return str(error)
        return torch.equal(got, wanted)

    def taken_twice() -> object:
        kept = take(first), take(first)  # noqa: F841
        try:
            take(second)
        except ConfigError as error:
            return [str(error), add_up(first)]
        return "given to both"

    between = {
        "nothing": lambda: None,
        "a dispatch": lambda: low_latency(buffer, x, idx),
        "two": lambda: [low_latency(buffer, x, idx) for _ in range(2)],
        "a combine": lambda: buffer.low_latency_combine(returned * 2, idx, weights, second),
        "clean": lambda: buffer.clean_low_latency_buffer(M, H, E),
        "another that took it once the first was dropped": lambda: take(second),
    }
    said: dict[str, object] = {"never taken": add_up(first)}
    for name, call in between.items():
        take(first)
        call()
        said[name] = add_up(first)
    said["taken twice"] = taken_twice()
    take(second)
    said["the other"] = add_up(second)
    dist.barrier()
    buffer.destroy()
    return said
