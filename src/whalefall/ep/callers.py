"""Ep room: ranks that connect to this one, each let in by a thread of its own.

So whoever finds the port (a scan, a browser, a rank that dies on the way) holds nobody up, and ends
nothing: only the ranks that are awaited count.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterable

import msgspec

from whalefall import comm
from whalefall.comm.channel import admit
from whalefall.errors import WhalefallError

__all__ = ["Caller", "Callers", "hear_of_loss", "tell_of_loss"]

PROOF_S = 10.0  # for each step of a proof
MOST_PROOFS = 64  # at a time; more connections wait in the listener's queue
SLICE_S = 0.05


class Caller(msgspec.Struct):
    """What a rank says when it has connected.

    Attributes:
        rank: it.
        lost: a rank that it could not reach, so that nothing will come of this; −1: none.
    """

    rank: int
    lost: int = -1


class Callers:
    """The connections of the ranks that call this one; close it once they have come.

    Args:
        listener: listening; owned from now on.
        token: the shared secret.
        wanted: the ranks that will call.
        limits: of their channels.
    Attributes:
        arrived: rank → channel.
        lost: a rank that one of them could not reach, −1: none.
        refused: why the last caller was turned away that knew the token; "" for nothing.
    """

    def __init__(
        self,
        listener: socket.socket,
        token: bytes,
        wanted: Iterable[int],
        limits: comm.Limits = comm.Limits(),
    ) -> None:
        self._listener, self._token, self._limits = listener, token, limits
        self._wanted = frozenset(wanted)
        self.arrived: dict[int, comm.Channel] = {}
        self.lost, self.refused = -1, ""
        self._changed, self._closed = threading.Condition(), False
        self._proofs = threading.Semaphore(MOST_PROOFS)
        self._thread = threading.Thread(target=self._accept, name="ep accept", daemon=True)
        self._thread.start()

    def missing(self) -> list[int]:
        """The ranks that have not come."""
        return sorted(self._wanted - self.arrived.keys())

    def wait(self, until_s: float, look: Callable[[], None] = lambda: None) -> list[int]:
        """Return when all have come, or the time (of `time.monotonic`) is up: the missing ranks.

        Args:
            look: called now and then meanwhile; what it raises ends the wait.
        """
        while self.missing() and self.lost < 0 and time.monotonic() < until_s:
            look()
            with self._changed:
                self._changed.wait(SLICE_S)
        return self.missing()

    def close(self) -> None:
        """Accept nothing more; the channels of those who came stay open."""
        with self._changed:
            self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join()
        self._listener.close()

    def _accept(self) -> None:
        self._listener.settimeout(SLICE_S)
        while not self._closed:
            if not self._proofs.acquire(timeout=SLICE_S):
                continue
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                self._proofs.release()
                if not isinstance(error, TimeoutError):
                    time.sleep(SLICE_S)  # no descriptor is left, say
                continue
            threading.Thread(target=self._admit, args=(sock,), daemon=True).start()

    def _admit(self, sock: socket.socket) -> None:
        try:
            channel = admit(sock, self._token, PROOF_S, self._limits)
            channel.settimeout(PROOF_S)
            try:
                self._take(channel.recv(Caller)[0], channel)
            except BaseException:
                channel.close()
                raise
        except (OSError, WhalefallError):
            pass  # a stranger, or a rank that died on the way
        finally:
            self._proofs.release()

    def _take(self, caller: Caller, channel: comm.Channel) -> None:
        channel.settimeout(None)
        with self._changed:
            if self._closed or caller.rank in self.arrived or caller.rank not in self._wanted:
                twice = "a second time" if caller.rank in self.arrived else "uncalled"
                self.refused = f"rank {caller.rank} came {twice}"
                channel.close()
                return
            self.arrived[caller.rank] = channel
            self.lost = max(self.lost, caller.lost)
            self._changed.notify_all()


def tell_of_loss(channels: Iterable[comm.Channel], rank: int, lost: int) -> None:
    """Say on channels that nothing comes of this, since a rank is lost, and close them."""
    for channel in channels:
        with contextlib.suppress(OSError):
            channel.settimeout(PROOF_S)
            channel.send(Caller(rank, lost))
        channel.close()


def hear_of_loss(rank: int, channel: comm.Channel) -> int:
    """The rank that is lost, if that of this channel left or says so; −1: nothing was said."""
    try:
        channel.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        lost = channel.recv(Caller)[0].lost
        return lost if lost >= 0 else rank
    except BlockingIOError:
        return -1
    except (OSError, WhalefallError):
        return rank
