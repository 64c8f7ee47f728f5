"""Comm room: bulk data over a blocking socket, straight between the caller's memory and the kernel.

`Channel` is for one sender thread and one receiver thread. No copy is made on either side: sendmsg
gathers from the caller's buffers, recv_into fills the caller's.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

from whalefall.comm import tokens
from whalefall.comm.frames import PREFIX, Buffer, CommError, Limits, decode, encode, lengths, nbytes

__all__ = ["Channel", "accept", "admit", "connect", "listen", "listen_local"]
H = TypeVar("H")
SOCKET_BUFFER_BYTES = 4 << 20
MAX_PIECES = 512  # of one sendmsg; Linux allows 1024
_TIMEVAL = struct.Struct("@ll")
_UCRED = struct.Struct("@iII")  # process, user, group


class Channel:
    """Frames over one connected stream socket; `connect` and `listen` make authenticated ones.

    Args:
        sock: connected, blocking; the channel owns it from now on.
        limits: what is refused on receipt, before memory is taken.
    """

    def __init__(self, sock: socket.socket, limits: Limits = Limits()) -> None:
        self.socket = sock
        self.limits = limits
        self.bytes_sent = 0
        self.bytes_received = 0
        self._bound_s: float | None = None

    def send(self, header: Any, *payload: Buffer) -> None:
        """Send one frame whose payload is the given buffers in order, without copying them.

        Raises: CommError if the other side is gone; TimeoutError after the socket's timeout.
        """
        self.send_raw(encode(header, nbytes(payload)), *payload)

    def send_raw(self, *buffers: Buffer) -> None:
        """Send buffers as they are (a frame made with `encode`, or the rest of its payload)."""
        views = [v for b in buffers if (v := memoryview(b).cast("B")).nbytes]
        self.bytes_sent += sum(v.nbytes for v in views)
        try:
            while views:
                sent = self.socket.sendmsg(views[:MAX_PIECES])
                while views and sent >= views[0].nbytes:
                    sent -= views.pop(0).nbytes
                if sent:
                    views[0] = views[0][sent:]
        except (ConnectionError, BrokenPipeError) as error:
            raise CommError(
                f"comm: {self}: the other side is gone while sending: {error}"
            ) from None

    def recv(
        self, kind: type[H], into: Callable[[H, int], Buffer] | None = None
    ) -> tuple[H, memoryview]:
        """Receive one frame.

        Args:
            kind: the header's type; its fields are checked.
            into: given the header and the payload's length, returns the writable buffer of just
                that length to fill; default: a new bytearray.
        Returns: header, payload.
        Raises: CommError at the end of the stream or for a frame that makes no sense; LimitError
            for one above the limits; TimeoutError after the socket's timeout.
        """
        header_bytes, payload_bytes = lengths(self.recv_exactly(PREFIX.size), self.limits)
        header = decode(self.recv_exactly(header_bytes), kind)
        target = memoryview(into(header, payload_bytes) if into else bytearray(payload_bytes))
        target = target.cast("B")
        if target.nbytes != payload_bytes:
            raise CommError(
                f"comm: {self}: a payload of {payload_bytes} bytes for a buffer of {target.nbytes}"
            )
        self.recv_into(target)
        return header, target

    def recv_exactly(self, count: int) -> bytearray:
        """The next `count` bytes."""
        data = bytearray(count)
        self.recv_into(data)
        return data

    def recv_into(self, buffer: Buffer) -> None:
        """Fill `buffer` with the next bytes of the stream."""
        view = memoryview(buffer).cast("B")
        self.bytes_received += view.nbytes
        while view.nbytes:
            try:
                got = self.socket.recv_into(view)
            except ConnectionError as error:
                raise CommError(f"comm: {self}: the other side is gone: {error}") from None
            if not got:
                raise CommError(f"comm: {self}: the stream ended, {view.nbytes} bytes too early")
            view = view[got:]

    def settimeout(self, timeout_s: float | None) -> None:
        """How long a single wait of the socket may last; None: for ever."""
        self.socket.settimeout(timeout_s)

    def bound_waits(self, timeout_s: float) -> None:
        """As `settimeout`, but kept by the kernel: no poll before each send and receive.

        A wait that lasts longer raises BlockingIOError.
        """
        if timeout_s != self._bound_s:
            self.socket.settimeout(None)
            timeval = _TIMEVAL.pack(int(timeout_s), int(timeout_s % 1 * 1e6))
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                self.socket.setsockopt(socket.SOL_SOCKET, option, timeval)
            self._bound_s = timeout_s

    def fileno(self) -> int:
        """The socket's descriptor, for select."""
        return self.socket.fileno()

    def close(self) -> None:
        """Close the connection; safe to repeat, and wakes a thread blocked in it."""
        with contextlib.suppress(OSError):  # never connected, or the other side was faster
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()

    def __enter__(self) -> Channel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def __str__(self) -> str:
        try:
            return f"channel to {self.socket.getpeername()}"
        except OSError:
            return "channel (closed)"


