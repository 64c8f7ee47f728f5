"""File-system room: calls between processes over `comm` channels — one call at a time on each.

`serve` answers each connection in a thread of its own; `Pool` keeps idle connections by address.
Replies with data are received straight into the caller's buffers.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import mmap
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from whalefall import env
from whalefall.comm import Channel, CommError, Limits, connect, listen
from whalefall.comm.channel import listen_local, tune
from whalefall.comm.frames import PREFIX, lengths
from whalefall.comm.tokens import prove_server
from whalefall.errors import WhalefallError
from whalefall.fs.core.effects import Refused, Unreachable
from whalefall.fs.core.messages import Code, Failed, Wide

__all__ = ["Call", "Pool", "Result", "Server", "any_message"]

log = logging.getLogger("whalefall.fs")
LIMITS = Limits(header_bytes=8 << 20, payload_bytes=1 << 30)
KEPT_BYTES = 8 << 20
GONE = (errno.EBADF, errno.EINVAL, errno.ENOTSOCK)  # what a closed listener answers
MAX_STRANGERS = 256
STRUGGLE_S = 0.05
Handler = Callable[[Any, memoryview], tuple[Any, Sequence[Any]]]


class Call(Wide, frozen=True):
    """A named call with plain arguments (metadata, administration)."""

    name: str
    args: dict[str, Any]


class Result(Wide, frozen=True):
    """What a `Call` returned."""

    value: Any


@functools.cache
def any_message() -> msgspec.msgpack.Decoder[Any]:
    """Decodes every message; made once, before there are threads (msgspec crashes otherwise)."""
    kinds = Wide.__subclasses__()
    union: Any = kinds[0]
    for kind in kinds[1:]:
        union = union | kind
    return msgspec.msgpack.Decoder(union)


class Server:
    """Answers calls until `close`.

    Args:
        handler: (message, payload) → (reply, buffers); a Refused becomes a `Failed` reply.
        token: what callers must know.
    """

    def __init__(self, handler: Handler, token: bytes, host: str, port: int) -> None:
        self._handler, self._token = handler, token
        any_message()
        listener = listen(host, port)
        self.host, self.port = listener.getsockname()[:2]
        self._listeners = [listener]
        try:
            self._listeners.append(listen_local(host, self.port))
        except OSError as error:  # somebody has the name: clients find that out, and use TCP
            log.warning("fs: port %d is served over TCP only: %s", self.port, error)
        self._channels: set[Channel] = set()
        self._strangers: dict[Channel, None] = {}  # no proof yet; the oldest first
        self._mutex = threading.Lock()
        self._closed = False

    def start(self) -> None:
        """Begin to accept."""
        for listener in self._listeners:
            accept = threading.Thread(target=self._accept, args=(listener,), daemon=True)
            accept.start()

    def _accept(self, listener: socket.socket) -> None:
        while not self._closed:
            try:
                sock, _ = listener.accept()
            except OSError as error:
                if self._closed or error.errno in GONE:
                    return
                self._struggle(error)
                continue
            channel = Channel(sock, LIMITS)
            with self._mutex:
                self._strangers[channel] = None
            if len(self._strangers) > MAX_STRANGERS:
                self._drop_stranger()
            try:
                threading.Thread(
                    target=self._serve, args=(channel,), name="serve", daemon=True
                ).start()
            except RuntimeError as error:  # no more threads
                self._welcome(channel)
                channel.close()
                self._struggle(error)

    def _struggle(self, error: Exception) -> None:
        """No descriptor or thread is left for a connection: those without a proof go first."""
        log.warning("fs: cannot accept a connection at port %d: %s", self.port, error)
        self._drop_stranger()
        time.sleep(STRUGGLE_S)

    def _drop_stranger(self) -> None:
        with self._mutex:
            oldest = next(iter(self._strangers), None)
            self._strangers.pop(oldest, None)  # type: ignore[arg-type]
        if oldest is not None:
            oldest.close()

    def _welcome(self, channel: Channel) -> None:
        with self._mutex:
            self._strangers.pop(channel, None)

    def _serve(self, channel: Channel) -> None:
        sock = channel.socket
        self._channels.add(channel)
        try:
            tune(sock)
            sock.settimeout(10)
            prove_server(channel, self._token)
            sock.settimeout(None)
            self._welcome(channel)
            memory = Memory()
            while True:
                message, payload = receive(channel, memory=memory)
                reply, buffers = self._answer(message, payload)
                channel.send(reply, *buffers)
        except (WhalefallError, OSError) as error:
            if "ended" not in str(error) and "gone" not in str(error) and not self._closed:
                log.warning("fs: closed the connection from %s: %s", channel, error)
        finally:
            self._channels.discard(channel)
            self._welcome(channel)
            channel.close()

    def _answer(self, message: Any, payload: memoryview) -> tuple[Any, Sequence[Any]]:
        try:
            return self._handler(message, payload)
        except Refused as refusal:
            return Failed(refusal.code, refusal.reason), ()
        except Unreachable as error:
            return Failed(Code.TIMED_OUT, str(error)), ()
        except Exception as error:
            log.exception("fs: %s failed", type(message).__name__)
            return Failed(Code.DISK, f"{type(error).__name__}: {error}"), ()

    def close(self) -> None:
        """Stop accepting and drop all connections."""
        self._closed = True
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for channel in list(self._channels):
            channel.close()


class Pool:
    """Connections to many servers, kept while idle."""

    def __init__(self, token: bytes) -> None:
        self._token, self._local = token, env.get("WHALEFALL_FS_LOCAL") != "0"
        any_message()
        self._idle: dict[tuple[str, int], list[Channel]] = {}
        self._mutex = threading.Lock()
        self._closed = False

    def call(
        self, address: tuple[str, int], message: Any, data: Any = b"", timeout_s: float = 5.0,
        into: Sequence[Any] | None = None,
    ) -> tuple[Any, memoryview]:  # fmt: skip
        """One call.

        Args:
            into: buffers that the reply's data fills in order, as its `results` say.
        Raises: Unreachable if no answer came in time: the call may have run.
        """
        return self.finish(address, self.begin(address, message, data, timeout_s), into)

    def begin(
        self, address: tuple[str, int], message: Any, data: Any = b"", timeout_s: float = 5.0,
        after: Channel | None = None,
    ) -> Channel:  # fmt: skip
        """Send one call; hand what this returns to `finish`, in any order.

        Args:
            data: a buffer, or a list of buffers.
            after: a begun call's channel: this one goes behind it there, and is answered after it.
        Raises: Unreachable.
        """
        channel = after
        if channel is None:
            with self._mutex:
                idle = self._idle.setdefault(address, [])
                channel = idle.pop() if idle else None
        try:
            channel = channel or connect(*address, self._token, timeout_s, LIMITS, self._local)
            channel.bound_waits(max(timeout_s, 0.001))
            buffers = data if isinstance(data, list) else [data] if len(data) else []
            channel.send(message, *buffers)
        except (OSError, WhalefallError) as error:
            raise self._broken(address, channel, error) from None
        return channel

    def finish(
        self, address: tuple[str, int], channel: Channel, into: Sequence[Any] | None = None,
        last: bool = True,
    ) -> tuple[Any, memoryview]:  # fmt: skip
        """Wait for the answer to a call that was begun.

        Args:
            last: no other call waits on this channel.
        Raises: Unreachable if none came in time: the call may have run.
        """
        try:
            answer = receive(channel, into)
        except (OSError, WhalefallError) as error:
            raise self._broken(address, channel, error) from None
        if not last:
            return answer
        with self._mutex:
            if not self._closed:
                self._idle.setdefault(address, []).append(channel)
                return answer
        channel.close()
        return answer

    def _broken(
        self, address: tuple[str, int], channel: Channel | None, error: Exception
    ) -> Unreachable:
        if channel is not None:
            channel.close()
        self.forget(address)
        why = "no answer in time" if isinstance(error, BlockingIOError) else error
        return Unreachable(f"{address[0]}:{address[1]}: {why}")

    def after_fork(self) -> None:
        """In a forked child: let go of the parent's connections, which go on for the parent."""
        self._mutex = threading.Lock()
        for channels in self._idle.values():
            for channel in channels:
                channel.socket.close()  # the descriptor alone: a shutdown would be the parent's
        self._idle = {}

    def forget(self, address: tuple[str, int]) -> None:
        """Drop the idle connections to an address."""
        with self._mutex:
            channels = self._idle.pop(address, [])
        for channel in channels:
            channel.close()

    def close(self) -> None:
        """Drop all connections, those at work once they are done."""
        self._closed = True
        for address in list(self._idle):
            self.forget(address)

    def __del__(self) -> None:
        if hasattr(self, "_closed"):  # made whole
            self.close()


