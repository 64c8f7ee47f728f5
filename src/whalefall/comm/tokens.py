"""Comm room: both ends of a connection prove that they know one secret, which never travels.

    server → client   "WFauth1\0" + 32 random bytes s
    client → server   32 random bytes c + HMAC-SHA256(token, "client" + s + c)
    server → client   HMAC-SHA256(token, "server" + s + c), or REFUSED, and closes

The stream is not encrypted: between hosts use a private network.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
from pathlib import Path
from typing import Protocol

from whalefall.comm.frames import Buffer, CommError
from whalefall.errors import ConfigError, WhalefallError

__all__ = ["CLIENT_BYTES", "HELLO", "NONCE_BYTES", "PROOF_BYTES", "REFUSED", "AuthError"]
__all__ += ["check_answer", "client_proof", "new_token", "read_token", "server_proof"]

HELLO = b"WFauth1\0"
NONCE_BYTES = 32
PROOF_BYTES = 32
CLIENT_BYTES = NONCE_BYTES + PROOF_BYTES
REFUSED = b"WFrefused".ljust(PROOF_BYTES, b"\0")  # in place of the proof: a wrong token
MIN_TOKEN_BYTES = 16


class AuthError(WhalefallError, PermissionError):
    """The other side does not know the token, or is no whalefall process at all."""


class Stream(Protocol):
    """What a proof needs of a channel."""

    def send_raw(self, *buffers: Buffer) -> None: ...
    def recv_exactly(self, count: int) -> bytearray: ...


def new_token() -> bytes:
    """A new random secret of 64 hexadecimal characters."""
    return secrets.token_hex(32).encode()


def read_token(path: str | os.PathLike[str], create: bool = False) -> bytes:
    """The secret kept in a file that only its owner may read.

    Args:
        create: make the file with a new secret where there is none.
    Raises: ConfigError if others may read the file, or it is too short; FileNotFoundError.
    """
    path = Path(path)
    if create and not path.exists():
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(new_token())
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):  # the first of several creators wins
            os.link(temporary, path)
        temporary.unlink()
    if path.stat().st_mode & 0o077:
        raise ConfigError(f"comm: token file {path} can be read by others; chmod 600 {path}")
    token = path.read_bytes().strip()
    if len(token) < MIN_TOKEN_BYTES:
        raise ConfigError(
            f"comm: token in {path} has {len(token)} bytes, wanted at least {MIN_TOKEN_BYTES}"
        )
    return token


def client_proof(token: bytes, server_nonce: bytes, client_nonce: bytes) -> bytes:
    """What the connecting side must show."""
    return hmac.digest(token, b"client" + server_nonce + client_nonce, hashlib.sha256)


def server_proof(token: bytes, server_nonce: bytes, client_nonce: bytes) -> bytes:
    """What the accepting side must show."""
    return hmac.digest(token, b"server" + server_nonce + client_nonce, hashlib.sha256)


def prove_client(stream: Stream, token: bytes) -> None:
    """The connecting side's half.

    Raises: AuthError; CommError where the other side went away before it said yes or no.
    """
    hello = bytes(stream.recv_exactly(len(HELLO) + NONCE_BYTES))
    if not hello.startswith(HELLO):
        raise AuthError(f"comm: got {hello[:8]!r} as greeting, wanted {HELLO!r}; wrong port?")
    theirs, mine = hello[len(HELLO) :], secrets.token_bytes(NONCE_BYTES)
    stream.send_raw(mine + client_proof(token, theirs, mine))
    try:
        answer = bytes(stream.recv_exactly(PROOF_BYTES))
    except ConnectionError:
        raise CommError(
            f"comm: {stream}: closed before it answered our proof; is it gone?"
        ) from None
    check_answer(answer, token, theirs, mine)


def check_answer(answer: bytes, token: bytes, server_nonce: bytes, client_nonce: bytes) -> None:
    """Raise AuthError unless the accepting side knows the token and took ours."""
    if answer == REFUSED:
        raise AuthError("comm: the server refused our token; both sides need the same")
    if not hmac.compare_digest(answer, server_proof(token, server_nonce, client_nonce)):
        raise AuthError("comm: the server does not know our token; both sides need the same")


def prove_server(stream: Stream, token: bytes) -> None:
    """The accepting side's half.

    Raises: AuthError.
    """
    mine = secrets.token_bytes(NONCE_BYTES)
    stream.send_raw(HELLO + mine)
    answer = bytes(stream.recv_exactly(CLIENT_BYTES))
    theirs, proof = answer[:NONCE_BYTES], answer[NONCE_BYTES:]
    if not hmac.compare_digest(proof, client_proof(token, mine, theirs)):
        with contextlib.suppress(OSError):
            stream.send_raw(REFUSED)
        raise AuthError("comm: a client does not know the token; it was turned away")
    stream.send_raw(server_proof(token, mine, theirs))