def tune(sock: socket.socket) -> None:
    """Large buffers; for TCP no delay."""
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)


def connect(
    host: str,
    port: int,
    token: bytes,
    timeout_s: float = 10.0,
    limits: Limits = Limits(),
    local: bool = False,
) -> Channel:
    """Open an authenticated channel to a `listen`er; its socket is left without a timeout.

    Args:
        token: the shared secret (`new_token`).
        timeout_s: for connecting and for the proof, together at most twice that.
        local: by way of the listener's `listen_local` socket, if it is on this host, has one, and
            belongs to this process's user or root.
    Raises: OSError where nobody answers, or no longer (CommError); AuthError if either side does
        not know the token.
    """
    if local:
        # Nobody there, or somebody who took the name: a stranger, one who is silent or knows no
        # token. A frozen listener is waited for no longer than over TCP alone.
        began_s = time.monotonic()
        with contextlib.suppress(OSError):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.settimeout(timeout_s / 2)
            return _proved(sock, _local_name(host, port), token, limits)
        timeout_s = max(timeout_s / 2, timeout_s - (time.monotonic() - began_s))
    sock = socket.create_connection((host, port), timeout=timeout_s)
    return _proved(sock, None, token, limits)


def _proved(sock: socket.socket, name: str | None, token: bytes, limits: Limits) -> Channel:
    """A channel over a connected socket, or one to be connected to `name`, once both proved."""
    channel = Channel(sock, limits)
    try:
        if name is not None:
            sock.connect(name)
            owner = _owner(sock)
            if owner not in (0, os.geteuid()):
                raise tokens.AuthError(f"comm: {name!r} belongs to user {owner}, not to us")
        tune(sock)
        tokens.prove_client(channel, token)
        sock.settimeout(None)
    except BaseException:
        channel.close()
        raise
    return channel


def _owner(sock: socket.socket) -> int:
    """The user whose process listens at the other end of a Unix socket."""
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return int(_UCRED.unpack(data)[1])


def _local_name(host: str, port: int) -> str:
    # Abstract: of this host's network namespace, gone with its process.
    return f"\0whalefall-{host}-{port}"


def listen_local(host: str, port: int, backlog: int = 128) -> socket.socket:
    """A second listening socket, for processes of this host: a Unix one, which copies less.

    Args:
        host, port: where the first one (`listen`) is known to be.
    Raises: OSError(EADDRINUSE) if somebody has taken the name.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(_local_name(host, port))
        sock.listen(backlog)
    except OSError:
        sock.close()
        raise
    return sock


def listen(host: str = "127.0.0.1", port: int = 0, backlog: int = 128) -> socket.socket:
    """A listening TCP socket (port 0: any free one); hand what it accepts to `accept`."""
    sock = socket.create_server((host, port), backlog=backlog)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)
    return sock


def accept(
    listener: socket.socket,
    token: bytes,
    timeout_s: float = 10.0,
    limits: Limits = Limits(),
) -> Channel:
    """The next connection of `listener`, once it has proved the token.

    Raises: AuthError, CommError (the connection is closed then; call again), TimeoutError.
    """
    return admit(listener.accept()[0], token, timeout_s, limits)


def admit(
    sock: socket.socket, token: bytes, timeout_s: float = 10.0, limits: Limits = Limits()
) -> Channel:
    """A channel over a connection that a listener has accepted, once it has proved the token.

    Raises: AuthError, CommError, TimeoutError; the connection is closed then.
    """
    channel = Channel(sock, limits)
    try:
        tune(sock)
        sock.settimeout(timeout_s)
        tokens.prove_server(channel, token)
        sock.settimeout(None)
    except BaseException:
        channel.close()
        raise
    return channel