class Memory:
    """Memory that one connection's payloads come into, one after another; it begins at a page."""

    def __init__(self) -> None:
        self._kept: mmap.mmap | None = None

    def take(self, count: int) -> memoryview:
        """`count` bytes, good until the next `take`; those of large payloads are not kept."""
        if not count:
            return memoryview(bytearray())
        if count > KEPT_BYTES:
            return memoryview(mmap.mmap(-1, count))
        if self._kept is None or len(self._kept) < count:
            self._kept = mmap.mmap(-1, 1 << max(count - 1, 4095).bit_length())
        return memoryview(self._kept)[:count]


def receive(
    channel: Channel, into: Sequence[Any] | None = None, memory: Memory | None = None
) -> tuple[Any, memoryview]:
    """One message and its payload, which goes into buffers as the message's `results` say.

    Args:
        memory: for a payload that has no buffers; default: new memory.
    Raises: CommError, LimitError for what is no message of ours.
    """
    header_bytes, payload_bytes = lengths(channel.recv_exactly(PREFIX.size), LIMITS)
    try:
        message = any_message().decode(channel.recv_exactly(header_bytes))
    except msgspec.MsgspecError as error:
        raise CommError(f"fs: not one of our messages: {error}") from None
    results = getattr(message, "results", None)
    if into is None or results is None:
        data = memory.take(payload_bytes) if memory else memoryview(bytearray(payload_bytes))
        channel.recv_into(data)
        return message, data
    views = [memoryview(b)[: r[1]] for b, r in zip(into, results, strict=True) if r[1]]
    receive_into(channel, views)
    return message, memoryview(b"")


def receive_into(channel: Channel, views: list[memoryview]) -> None:
    """Fill several buffers in order with the next bytes of the stream."""
    while views:
        got, *_ = channel.socket.recvmsg_into(views[:512])
        if not got:
            raise ConnectionError("the stream ended too early")
        while views and got >= views[0].nbytes:
            got -= views.pop(0).nbytes
        if got:
            views[0] = views[0][got:]
