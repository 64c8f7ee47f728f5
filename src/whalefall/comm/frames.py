"""Comm room: the frame — 16 bytes of prefix, a msgspec header, a raw payload.

    "WFv1" | header bytes, uint32 | payload bytes, uint64 | header (msgpack) | payload

Little-endian. Both lengths are checked against `Limits` before any memory is taken for them.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import msgspec

from whalefall.errors import LimitError, WhalefallError

__all__ = ["MAX_HEADER_BYTES", "MAX_PAYLOAD_BYTES", "PREFIX", "Buffer", "CommError", "Limits"]
__all__ += ["decode", "encode", "lengths", "nbytes"]

# Anything with the buffer protocol or `data_ptr` (typing has a name for it from Python 3.12 on).
Buffer: TypeAlias = Any
MAGIC = b"WFv1"
PREFIX = struct.Struct("<4sIQ")
MAX_HEADER_BYTES = 1 << 20
MAX_PAYLOAD_BYTES = 1 << 30
H = TypeVar("H")


class CommError(WhalefallError, ConnectionError):
    """The other side sent something that is no frame, or went away in the middle of one."""


@dataclass(frozen=True)
class Limits:
    """The largest header and payload that this side accepts, in bytes."""

    header_bytes: int = MAX_HEADER_BYTES
    payload_bytes: int = MAX_PAYLOAD_BYTES


def encode(header: Any, payload_bytes: int = 0) -> bytes:
    """Prefix and header of a frame; the caller sends `payload_bytes` of payload after them.

    Args:
        header: anything msgspec encodes (a Struct, a dict, a list, …).
        payload_bytes: length of the payload that follows.
    Returns: the bytes to send first.
    """
    body = msgspec.msgpack.encode(header)
    return PREFIX.pack(MAGIC, len(body), payload_bytes) + body


def lengths(prefix: Buffer, limits: Limits) -> tuple[int, int]:
    """Header and payload length of a frame from its 16 first bytes.

    Raises: CommError if this is no frame; LimitError if a length exceeds `limits`.
    """
    magic, header, payload = PREFIX.unpack(prefix)
    if magic != MAGIC:
        raise CommError(f"comm: got {magic!r} where a frame begins, wanted {MAGIC!r}; wrong port?")
    if header > limits.header_bytes:
        raise LimitError(f"comm: header of {header} bytes, wanted at most {limits.header_bytes}")
    if payload > limits.payload_bytes:
        raise LimitError(f"comm: payload of {payload} bytes, wanted at most {limits.payload_bytes}")
    return header, payload


_decoders: dict[Any, msgspec.msgpack.Decoder[Any]] = {}
_building = threading.Lock()


def _decoder(kind: type[H]) -> msgspec.msgpack.Decoder[H]:
    if kind not in _decoders:
        # msgspec was seen to crash where threads first read one type at the same time.
        with _building:
            _decoders.setdefault(kind, msgspec.msgpack.Decoder(kind))
    return _decoders[kind]


def decode(body: Buffer, kind: type[H]) -> H:
    """The header as a `kind` (a msgspec Struct, dict, …), its fields and types checked.

    Raises: CommError if it does not fit.
    """
    try:
        return _decoder(kind).decode(body)
    except msgspec.MsgspecError as error:
        raise CommError(f"comm: a header that is no {kind}: {error}") from None


def nbytes(buffers: Sequence[Buffer]) -> int:
    """Bytes in all the buffers together."""
    return sum(memoryview(b).nbytes for b in buffers)
