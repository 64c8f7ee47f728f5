"""Starts ranks for the tests: processes forked from one that has imported torch already."""

from __future__ import annotations

import multiprocessing
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "whalefall.pipeline.torch"])


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _main(
    out: Connection, function: Callable[..., Any], rank: int, size: int, port: int, args: tuple
) -> None:
    import datetime

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size,
            timeout=datetime.timedelta(seconds=60),
        )  # fmt: skip
        out.send((True, function(rank, size, *args)))
        dist.destroy_process_group()
    except BaseException:
        out.send((False, traceback.format_exc()))


def run(function: Callable[..., Any], size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """`function(rank, size, *args)` on each of `size` ranks of a gloo group; their results."""
    port = free_port()
    started = []
    for rank in range(size):
        here, there = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=_main, args=(there, function, rank, size, port, args))
        process.start()
        there.close()
        started.append((process, here))
    results = []
    try:
        for rank, (_, pipe) in enumerate(started):
            if not pipe.poll(timeout):
                raise TimeoutError(f"rank {rank} did not answer within {timeout} s")
            try:
                fine, value = pipe.recv()
            except EOFError:
                fine, value = True, None  # it was killed
            if not fine:
                raise AssertionError(f"rank {rank}:\n{value}")
            results.append(value)
    finally:
        for process, _ in started:
            process.join(5)
            if process.is_alive():
                process.kill()
    return results
