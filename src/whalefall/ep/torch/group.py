"""Ep room: a `torch.distributed` process group, or an mpi4py communicator, as a `Group`."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from whalefall.errors import ConfigError, RankFailure, WhalefallError

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
        """Every rank's message, padded to the longest on the way.

        Raises: RankFailure, whose rank gloo does not tell; ConfigError for a backend without CPU
            tensors.
        """
        with _refusals():
            return self._gather(message)

    def _gather(self, message: bytes) -> list[bytes]:
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
        """Every rank's message.

        Raises: RankFailure.
        """
        with _refusals():
            return list(self.comm.allgather(message))


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """What a backend raises, as one line."""
    try:
        yield
    except WhalefallError:
        raise
    except RuntimeError as error:
        said = str(error).strip().split("\n")[0]
        if "No backend type" in said:
            raise ConfigError(
                "Buffer: group has no backend for CPU tensors; new_group(backend='gloo') makes one"
            ) from None
        # gloo: "[file:line] what happened. What may help elsewhere."
        what = said.split("] ", 1)[-1].split(". ")[0]
        raise RankFailure(
            f"ep: a rank died or left while the Buffer was made: {what}; start all ranks again"
        ) from None


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
