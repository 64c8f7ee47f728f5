"""File-system room: CRAQ — an update travels down the chain, its commit travels back up.

In: updates and reads of chunks. Out: answers, after the effects that make them true.
A read anywhere returns committed content only; where a write is under way the tail is asked.
Every update runs exactly once: its tag is stored with the data on each replica.
Source: CRAQ (Terrace & Freedman 2009); 3FS's write path; the deviations are in docs/fs.md.
"""

from __future__ import annotations

import contextlib
from typing import Any

from whalefall.fs.core.chains import Local, Member, Public
from whalefall.fs.core.effects import (
    Abort,
    Acquire,
    Call,
    Commit,
    Load,
    Procedure,
    Refused,
    Sleep,
    Store,
    Unreachable,
)
from whalefall.fs.core.messages import (
    ChunkMeta,
    Code,
    Distrust,
    Kind,
    Query,
    QueryDone,
    Read,
    Remembered,
    Update,
    UpdateDone,
)
from whalefall.fs.core.replica import Entry, StorageNode, Target

__all__ = ["force_commit", "leftovers", "query", "readable", "settle", "update", "visible"]


def update(node: StorageNode, message: Update, data: Any) -> Procedure[UpdateDone]:
    """Run one update on this replica and all after it.

    Raises: Refused.
    """
    target, _, _ = node.admit(message.target, message.chain_version)
    key = None
    if message.tag is not None:
        key = (message.tag.client, message.tag.channel)
        if key in target.busy:
            raise Refused(Code.CHANNEL_BUSY, f"channel {message.tag.channel} is at work here")
        remembered = node.recall(target, message)
        if remembered is not None:
            return _done(remembered)
        target.busy.add(key)
    elif message.order is None:
        raise Refused(Code.PROTOCOL, "an update without a tag")
    target.inflight += 1
    try:
        yield Acquire(target.target, message.chunk)
        try:
            return (yield from _locked(node, target, message, data))
        finally:
            target.locks.release(message.chunk)
    finally:
        target.inflight -= 1
        if key is not None:
            target.busy.discard(key)


def _locked(node: StorageNode, target: Target, message: Update, data: Any) -> Procedure[UpdateDone]:
    # The wait for the lock may have been long: the chain may be another, the work done.
    node.admit(message.target, message.chain_version)
    if message.tag is not None:
        remembered = node.recall(target, message)
        if remembered is not None:
            return _done(remembered)
    if message.order is None:
        return (yield from _as_head(node, target, message, data))
    return (yield from _as_follower(node, target, message, data))


def _as_head(
    node: StorageNode, target: Target, message: Update, data: Any
) -> Procedure[UpdateDone]:
    chain, member = node.place(target)
    if chain.members[0] != member or member.public is not Public.SERVING:
        raise Refused(Code.ROUTING_MISMATCH, f"target {target.target} is not the head")
    entry = target.store.entry(message.chunk)
    pending = entry.pending if entry else None
    if pending is not None and pending.tag != message.tag:
        # Whoever wrote it gave up, but a replica after us may have committed it: finish it first.
        yield from _finish(node, target, message.chunk, pending)
        pending = None
    if pending is not None:
        try:
            return (yield from _finish(node, target, message.chunk, pending))
        except Refused as refusal:
            raise _unless(pending, refusal) from None
    entry = target.store.entry(message.chunk)
    version = (entry.committed.version if entry and entry.committed else 0) + 1
    return (yield from _apply(node, target, message, data, version))


def _as_follower(
    node: StorageNode, target: Target, message: Update, data: Any
) -> Procedure[UpdateDone]:
    _, member = node.place(target)
    if message.sync != (member.public is Public.SYNCING):
        raise Refused(Code.ROUTING_MISMATCH, f"target {target.target} is {member.public.name}")
    assert message.order is not None
    # Once each: a copy of a packet that was refused for want of space may not run after all.
    if target.orders.get(message.chunk, (0, 0, 0)) >= message.order:
        raise Refused(Code.STALE_REQUEST, "this packet or a later one for this chunk came first")
    target.orders[message.chunk] = message.order
    if not message.sync:
        entry = target.store.entry(message.chunk)
        committed = entry.committed if entry else None
        version = committed.version if committed else 0
        if committed is None and message.kind is Kind.REMOVE:
            # Of what is not here: on record here and after all the same, so that no retry, under
            # another head, removes what is written until then.
            return (yield from _apply(node, target, message, data, message.version))
        if committed is not None and message.version == version:
            return _done(committed)
        if message.version <= version:
            raise Refused(Code.VERSION_CONFLICT, f"at version {version}, got {message.version}")
        if message.version > version + 1:
            raise Refused(Code.MISSING_UPDATE, f"at version {version}, got {message.version}")
    return (yield from _apply(node, target, message, data, message.version))


