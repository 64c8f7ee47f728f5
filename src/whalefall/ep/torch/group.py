"""Ep room: a `torch.distributed` process group, or an mpi4py communicator, as a `Group`."""

from __future__ import annotations

import os
import socket
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["MpiGroup", "TorchGroup"]


class TorchGroup:
    """The ranks of a process group; used only while an engine is made.

    Args:
        group: a process group that can gather CPU tensors (gloo).
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.address = _own_address()

    def all_gather(self, message: bytes) -> list[bytes]:
        """Every rank's message, padded to the longest on the way."""
        mine = torch.frombuffer(bytearray(message or b"\0"), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(message)]), group=self.group)
        longest = max(1, *(int(n) for n in lengths))
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(mine)] = mine
        out = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(out, padded, group=self.group)
        return [bytes(t[: int(n)].numpy()) for t, n in zip(out, lengths, strict=True)]


class MpiGroup:
    """The ranks of an mpi4py communicator."""

    def __init__(self, comm: Any) -> None:
        self.comm = comm
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self.address = _own_address()

    def all_gather(self, message: bytes) -> list[bytes]:
        """Every rank's message."""
        return list(self.comm.allgather(message))


def _own_address() -> str:
    """Our address towards MASTER_ADDR; no packet is sent to find it."""
    master = os.environ.get("MASTER_ADDR", "127.0.0.1")
    try:
        family, _, _, _, where = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(where)
            return str(probe.getsockname()[0])
    except OSError:
        return ""
