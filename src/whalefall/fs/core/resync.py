"""File-system room: recovery — a serving replica fills the one after it.

The predecessor compares inventories, then sends whole chunks, each under its lock, with their own
versions. Client writes meanwhile reach the target as whole chunks too (`craq.py`).
Source: 3FS resync. One rule replaces its table: whatever differs, or is being written when the
lists are made, is sent again as it is under the lock; sending too much is harmless.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import msgspec

from whalefall.fs.core.chains import Local, Public
from whalefall.fs.core.craq import _finish
from whalefall.fs.core.effects import (
    Acquire,
    Call,
    Forget,
    Load,
    Merge,
    Procedure,
    Refused,
    Together,
)
from whalefall.fs.core.messages import (
    ChunkMeta,
    Code,
    Done,
    Inventory,
    Kind,
    Remembered,
    SyncDone,
    SyncStart,
    SyncTags,
    Update,
    UpdateDone,
)
from whalefall.fs.core.replica import Entry, StorageNode, Target

__all__ = ["compare", "needs_sync", "resync", "sync_done", "sync_start", "sync_tags"]

Listed = dict[bytes, tuple[ChunkMeta | None, ChunkMeta | None]]
_LISTED = msgspec.msgpack.Decoder(Listed)
_TAGS = msgspec.msgpack.Decoder(list[Remembered])


def needs_sync(node: StorageNode, target: Target) -> bool:
    """Whether the one after `target` waits to be filled by it."""
    chain, _ = node.seat(target)
    successor = chain.successor(target.target) if chain is not None else None
    return (
        successor is not None
        and successor.public is Public.SYNCING
        and target.local is Local.UPTODATE
        and not target.settling
    )


def compare(local: Mapping[bytes, Entry], remote: Listed, busy: set[Hashable]) -> list[bytes]:
    """The chunks to send (or remove there), in order."""
    todo = []
    for chunk in sorted({*local, *remote}):
        mine = local.get(chunk)
        theirs, their_pending = remote.get(chunk, (None, None))
        unsettled = their_pending is not None or chunk in busy
        if unsettled or mine is None or mine.pending or not same(mine.committed, theirs):
            todo.append(chunk)
    return todo


def same(mine: ChunkMeta | None, theirs: ChunkMeta | None) -> bool:
    """Whether two replicas recorded the same content under the same versions."""
    if mine is None or theirs is None:
        return mine is theirs
    return (mine.version, mine.chain_version, mine.length, mine.checksum) == (
        theirs.version, theirs.chain_version, theirs.length, theirs.checksum,
    )  # fmt: skip


def resync(node: StorageNode, target: Target) -> Procedure[int]:
    """Fill the successor; returns how many chunks were sent.

    Raises: Refused, Unreachable: it is tried again later, from a new comparison.
    """
    chain, _ = node.place(target)
    successor = chain.successor(target.target)
    if successor is None or successor.public is not Public.SYNCING:
        return 0
    session, version, there = node.next_order(), chain.version, successor.target
    target.inflight += 1
    try:
        answer, payload = yield from _ask(
            node, successor.node, SyncStart(there, version, session), b"", 4
        )
        assert isinstance(answer, Inventory)
        remote = _LISTED.decode(payload)
        todo = compare(target.store.entries(), remote, target.locks.held())
        at_once = node.limits.resync_chunks
        for at in range(0, len(todo), at_once):
            sent = yield Together(tuple(
                _send_chunk(node, target, version, chunk) for chunk in todo[at : at + at_once]
            ))  # fmt: skip
            for outcome in sent:
                if isinstance(outcome, Exception):
                    raise outcome
        tags = msgspec.msgpack.encode(target.store.tags())
        yield from _ask(node, successor.node, SyncTags(there, version, session), tags, 4)
        yield from _ask(node, successor.node, SyncDone(there, version, session), b"", 1)
    finally:
        target.inflight -= 1
    return len(todo)


def _ask(node: StorageNode, to: int, message: object, data: bytes, patience: int):  # type: ignore[no-untyped-def]
    answer, payload = yield Call(to, message, data, patience * node.limits.call_s)
    if not isinstance(answer, (Inventory, Done, UpdateDone)):
        raise Refused(answer.code, answer.reason)
    return answer, payload


def _send_chunk(node: StorageNode, target: Target, version: int, chunk: bytes) -> Procedure[None]:
    yield Acquire(target.target, chunk)
    try:
        chain, _ = node.place(target)
        successor = chain.successor(target.target)
        if chain.version != version or successor is None:
            raise Refused(Code.ROUTING_MISMATCH, "the chain changed")
        # As it is now: it may have been written, removed or made again since the lists.
        entry = target.store.entry(chunk)
        if entry is not None and entry.pending is not None:
            yield from _finish(node, target, chunk, entry.pending)
            entry = target.store.entry(chunk)
        committed = entry.committed if entry else None
        data = (yield Load(target.target, chunk, pending=False)) if committed else b""
        # Other bytes than these must not become a replica's content, with a checksum to match.
        checksum = committed.checksum if committed else -1
        packet = Update(
            successor.target, version, chunk, Kind.REPLACE if committed else Kind.REMOVE, 0,
            committed.length if committed else 0, 0, None, committed.version if committed else 0,
            node.next_order(), True, committed.chain_version if committed else 0,
            checksum, checksum,
        )  # fmt: skip
        yield from _ask(node, successor.node, packet, data, 4)
    finally:
        target.locks.release(chunk)


# ---- the side that is filled


def _syncing(node: StorageNode, number: int, version: int) -> Target:
    target, _, member = node.admit(number, version)
    if member.public is not Public.SYNCING:
        raise Refused(Code.ROUTING_MISMATCH, f"target {number} is {member.public.name}")
    return target


def sync_start(node: StorageNode, message: SyncStart) -> Procedure[tuple[Inventory, bytes]]:
    """Begin to be filled: all that is here, pendings too; what was remembered is forgotten.

    An operation that ran here and was lost with those that served on is another operation when it
    is tried again. What the predecessor remembers comes before this target serves.
    """
    target = _syncing(node, message.target, message.chain_version)
    if target.local is not Local.ONLINE:
        raise Refused(Code.NOT_READY, f"target {message.target} is {target.local.name} here")
    before = target.session
    if before is not None and before[0] == message.session[0] and before >= message.session:
        raise Refused(Code.STALE_REQUEST, "this recovery, or a later one, began before")
    target.session = message.session
    yield Forget(target.target)
    listed = {chunk: (e.committed, e.pending) for chunk, e in target.store.entries().items()}
    return Inventory(len(listed)), msgspec.msgpack.encode(listed)


def sync_tags(node: StorageNode, message: SyncTags, payload: bytes) -> Procedure[Done]:
    """Remember what the predecessor remembers, so that a retry is known here too."""
    target = _syncing(node, message.target, message.chain_version)
    yield Merge(target.target, _TAGS.decode(payload))
    return Done()


def sync_done(node: StorageNode, message: SyncDone) -> Done:
    """All is here: say so to the manager."""
    target = _syncing(node, message.target, message.chain_version)
    if target.session != message.session:
        raise Refused(Code.STALE_REQUEST, "another recovery began since")
    target.local = Local.UPTODATE
    node.report_now = True
    return Done()
