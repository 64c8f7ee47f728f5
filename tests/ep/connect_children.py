"""What ranks run that make a Buffer between hosts, while rank 1 does something else."""

import os
import signal
import socket
import time

import torch.distributed as dist

from whalefall import comm
from whalefall.ep import Buffer
from whalefall.errors import RankFailure


def go(*_: object, **__: object) -> comm.Channel:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def go_later(*_: object, **__: object) -> comm.Channel:
    time.sleep(1)
    return go()


def hang(*_: object, **__: object) -> comm.Channel:
    time.sleep(100)
    raise AssertionError


def after_a_stranger(host: str, port: int, *more: object, **others: object) -> comm.Channel:
    with socket.create_connection((host, port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.0\r\n\r\n" * 10)
        time.sleep(0.2)
    return connect(host, port, *more, **others)


connect = comm.connect
WAYS = {
    "dies at once": go, "dies after it was called": go_later, "hangs": hang,
    "lets a stranger in": after_a_stranger,
}  # fmt: skip


def while_all_connect(folder: str, rank: int, size: int, way: str) -> list:
    """Whether the Buffer was made, else: the error, the rank that it names, its words."""
    os.environ["WHALEFALL_HOST"] = "aabb"[rank]
    if way == "hangs":
        os.environ["WHALEFALL_EP_TIMEOUT"] = "2"
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=size)
    if rank == 1:
        comm.connect = WAYS[way]
    try:
        buffer = Buffer(dist.group.WORLD, 1 << 20)
    except RankFailure as error:
        return [type(error).__name__, error.rank, str(error)]
    dist.barrier()
    del buffer
    return ["made", None, ""]
