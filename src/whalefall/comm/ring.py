"""Comm room: a bounded queue of messages in shared memory, one producer and one consumer.

Either may be another process. A full ring makes the producer wait, an empty one the consumer; they
sleep in the kernel (futex), so waiting costs no CPU. Nothing is lost when a side stalls.
"""

from __future__ import annotations

import ctypes
import errno

from whalefall.comm.frames import Buffer, CommError
from whalefall.comm.library import address, library, span
from whalefall.errors import LimitError

__all__ = ["Ring"]


class Ring:
    """A view of a ring; each side makes its own over the same memory.

    Args:
        memory: writable, 8-byte aligned, e.g. `Region.view` or a slice of it.
        create: format it (exactly one side, before the other looks).
    Raises: LimitError if the memory is too small, or was not formatted for this size.
    """

    def __init__(self, memory: Buffer, create: bool = False) -> None:
        self._memory = memory  # keeps it alive
        start, nbytes = span(memory)
        self._start = address(memory, writable=True)
        self._lib = library()
        self.capacity = (nbytes - self._lib.wf_ring_header()) // 8 * 8
        if self.capacity < 64:
            raise LimitError(f"comm: a ring in {nbytes} bytes, wanted at least 256")
        stored = ctypes.c_uint64.from_address(start + 128)
        if create:
            self._lib.wf_ring_create(start, self.capacity)
        elif stored.value != self.capacity:
            raise LimitError(
                f"comm: ring of capacity {stored.value} in memory for {self.capacity}; not a ring?"
            )

    @property
    def max_message_bytes(self) -> int:
        """The longest message that fits."""
        return self.capacity - 8

    def send(self, *pieces: Buffer, timeout_s: float | None = None) -> None:
        """Append one message, the pieces in order, waiting for room.

        Raises: TimeoutError if there was none in time; LimitError if it can never fit.
        """
        spans = [span(p) for p in pieces]
        starts = (ctypes.c_void_p * len(spans))(*(s for s, _ in spans))
        sizes = (ctypes.c_uint64 * len(spans))(*(n for _, n in spans))
        code = self._lib.wf_ring_send(self._start, starts, sizes, len(spans), _ns(timeout_s))
        if code == errno.ETIMEDOUT:
            raise TimeoutError(f"comm: ring full for {timeout_s} s; the consumer stalls")
        if code == errno.EMSGSIZE:
            raise LimitError(
                f"comm: message of {sum(n for _, n in spans)} bytes, ring takes at most "
                f"{self.max_message_bytes}"
            )

    def recv(self, timeout_s: float | None = None) -> bytearray:
        """The next message, waiting for one.

        Raises: TimeoutError if none came in time; CommError if the ring holds nonsense.
        """
        message = bytearray(self._next(timeout_s))
        self._lib.wf_ring_take(self._start, address(message) if message else None, len(message))
        return message

    def recv_into(self, buffer: Buffer, timeout_s: float | None = None) -> int:
        """Put the next message at the start of `buffer`; returns its length.

        Raises: LimitError if the buffer is too short (the message stays); else as `recv`.
        """
        length = self._next(timeout_s)
        _, room = span(buffer)
        if length > room:
            raise LimitError(f"comm: message of {length} bytes for a buffer of {room}")
        self._lib.wf_ring_take(self._start, address(buffer, writable=True), length)
        return length

    def _next(self, timeout_s: float | None) -> int:
        length = self._lib.wf_ring_next(self._start, _ns(timeout_s))
        if length == -errno.ETIMEDOUT:
            raise TimeoutError(f"comm: ring empty for {timeout_s} s; the producer stalls")
        if length < 0:
            raise CommError("comm: the ring's memory was overwritten by somebody")
        return int(length)


def _ns(timeout_s: float | None) -> int:
    return -1 if timeout_s is None else int(timeout_s * 1e9)
