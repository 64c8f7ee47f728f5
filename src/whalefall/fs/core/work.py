"""File-system room: what a storage node does with a message, and what it does unasked.

In: a message, or the time. Out: procedures for whoever drives them — a server's threads, or the
simulator. Reads are the driver's own, since their data goes straight from disk to socket.
"""

from __future__ import annotations

import itertools
from typing import Any

from whalefall.fs.core import craq, resync
from whalefall.fs.core.chains import Local
from whalefall.fs.core.effects import Procedure, Refused, Together
from whalefall.fs.core.messages import (
    Code,
    Distrust,
    Done,
    Failed,
    Many,
    ManyDone,
    Query,
    SyncDone,
    SyncStart,
    SyncTags,
    Update,
    UpdateDone,
)
from whalefall.fs.core.replica import StorageNode, Target

__all__ = ["background", "handle"]

SETTLED_AT_ONCE = 16
MAX_TOGETHER = 64


def handle(node: StorageNode, message: Any, data: Any) -> Procedure[tuple[Any, bytes]]:
    """Answer one message: (reply, payload).

    Raises: Refused.
    """
    if isinstance(message, Update):
        return (yield from craq.update(node, message, data)), b""
    if isinstance(message, Many):
        return (yield from _update_many(node, message, memoryview(data))), b""
    if isinstance(message, Query):
        return craq.query(node, message), b""
    if isinstance(message, SyncStart):
        return (yield from resync.sync_start(node, message))
    if isinstance(message, SyncTags):
        return (yield from resync.sync_tags(node, message, bytes(data))), b""
    if isinstance(message, SyncDone):
        return resync.sync_done(node, message), b""
    if isinstance(message, Distrust):
        target, _, _ = node.admit(message.target, message.chain_version)
        node.drop(target)
        return Done(), b""
    raise Refused(Code.PROTOCOL, f"a storage node does not take {type(message).__name__}")


def _update_many(node: StorageNode, message: Many, data: memoryview) -> Procedure[ManyDone]:
    places = {(update.target, update.chunk) for update in message.updates}
    if len(places) != len(message.updates) or len(places) > MAX_TOGETHER:
        raise Refused(
            Code.PROTOCOL,
            f"{len(message.updates)} updates of {len(places)} chunks; wanted one a chunk, at most "
            f"{MAX_TOGETHER}",
        )
    ends = list(itertools.accumulate(message.sizes, initial=0))
    if len(message.sizes) != len(places) or min(message.sizes) < 0 or ends[-1] != data.nbytes:
        raise Refused(
            Code.PROTOCOL, f"sizes {message.sizes} of {len(places)} updates, {data.nbytes} bytes"
        )
    outcomes = yield Together(tuple(
        craq.update(node, update, data[begin:end])
        for update, begin, end in zip(message.updates, ends, ends[1:], strict=False)
    ))  # fmt: skip
    return ManyDone([_reply(outcome) for outcome in outcomes])


def _reply(outcome: Any) -> UpdateDone | Failed:
    if isinstance(outcome, Refused):
        return Failed(outcome.code, outcome.reason)
    if isinstance(outcome, Exception):
        return Failed(Code.TIMED_OUT, str(outcome))
    return outcome  # type: ignore[no-any-return]


def background(node: StorageNode, target: Target) -> list[tuple[str, Procedure[Any]]]:
    """What this target should be busy with now, by name; the driver runs each name once."""
    if target.settling and target.local is Local.UPTODATE:
        return [("force commit", craq.force_commit(node, target))]
    if resync.needs_sync(node, target):
        return [("resync", resync.resync(node, target))]
    left = craq.leftovers(node, target)[:SETTLED_AT_ONCE]
    return [(f"settle {chunk.hex()}", craq.settle(node, target, chunk)) for chunk in left]
