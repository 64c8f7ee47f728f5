"""Comm room: control messages over asyncio, small frames with a checked header.

Subclass `FrameProtocol`, give it to `loop.create_server` or `create_connection`, and override
`frame_received`; `send` writes a frame, `drained` tells a fast sender when to go on. It speaks the
same token proof and frames as `Channel`, so that either may sit at the other end. Not for bulk.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from typing import Any, cast

from whalefall.comm import tokens
from whalefall.comm.frames import PREFIX, Buffer, CommError, Limits, encode, lengths, nbytes
from whalefall.errors import WhalefallError

__all__ = ["FrameProtocol"]


class FrameProtocol(asyncio.Protocol):
    """One connection: proves the token, cuts the stream into frames, calls `frame_received`.

    Args:
        token: the shared secret.
        server: whether this is the accepting side.
        limits: what is refused, before memory is taken for it; the connection is closed then.
    Attributes:
        ready: a future that is done when both sides have proved the token (or failed).
        peer: the other end's address.
    """

    def __init__(self, token: bytes, server: bool, limits: Limits = Limits()) -> None:
        self.token, self.server, self.limits = token, server, limits
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport | None = None
        self.peer: Any = None
        self.failure: Exception | None = None
        self._buffer = bytearray()
        self._need = tokens.CLIENT_BYTES if server else len(tokens.HELLO) + tokens.NONCE_BYTES
        self._state = self._on_client_proof if server else self._on_hello
        self._nonces = (b"", b"")
        self._header_bytes = 0
        self._writable = asyncio.Event()
        self._writable.set()

    def frame_received(self, header: bytes, payload: bytes) -> None:
        """Called for each frame, in order; `decode(header, kind)` reads the header."""
        raise NotImplementedError

    def closed(self, error: Exception | None) -> None:
        """Called once at the end; `error` is None after a clean close between two frames."""

    def send(self, header: Any, *payload: Buffer) -> None:
        """Queue one frame; await `drained()` when sending much.

        Raises: CommError if the connection is not open.
        """
        if self.transport is None or self.transport.is_closing() or not self.ready.done():
            raise CommError(f"comm: connection to {self.peer} is not open")
        self.transport.writelines([encode(header, nbytes(payload)), *payload])

    async def drained(self) -> None:
        """Returns when the queue to the other side is short enough (or the connection ended)."""
        await self._writable.wait()

    def close(self) -> None:
        """Close after what is queued has been sent."""
        if self.transport is not None:
            self.transport.close()

    # ---- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.peer = transport.get_extra_info("peername")
        if self.server:
            mine = secrets.token_bytes(tokens.NONCE_BYTES)
            self._nonces = (mine, b"")
            self.transport.write(tokens.HELLO + mine)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        try:
            while len(self._buffer) >= self._need and self.failure is None:
                piece = bytes(memoryview(self._buffer)[: self._need])
                del self._buffer[: self._need]
                self._state(piece)
        except WhalefallError as error:
            self._fail(error)

    def connection_lost(self, exc: Exception | None) -> None:
        inside = self._state != self._on_prefix or bool(self._buffer)
        if self.failure is None and (exc is not None or inside):
            kind: type[WhalefallError] = CommError if self.ready.done() else tokens.AuthError
            self.failure = kind(f"comm: connection to {self.peer} ended early: {exc or 'closed'}")
        self._finish_ready(self.failure)
        self._writable.set()
        self.closed(self.failure)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # ---- states: each takes exactly self._need bytes

    def _on_hello(self, piece: bytes) -> None:
        if not piece.startswith(tokens.HELLO):
            raise tokens.AuthError(f"comm: got {piece[:8]!r} as greeting, wanted {tokens.HELLO!r}")
        theirs, mine = piece[len(tokens.HELLO) :], secrets.token_bytes(tokens.NONCE_BYTES)
        self._nonces = (theirs, mine)
        assert self.transport is not None
        self.transport.write(mine + tokens.client_proof(self.token, theirs, mine))
        self._state, self._need = self._on_server_proof, tokens.PROOF_BYTES

    def _on_client_proof(self, piece: bytes) -> None:
        assert self.transport is not None
        mine, theirs = self._nonces[0], piece[: tokens.NONCE_BYTES]
        wanted = tokens.client_proof(self.token, mine, theirs)
        if not hmac.compare_digest(piece[tokens.NONCE_BYTES :], wanted):
            self.transport.write(tokens.REFUSED)
            raise tokens.AuthError(f"comm: client {self.peer} does not know the token")
        self.transport.write(tokens.server_proof(self.token, mine, theirs))
        self._open()

    def _on_server_proof(self, piece: bytes) -> None:
        tokens.check_answer(piece, self.token, *self._nonces)
        self._open()

    def _open(self) -> None:
        self._state, self._need = self._on_prefix, PREFIX.size
        self._finish_ready(None)

    def _on_prefix(self, piece: bytes) -> None:
        self._header_bytes, payload_bytes = lengths(piece, self.limits)
        self._state, self._need = self._on_body, self._header_bytes + payload_bytes
        if not self._need:
            self._on_body(b"")

    def _on_body(self, piece: bytes) -> None:
        self._state, self._need = self._on_prefix, PREFIX.size
        self.frame_received(piece[: self._header_bytes], piece[self._header_bytes :])

    def _finish_ready(self, error: Exception | None) -> None:
        if self.ready.done():
            return
        if error is None:
            self.ready.set_result(None)
        else:
            self.ready.set_exception(error)
            self.ready.exception()  # seen: whoever awaits it still gets it

    def _fail(self, error: WhalefallError) -> None:
        self.failure = error
        self._finish_ready(error)
        if self.transport is not None:
            self.transport.abort()
