"""Recovery, step by step: what is sent is what is there under the lock, not what the lists said."""

from __future__ import annotations

import contextlib

import msgspec
import pytest

from tests.fs.mutations import DONE_MUTATION, REMADE_MUTATION, broken
from whalefall.fs.core import effects, resync
from whalefall.fs.core.chains import Chain, Local, Member, Public
from whalefall.fs.core.effects import Refused
from whalefall.fs.core.messages import (
    ChunkMeta,
    Code,
    Done,
    Failed,
    Inventory,
    Kind,
    NodeInfo,
    Routing,
    SyncDone,
    Tag,
    Update,
)
from whalefall.fs.core.replica import Limits, StorageNode
from whalefall.fs.simulation.store import SimStore

CHUNK = b"1.1"


def ready(store: SimStore) -> StorageNode:
    """A node whose target 1 serves and has a successor to fill, target 2."""
    node = StorageNode(NodeInfo(1, "storage", "", 0, 1), {1: store}, Limits(), lambda: 0.0)
    members = (Member(1, 1, Public.SERVING), Member(2, 2, Public.SYNCING))
    node.apply_routing(Routing(1, {}, {1: Chain(1, 3, members)}))
    node.targets[1].local, node.targets[1].settling = Local.UPTODATE, False
    node.targets[1].lease_until_s = 1.0
    return node


def write(store: SimStore, data: bytes) -> None:
    tag = Tag("c", 1, 1, 1)
    update = Update(1, 3, CHUNK, Kind.WRITE, 0, len(data), 64, tag)
    store.perform(effects.Store(1, update, data, 1, 3))
    store.perform(effects.Commit(1, CHUNK, 3, tag))


def sent_for_a_chunk_that_was_made_again() -> Update:
    """The packet for a chunk that only the successor had when the lists were made."""
    store = SimStore(lambda *_: None)
    node = ready(store)
    recovery = resync.resync(node, node.targets[1])
    assert isinstance(next(recovery).message, resync.SyncStart)
    theirs = msgspec.msgpack.encode({CHUNK: (ChunkMeta(7, 2, 3, 0), None)})
    together = recovery.send((Inventory(1), theirs))
    assert isinstance(together, effects.Together)
    write(store, b"new")  # a client was faster than recovery's turn
    (one,) = together.procedures
    effect = next(one)
    assert isinstance(effect, effects.Acquire)
    node.targets[1].locks.acquire(CHUNK, lambda: None)
    effect = one.send(None)
    if isinstance(effect, effects.Load):
        effect = one.send(b"new")
    one.close()
    recovery.close()
    assert isinstance(effect.message, Update)
    return effect.message


def test_a_chunk_that_was_made_again_is_sent_not_removed() -> None:
    assert sent_for_a_chunk_that_was_made_again().kind is Kind.REPLACE
    with broken(REMADE_MUTATION):
        assert sent_for_a_chunk_that_was_made_again().kind is Kind.REMOVE


def test_one_chunk_that_cannot_be_sent_ends_recovery_without_a_done() -> None:
    store = SimStore(lambda *_: None)
    write(store, b"new")
    node = ready(store)
    recovery = resync.resync(node, node.targets[1])
    next(recovery)
    together = recovery.send((Inventory(0), msgspec.msgpack.encode({})))
    assert isinstance(together, effects.Together)
    with pytest.raises(Refused, match="gone"):
        recovery.send([Refused(Code.TARGET_OFFLINE, "gone")])
    assert node.targets[1].inflight == 0


def test_the_last_word_is_sync_done_after_all_chunks_and_tags() -> None:
    store = SimStore(lambda *_: None)
    write(store, b"new")
    node = ready(store)
    recovery = resync.resync(node, node.targets[1])
    next(recovery)
    recovery.send((Inventory(0), msgspec.msgpack.encode({})))
    said = [type(recovery.send([None]).message).__name__]
    said.append(type(recovery.send((Done(), b"")).message).__name__)
    assert said == ["SyncTags", "SyncDone"]
    with pytest.raises(Refused, match="chain is new"):
        recovery.send((Failed(Code.ROUTING_MISMATCH, "chain is new"), b""))


@pytest.mark.parametrize("late", [SyncDone(1, 2, (7, 1, 1)), SyncDone(1, 3, (7, 1, 1))])
def test_the_end_of_an_earlier_recovery_is_not_believed(late: SyncDone) -> None:
    def heard() -> Local:
        node = StorageNode(
            NodeInfo(1, "storage", "", 0, 1), {1: SimStore(lambda *_: None)}, Limits(), lambda: 0.0
        )
        members = (Member(2, 2, Public.SERVING), Member(1, 1, Public.SYNCING))
        node.apply_routing(Routing(1, {}, {1: Chain(1, 3, members)}))
        target = node.targets[1]
        target.local, target.session, target.lease_until_s = Local.ONLINE, (7, 1, 2), 1.0
        with contextlib.suppress(Refused):
            resync.sync_done(node, late)
        return target.local

    assert heard() is Local.ONLINE
    with broken(DONE_MUTATION):
        assert heard() is Local.UPTODATE
