"""File-system room: what processes say to each other (msgspec structs; bulk data follows raw)."""

from __future__ import annotations

import enum
from typing import Any, TypeAlias

import msgspec

from whalefall.fs.core.chains import Chain, Local

__all__ = [
    "ChunkMeta", "Code", "Distrust", "Failed", "Heartbeat", "HeartbeatDone", "Inventory", "Kind",
    "Many", "ManyDone",
    "NodeInfo",
    "Query", "QueryDone", "Read", "ReadDone", "Remembered", "Routing", "SyncDone", "SyncStart",
    "SyncTags", "Tag", "TargetReport", "Update", "UpdateDone", "Wide", "Done",
]  # fmt: skip


class Code(enum.IntEnum):
    """Why a request was not done."""

    OK = 0
    ROUTING_MISMATCH = 1  # the chain's version differs: get new routing, try again
    TARGET_OFFLINE = 2
    NOT_READY = 3
    CHANNEL_BUSY = 4  # the same operation still runs here
    STALE_REQUEST = 5  # a late packet of an operation that was given up
    PROTOCOL = 6
    NOT_FOUND = 7
    ASK_TAIL = 8  # a write is under way: only the tail knows whether it is committed
    NOT_COMMITTED = 9
    VERSION_CONFLICT = 10
    MISSING_UPDATE = 11
    NO_SPACE = 12
    CORRUPT = 13
    TIMED_OUT = 14
    INVALID = 15
    NOT_PRIMARY = 16
    DISK = 17
    MISMATCH = 18  # this replica made other content of the same update


class Kind(enum.IntEnum):
    """What an update does to a chunk."""

    WRITE = 0
    TRUNCATE = 1  # set the length: cut, or fill with zeros; creates
    EXTEND = 2  # as TRUNCATE, but never shorter
    REMOVE = 3
    REPLACE = 4  # the whole content, as another replica has it


class Wide(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of every message: a tagged array on the wire."""


class Tag(msgspec.Struct, frozen=True, array_like=True):
    """Names one operation of one client, over all its retries.

    A channel carries one operation at a time, with growing seq: so the last one is enough to know.
    """

    client: str
    channel: int
    seq: int
    request: int


class ChunkMeta(msgspec.Struct, frozen=True, array_like=True):
    """A chunk's content as recorded: version, the chain version it was committed under, CRC32C."""

    version: int
    chain_version: int
    length: int
    checksum: int
    tag: Tag | None = None
    removed: bool = False


class Remembered(msgspec.Struct, frozen=True, array_like=True):
    """The last success on a channel, kept on disk with the data."""

    tag: Tag
    version: int
    chain_version: int
    length: int
    checksum: int


class Update(Wide, frozen=True):
    """Change a chunk. From a client: version 0, no order. Forwarded: both set.

    Attributes:
        order: (boot of the sender's node, counter): a later packet makes an earlier one invalid.
        sync: the receiver is being filled: take version and content as given.
        stamp: commit under this chain version (recovery keeps the one a chunk has).
        checksum: CRC-32C of the data, or -1.
        expected: CRC-32C that the sender's whole chunk has after this update, or -1.
    """

    target: int
    chain_version: int
    chunk: bytes
    kind: Kind
    offset: int
    length: int
    size: int
    tag: Tag | None
    version: int = 0
    order: tuple[int, int, int] | None = None
    sync: bool = False
    stamp: int = 0
    checksum: int = -1
    expected: int = -1


class UpdateDone(Wide, frozen=True):
    """The update is on this replica and all after it."""

    version: int
    chain_version: int
    length: int
    checksum: int


class Failed(Wide, frozen=True):
    """The request was not done."""

    code: Code
    reason: str


class Many(Wide, frozen=True):
    """Updates of different chunks, each on its own; their data follows in order, `sizes` bytes."""

    updates: list[Update]
    sizes: list[int]


class ManyDone(Wide, frozen=True):
    """What became of each update."""

    replies: list[UpdateDone | Failed]


class Done(Wide, frozen=True):
    """Done, with nothing more to say."""


class Read(Wide, frozen=True):
    """Read pieces of chunks: ios = [(chunk, offset, length)].

    Attributes:
        at_tail: sent to the tail because another replica saw a write under way.
        relaxed: the committed content will do, even if a newer one is being written.
    """

    target: int
    chain_version: int
    ios: list[tuple[bytes, int, int]]
    at_tail: bool = False
    relaxed: bool = False


class ReadDone(Wide, frozen=True):
    """Per piece: code, bytes, version; the bytes follow in order."""

    results: list[tuple[int, int, int]]


class Query(Wide, frozen=True):
    """The last chunk (by id) under a prefix, on the head of a chain."""

    target: int
    chain_version: int
    prefix: bytes


class QueryDone(Wide, frozen=True):
    """The last chunk and its length, or nothing; and how many chunks there are."""

    chunk: bytes | None
    length: int
    count: int


class SyncStart(Wide, frozen=True):
    """The predecessor begins to fill this target: say what you have."""

    target: int
    chain_version: int
    session: tuple[int, int, int]


class Inventory(Wide, frozen=True):
    """The answer to SyncStart; its payload is msgpack of [(chunk, committed, pending)]."""

    count: int


class SyncTags(Wide, frozen=True):
    """The operations that the predecessor remembers, as payload."""

    target: int
    chain_version: int
    session: tuple[int, int, int]


class SyncDone(Wide, frozen=True):
    """This target now has all there is."""

    target: int
    chain_version: int
    session: tuple[int, int, int]


class Distrust(Wide, frozen=True):
    """The predecessor, whose content checks, got another checksum from this target: be filled."""

    target: int
    chain_version: int


class NodeInfo(msgspec.Struct, frozen=True, array_like=True):
    """A storage or metadata server as the manager knows it."""

    node: int
    kind: str
    host: str
    port: int
    boot: int = 0


class Routing(Wide, frozen=True):
    """Who is where; versioned as a whole, each chain on its own."""

    version: int = 0
    nodes: dict[int, NodeInfo] = {}
    chains: dict[int, Chain] = {}
    tables: dict[int, tuple[int, ...]] = {}
    lease_s: float = 10.0
    drained: tuple[int, ...] = ()

    def chain_of(self, target: int) -> Chain | None:
        """The chain that has this target."""
        for chain in self.chains.values():
            if chain.member(target) is not None:
                return chain
        return None


class TargetReport(msgspec.Struct, frozen=True, array_like=True):
    """What a node says about one of its targets."""

    target: int
    local: Local
    chain_version: int
    used_bytes: int = 0
    free_bytes: int = 0
    chunks: int = 0
    bad_blocks: int = 0


class Heartbeat(Wide, frozen=True):
    """A node is alive; (boot, seq) only grows."""

    info: NodeInfo
    seq: int
    routing_version: int
    targets: tuple[TargetReport, ...] = ()


class HeartbeatDone(Wide, frozen=True):
    """Which targets' reports were believed, and the routing if the node's is old."""

    believed: tuple[int, ...]
    routing: Routing | None = None


Message: TypeAlias = Any
