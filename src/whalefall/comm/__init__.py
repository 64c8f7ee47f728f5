"""Comm room: how bytes move between processes, on one host and between hosts.

Frames (`encode`, `Channel`, `FrameProtocol`): a length-prefixed msgspec header and a raw payload;
every size is checked before memory is taken for it. Control messages go through asyncio
(`FrameProtocol`), bulk data through blocking sockets (`Channel`, recv_into and sendmsg). Both
ends prove that they know a token (`tokens`). On one host: shared memory (`Region`, `sweep`) and
single-producer single-consumer rings in it (`Ring`). Checksums and row copies are native and
release the GIL.
"""

from whalefall.comm.channel import Channel, accept, connect, listen
from whalefall.comm.checksum import crc32, crc32c, crc32c_blocks, crc_combine
from whalefall.comm.control import FrameProtocol
from whalefall.comm.frames import (
    MAX_HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    CommError,
    Limits,
    decode,
    encode,
)
from whalefall.comm.region import Region, sweep
from whalefall.comm.ring import Ring
from whalefall.comm.rows import gather_rows, scatter_rows
from whalefall.comm.tokens import AuthError, new_token, read_token

__all__ = [
    "MAX_HEADER_BYTES",
    "MAX_PAYLOAD_BYTES",
    "AuthError",
    "Channel",
    "CommError",
    "FrameProtocol",
    "Limits",
    "Region",
    "Ring",
    "accept",
    "connect",
    "crc32",
    "crc32c",
    "crc32c_blocks",
    "crc_combine",
    "decode",
    "encode",
    "gather_rows",
    "listen",
    "new_token",
    "read_token",
    "scatter_rows",
    "sweep",
]
