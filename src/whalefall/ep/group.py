"""Ep room: how the ranks of a group find each other, once, when an engine is made.

An engine needs only an all-gather of small messages; `FileGroup` does it through a folder of one
host, `TcpGroup` through rank 0, `torch.TorchGroup` through a process group.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Protocol

import msgspec

from whalefall import comm
from whalefall.arguments import whole
from whalefall.ep.arguments import MOST, seconds
from whalefall.ep.callers import Caller, Callers
from whalefall.errors import ConfigError, RankFailure

__all__ = ["FileGroup", "Group", "TcpGroup"]

POLL_S = 0.002


class Group(Protocol):
    """Who belongs together.

    Attributes:
        rank: this process, 0 … size − 1.
        size: number of ranks.
        address: our address as other hosts see it ("" where unknown).
    """

    rank: int
    size: int
    address: str

    def all_gather(self, message: bytes) -> list[bytes]:
        """Every rank's message, in the order of ranks; collective.

        Raises: RankFailure naming the ranks that did not come.
        """


def _check(rank: int, size: int) -> None:
    if not 0 <= whole("ep: rank", rank, 0, MOST) < whole("ep: size", size, 1, MOST):
        raise ConfigError(f"ep: rank is {rank} of {size}, wanted 0 … {size - 1}")


def _late(absent: list[int], timeout_s: float, refused: str = "") -> RankFailure:
    words = f"ep: ranks {absent} did not come within {timeout_s} s"
    return RankFailure(f"{words}; {refused}" if refused else words, rank=absent[0])


def _gone(rank: int, why: object) -> RankFailure:
    return RankFailure(f"ep: rank {rank} is gone: {why}", rank=rank)


class FileGroup:
    """Ranks of one host meet in a folder that was empty before.

    Args:
        folder: on a local disk or /dev/shm, the same for all ranks, private to this group.
        rank: this process.
        size: number of ranks.
        timeout_s: how long to wait for the others.
    """

    address = "127.0.0.1"

    def __init__(
        self, folder: str | os.PathLike[str], rank: int, size: int, timeout_s: float = 60.0
    ) -> None:
        _check(rank, size)
        timeout_s = seconds("ep: timeout_s", timeout_s)
        if not isinstance(folder, str | os.PathLike):
            raise ConfigError(f"ep: folder is a {type(folder).__name__}, wanted a path")
        self.folder, self.rank, self.size, self.timeout_s = Path(folder), rank, size, timeout_s
        self.folder.mkdir(parents=True, exist_ok=True)
        self._round = 0

    def all_gather(self, message: bytes) -> list[bytes]:
        """Every rank's message, through one file each."""
        mine = self.folder / f"{self._round}-{self.rank}"
        temporary = mine.with_suffix(".new")
        temporary.write_bytes(message)
        os.replace(temporary, mine)
        end = time.monotonic() + self.timeout_s
        messages: dict[int, bytes] = {}
        while len(messages) < self.size:
            for rank in set(range(self.size)) - messages.keys():
                with contextlib.suppress(FileNotFoundError):
                    messages[rank] = (self.folder / f"{self._round}-{rank}").read_bytes()
            if time.monotonic() > end:
                absent = sorted(set(range(self.size)) - messages.keys())
                raise _late(absent, self.timeout_s)
            if len(messages) < self.size:
                time.sleep(POLL_S)
        self._round += 1
        return [messages[r] for r in range(self.size)]


class _Message(msgspec.Struct):
    rank: int
    messages: list[bytes]
    lost: int = -1  # the rank without which nothing comes of it


class TcpGroup:
    """Ranks of any hosts meet at rank 0.

    Args:
        host: rank 0's address; rank 0 listens on it.
        port: rank 0's port.
        rank: this process.
        size: number of ranks.
        token: the shared secret.
        timeout_s: how long to wait for the others.
    """

    def __init__(
        self, host: str, port: int, rank: int, size: int, token: bytes, timeout_s: float = 60.0
    ) -> None:
        _check(rank, size)
        timeout_s = seconds("ep: timeout_s", timeout_s)
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        self._peers: dict[int, comm.Channel] = {}
        end = time.monotonic() + timeout_s
        if rank == 0:
            self.address = host
            self._peers = self._await_all(
                Callers(comm.listen(host, port), token, range(1, size)), end
            )
        else:
            channel = self._connect(host, port, token, end)
            self.address = channel.socket.getsockname()[0]
            self._peers = {0: channel}
        for channel in self._peers.values():
            channel.settimeout(timeout_s)

    def _await_all(self, callers: Callers, end: float) -> dict[int, comm.Channel]:
        try:
            absent = callers.wait(end)
        finally:
            callers.close()
        if absent:
            for channel in callers.arrived.values():
                channel.close()
            raise _late(absent, self.timeout_s, callers.refused)
        return callers.arrived

    def _connect(self, host: str, port: int, token: bytes, end: float) -> comm.Channel:
        while True:
            try:
                channel = comm.connect(host, port, token, timeout_s=5.0)
                channel.send(Caller(self.rank))
                return channel
            except comm.AuthError:
                raise
            except OSError as error:
                if time.monotonic() > end:
                    raise RankFailure(
                        f"ep: rank 0 does not answer at {host}:{port}: {error}", rank=0
                    ) from None
                time.sleep(0.05)

    def all_gather(self, message: bytes) -> list[bytes]:
        """Every rank's message, through rank 0."""
        if self.rank:
            try:
                self._peers[0].send(_Message(self.rank, [message]))
                answer = self._peers[0].recv(_Message)[0]
            except (comm.CommError, TimeoutError) as error:
                raise _gone(0, error) from None
            if answer.lost >= 0:
                raise _gone(answer.lost, "rank 0 says so")
            return answer.messages
        messages = {0: message}
        try:
            for rank, channel in self._peers.items():
                messages[rank] = channel.recv(_Message)[0].messages[0]
            ordered = [messages[r] for r in range(self.size)]
            for rank, channel in self._peers.items():  # noqa: B007
                channel.send(_Message(0, ordered))
        except (comm.CommError, TimeoutError) as error:
            self._tell(_Message(0, [], rank))
            raise _gone(rank, error) from None
        return ordered

    def _tell(self, message: _Message) -> None:
        for channel in self._peers.values():
            with contextlib.suppress(OSError):
                channel.send(message)

    def close(self) -> None:
        """Close the connections; an engine made with this group lives on."""
        for channel in self._peers.values():
            channel.close()