def _apply(
    node: StorageNode, target: Target, message: Update, data: Any, version: int
) -> Procedure[UpdateDone]:
    chunk = message.chunk
    chain, _ = node.place(target)
    entry = target.store.entry(chunk)
    # An earlier try left it: replicas after us, or that were after us, may have it.
    left = entry.pending if entry else None
    marked = target.tail_marks.pop(chunk, None)
    if node.is_read_tail(target) and (left is None or marked == chain.version):
        target.tail_marks[chunk] = chain.version
    try:
        pending = yield Store(target.target, message, data, version, chain.version)
    except Refused as refusal:
        raise _unless(left, refusal) from None
    if message.expected not in (-1, pending.checksum):
        # Nobody may read it, nor recovery find it and pass it on: whichever of the two is wrong.
        yield Abort(target.target, chunk)
        raise Refused(
            Code.MISMATCH, f"checksum {pending.checksum:08x} here, {message.expected:08x} before"
        )
    try:
        chain_version = yield from _forward(node, target, message, data, pending)
    except Refused as refusal:
        if refusal.code is Code.NO_SPACE and left is None:
            # An explicit no: nothing after us has it, nor will have.
            yield Abort(target.target, chunk)
        raise _unless(left, refusal) from None
    return (yield from _commit(target, message, pending, message.stamp or chain_version))


def _unless(left: ChunkMeta | None, refusal: Refused) -> Refused:
    """A full disk is no explicit no where an earlier try has left something: that may be used."""
    if left is None or refusal.code is not Code.NO_SPACE:
        return refusal
    return Refused(Code.NOT_READY, f"{refusal.reason}; an earlier try may be further on")


def _commit(
    target: Target, message: Update, pending: ChunkMeta, chain_version: int
) -> Procedure[UpdateDone]:
    yield Commit(target.target, message.chunk, chain_version, message.tag)
    target.tail_marks.pop(message.chunk, None)
    return UpdateDone(pending.version, chain_version, pending.length, pending.checksum)


def _finish(
    node: StorageNode, target: Target, chunk: bytes, pending: ChunkMeta
) -> Procedure[UpdateDone]:
    """Forward and commit a pending that an earlier operation left (under the chunk's lock)."""
    data = b"" if pending.removed else (yield Load(target.target, chunk, pending=True))
    message = Update(
        target.target, 0, chunk, Kind.REMOVE if pending.removed else Kind.REPLACE, 0,
        pending.length, 0, pending.tag, pending.version,
    )  # fmt: skip
    chain_version = yield from _forward(node, target, message, data, pending)
    return (yield from _commit(target, message, pending, chain_version))


def _forward(
    node: StorageNode, target: Target, message: Update, data: Any, pending: ChunkMeta
) -> Procedure[int]:
    """Pass an update on until the successor has it; returns the chain version to commit under."""
    end_s = node.clock() + node.limits.forward_s
    last, tried = "nothing was tried", None
    while True:
        chain, _ = node.place(target)
        successor = chain.successor(target.target)
        if successor is None:
            return chain.version
        content, kind = data, message.kind
        if successor.public is Public.SYNCING and kind is not Kind.REMOVE:
            # It may lack what a partial write builds on.
            kind, content = Kind.REPLACE, (yield Load(target.target, message.chunk, pending=True))
        packet = Update(
            successor.target, chain.version, message.chunk, kind, message.offset,
            pending.length if kind is Kind.REPLACE else message.length, message.size, message.tag,
            pending.version, node.next_order(), successor.public is Public.SYNCING,
            checksum=pending.checksum if kind is Kind.REPLACE else message.checksum,
            expected=pending.checksum,
        )  # fmt: skip
        place = (successor.target, chain.version)
        try:
            answer, _ = yield Call(successor.node, packet, content, node.limits.call_s)
        except Unreachable as error:
            last = f"target {successor.target} on node {successor.node}: no answer ({error})"
        else:
            if isinstance(answer, UpdateDone):
                verdict = _compare(node, target, pending, answer)
                if verdict is None:
                    return answer.chain_version
                last = verdict
            elif answer.code is Code.NO_SPACE and tried in (None, place):
                raise Refused(Code.NO_SPACE, answer.reason)
            else:
                last = f"target {successor.target}: {answer.code.name}, {answer.reason}"
                if answer.code is Code.MISMATCH:
                    yield from _distrust(node, target, message.chunk, pending, packet, successor)
        # Whoever was asked first may have it, whatever another says now.
        tried = tried or place
        if node.clock() >= end_s:
            raise Refused(Code.TIMED_OUT, f"after {node.limits.forward_s} s; last: {last}")
        yield Sleep(node.limits.pause_s)


def _distrust(
    node: StorageNode, target: Target, chunk: bytes, pending: ChunkMeta, packet: Update,
    successor: Member,
) -> Procedure[None]:  # fmt: skip
    """The successor made other content of the same update: if ours checks, it must be refilled."""
    if not pending.removed:
        yield Load(target.target, chunk, pending=True)  # raises CORRUPT if ours is the bad one
    message = Distrust(successor.target, packet.chain_version)
    with contextlib.suppress(Unreachable):
        yield Call(successor.node, message, b"", node.limits.call_s)


def _compare(
    node: StorageNode, target: Target, pending: ChunkMeta, answer: UpdateDone
) -> str | None:
    """Why the successor's answer does not let us commit, or None."""
    chain, _ = node.place(target)
    if answer.chain_version > chain.version:
        return f"successor is at chain version {answer.chain_version}, we at {chain.version}"
    theirs = (answer.version, answer.length, answer.checksum)
    ours = (pending.version, pending.length, pending.checksum)
    if theirs != ours:
        return f"(version, length, checksum) is {theirs} there and {ours} here"
    return None


def _done(meta: Remembered | ChunkMeta) -> UpdateDone:
    return UpdateDone(meta.version, meta.chain_version, meta.length, meta.checksum)


# ---- what an earlier life left behind


def settle(node: StorageNode, target: Target, chunk: bytes) -> Procedure[None]:
    """Finish the pending of a chunk, if nobody else is at it."""
    target.inflight += 1
    try:
        yield Acquire(target.target, chunk)
        try:
            entry = target.store.entry(chunk)
            if entry is not None and entry.pending is not None:
                yield from _finish(node, target, chunk, entry.pending)
        finally:
            target.locks.release(chunk)
    finally:
        target.inflight -= 1


def force_commit(node: StorageNode, target: Target) -> Procedure[None]:
    """Commit all that is pending on the one that served last; only then does it serve again."""
    for chunk in target.store.pendings():
        yield from settle(node, target, chunk)
    target.settling = False


def leftovers(node: StorageNode, target: Target) -> list[bytes]:
    """Chunks with a pending that no running operation will commit, on a head."""
    chain = node.routing.chain_of(target.target)
    if chain is None or not chain.members or chain.members[0].target != target.target:
        return []
    if target.local is not Local.UPTODATE or target.settling:
        return []
    return [chunk for chunk in target.store.pendings() if chunk not in target.locks]


# ---- reads


def readable(node: StorageNode, message: Read | Query) -> Target:
    """The target, if it may answer reads under this chain version.

    Raises: Refused.
    """
    target, _, member = node.admit(message.target, message.chain_version)
    if target.local is not Local.UPTODATE or member.public is not Public.SERVING:
        raise Refused(Code.TARGET_OFFLINE, f"target {target.target} is {member.public.name}")
    if isinstance(message, Read) and message.at_tail and not node.is_read_tail(target):
        raise Refused(Code.ROUTING_MISMATCH, f"target {target.target} is not the tail")
    return target


def visible(
    node: StorageNode, target: Target, message: Read, chunk: bytes
) -> tuple[Code, Entry | None]:
    """What a read of a chunk may see on this replica now: an entry's committed content."""
    entry = target.store.entry(chunk)
    if entry is None:
        return Code.NOT_FOUND, None
    if entry.pending is not None and not message.relaxed:
        if not message.at_tail and not node.is_read_tail(target):
            return Code.ASK_TAIL, None
        # An earlier tail may have committed it, unless it came when this one was the tail.
        if target.tail_marks.get(chunk) != target.chain_version:
            return Code.NOT_COMMITTED, None
    if entry.committed is None:
        return Code.NOT_FOUND, None
    return Code.OK, entry


def query(node: StorageNode, message: Query) -> QueryDone:
    """The last chunk under a prefix."""
    target = readable(node, message)
    chunk, length, count = target.store.last(message.prefix)
    return QueryDone(chunk, length, count)
