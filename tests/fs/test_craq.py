"""One replica's part of an update, step by step: what an earlier try may have left counts."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import msgspec
import pytest

from whalefall.comm import crc32c
from whalefall.fs.core import craq, effects, resync
from whalefall.fs.core.chains import Chain, Local, Member, Public
from whalefall.fs.core.effects import Refused, Unreachable
from whalefall.fs.core.messages import (
    Code,
    Failed,
    Kind,
    NodeInfo,
    Read,
    Routing,
    SyncStart,
    Tag,
    Update,
    UpdateDone,
)
from whalefall.fs.core.replica import Limits, StorageNode
from whalefall.fs.simulation.store import SimStore

CHUNK, CHAIN = b"1.1", 3
FULL = (Failed(Code.NO_SPACE, "the disk is full"), b"")
Answer = Callable[[Update], Any]


class Replica:
    """Target 2 on node 2, in the middle of a chain of three unless told otherwise."""

    def __init__(self, at: int = 2, members: int = 3, public: Public = Public.SERVING) -> None:
        self.store, self.now, self.at = SimStore(lambda *_: None), 0.0, at
        info = NodeInfo(at, "storage", "", 0, 1)
        self.node = StorageNode(info, {at: self.store}, Limits(), lambda: self.now)
        self.route(1, CHAIN, *(Member(n, n, Public.SERVING) for n in range(1, members)),
                   Member(members, members, public))  # fmt: skip
        self.target = self.node.targets[at]
        self.target.local, self.target.settling = Local.UPTODATE, False
        self.target.lease_until_s = 1e9
        self.asked: list[Any] = []

    def route(self, version: int, chain: int, *members: Member) -> None:
        """Newer routing."""
        self.node.apply_routing(Routing(version, {}, {1: Chain(1, chain, tuple(members))}))

    def run(self, procedure: Generator[Any, Any, Any], *answers: Answer) -> Any:
        """Run a procedure to its end; each call gets the next answer, the last one for ever."""
        waiting, value, error = list(answers), None, None
        while True:
            try:
                effect = procedure.throw(error) if error else procedure.send(value)
            except StopIteration as stop:
                return stop.value
            value = error = None
            try:
                value = self._do(effect, waiting)
            except (Refused, Unreachable) as failure:
                error = failure

    def _do(self, effect: Any, waiting: list[Answer]) -> Any:
        if isinstance(effect, effects.Sleep):
            self.now += effect.seconds
            return None
        if isinstance(effect, effects.Acquire):
            self.target.locks.acquire(effect.chunk, lambda: None)
            return None
        if isinstance(effect, effects.Call):
            self.asked.append(effect.message)
            return (waiting.pop(0) if len(waiting) > 1 else waiting[0])(effect.message)
        return self.store.perform(effect)

    def packet(self, order: int, data: bytes, seq: int = 1, version: int = 1) -> Update:
        """What the predecessor, node 1, sends."""
        return Update(
            self.at, self.target.chain_version, CHUNK, Kind.WRITE, 0, len(data), 64,
            Tag("c", 1, seq, seq), version, (1, 1, order), checksum=crc32c(data),
            expected=crc32c(data),
        )  # fmt: skip

    def update(self, message: Update, data: bytes, *answers: Answer) -> Any:
        """Run an update."""
        return self.run(craq.update(self.node, message, data), *answers)

    @property
    def pending(self) -> bool:
        """Whether something is pending on disk."""
        return bool(self.store.pendings())


def yes(message: Update) -> Any:
    return UpdateDone(message.version, CHAIN, message.length, message.expected), b""


def silent(message: Update) -> Any:
    raise Unreachable("timeout")


def full(message: Update) -> Any:
    return FULL


def test_a_packet_runs_once_even_where_it_was_refused() -> None:
    replica = Replica(at=3)
    replica.store.full = True
    with pytest.raises(Refused, match="NO_SPACE"):
        replica.update(replica.packet(1, b"a"), b"a", yes)
    replica.store.full = False
    with pytest.raises(Refused, match="STALE_REQUEST"):  # the network's copy of it
        replica.update(replica.packet(1, b"a"), b"a", yes)
    assert replica.update(replica.packet(2, b"b", seq=2), b"b", yes).checksum == crc32c(b"b")


def test_a_full_disk_says_no_only_where_no_earlier_try_has_left_something() -> None:
    replica = Replica()
    with pytest.raises(Refused, match="TIMED_OUT"):
        replica.update(replica.packet(1, b"a"), b"a", silent)
    replica.store.full = True
    with pytest.raises(Refused, match="NOT_READY: the disk is full; an earlier try"):
        replica.update(replica.packet(2, b"a"), b"a", yes)
    assert replica.pending
    replica.store.full = False
    with pytest.raises(Refused, match="NOT_READY: the disk is full; an earlier try"):
        replica.update(replica.packet(3, b"a"), b"a", full)
    assert replica.pending
    assert replica.update(replica.packet(4, b"a"), b"a", yes).version == 1


@pytest.mark.parametrize(("first", "kept"), [(full, False), (silent, True)])
def test_a_full_successor_ends_what_nobody_else_was_asked_for(first: Answer, kept: bool) -> None:
    replica = Replica()

    def another(message: Update) -> Any:
        # The one that was asked is out: target 3 is followed by one that never heard of it.
        members = [Member(1, 1, Public.SERVING), Member(2, 2, Public.SERVING)]
        replica.route(2, CHAIN + 1, *members, Member(4, 4, Public.SYNCING))
        return first(message)

    with pytest.raises(Refused, match="TIMED_OUT.*NO_SPACE" if kept else "^NO_SPACE"):
        replica.update(replica.packet(1, b"a"), b"a", another, full)
    assert replica.pending is kept


def test_a_try_again_at_a_head_is_not_told_no_while_its_content_waits() -> None:
    replica = Replica(at=1)
    message = Update(
        1, CHAIN, CHUNK, Kind.WRITE, 0, 1, 64, Tag("c", 1, 1, 1), checksum=crc32c(b"a")
    )
    with pytest.raises(Refused, match="TIMED_OUT"):
        replica.update(message, b"a", silent)
    with pytest.raises(Refused, match="NOT_READY"):
        replica.update(message, b"a", full)
    other = Update(1, CHAIN, CHUNK, Kind.WRITE, 0, 1, 64, Tag("d", 1, 1, 1), checksum=crc32c(b"b"))
    with pytest.raises(Refused, match="NO_SPACE"):  # it has left nothing anywhere
        replica.update(other, b"b", full)
    assert replica.pending and replica.update(message, b"a", yes).checksum == crc32c(b"a")


def test_a_removal_of_what_is_not_here_is_finished_before_anything_else_by_a_new_head() -> None:
    replica = Replica()
    message = Update(2, CHAIN, CHUNK, Kind.REMOVE, 0, 0, 64, Tag("c", 1, 1, 1), 1, (1, 1, 1))
    with pytest.raises(Refused, match="TIMED_OUT"):
        replica.update(message, b"", silent)  # target 3 may remember it, as version 1
    replica.route(2, CHAIN + 1, Member(2, 2, Public.SERVING), Member(3, 3, Public.SERVING))
    write = Update(2, CHAIN + 1, CHUNK, Kind.WRITE, 0, 1, 64, Tag("d", 1, 1, 1), checksum=-1)
    answers = (lambda m: (UpdateDone(m.version, CHAIN + 1, 0, 0), b""),
               lambda m: (UpdateDone(m.version, CHAIN + 1, 1, crc32c(b"a")), b""))  # fmt: skip
    del replica.asked[:]
    assert replica.update(write, b"a", *answers).version == 1
    assert [(m.kind, m.tag.client, m.version) for m in replica.asked] == [
        (Kind.REMOVE, "c", 1), (Kind.WRITE, "d", 1),
    ]  # fmt: skip
    again = Update(2, CHAIN + 1, CHUNK, Kind.REMOVE, 0, 0, 64, Tag("c", 1, 1, 1))
    assert replica.update(again, b"").version == 1 and replica.store.content(CHUNK) == b"a"


def test_other_content_than_the_predecessors_is_not_left_for_recovery_to_pass_on() -> None:
    replica = Replica()
    replica.store.flip = True
    with pytest.raises(Refused, match="MISMATCH"):
        replica.update(replica.packet(1, b"abc"), b"abc", yes)
    assert not replica.pending and not replica.asked


def test_a_tail_does_not_vouch_for_what_an_earlier_tail_may_have_committed() -> None:
    replica = Replica()
    with pytest.raises(Refused, match="TIMED_OUT"):
        replica.update(replica.packet(1, b"a"), b"a", silent)  # target 3 may have it
    replica.route(2, CHAIN + 1, Member(1, 1, Public.SERVING), Member(2, 2, Public.SERVING))
    read, seen = Read(2, CHAIN + 1, [(CHUNK, 0, 1)], at_tail=True), []
    procedure = craq.update(replica.node, replica.packet(2, b"a"), b"a")

    def watched() -> Any:
        effect = next(procedure)
        while True:
            seen.append(craq.visible(replica.node, replica.target, read, CHUNK)[0])
            try:
                effect = procedure.send((yield effect))
            except StopIteration as stop:
                return stop.value

    replica.run(watched(), yes)
    assert set(seen) == {Code.NOT_COMMITTED}
    assert craq.visible(replica.node, replica.target, read, CHUNK)[0] is Code.OK


def test_a_tail_again_does_not_vouch_for_what_it_stored_as_a_tail_before() -> None:
    replica = Replica(public=Public.SYNCING)
    with pytest.raises(Refused, match="TIMED_OUT"):
        replica.update(replica.packet(1, b"a"), b"a", silent)
    read = Read(2, CHAIN, [(CHUNK, 0, 1)], at_tail=True)
    assert craq.visible(replica.node, replica.target, read, CHUNK)[0] is Code.NOT_FOUND
    members = [Member(n, n, Public.SERVING) for n in (1, 2, 3)]
    replica.route(2, CHAIN + 1, *members)  # target 3 serves, commits it, is read ...
    replica.route(3, CHAIN + 2, *members[:2])  # ... and dies
    assert craq.visible(replica.node, replica.target, read, CHUNK)[0] is Code.NOT_COMMITTED


def test_one_operation_does_not_name_two_requests() -> None:
    replica = Replica(at=3)
    replica.update(replica.packet(1, b"a"), b"a")
    other = msgspec.structs.replace(replica.packet(2, b"b"), tag=Tag("c", 1, 1, 2))
    with pytest.raises(Refused, match="names two different requests"):
        replica.update(other, b"b")


def test_what_was_remembered_before_recovery_is_forgotten() -> None:
    replica = Replica(at=3, public=Public.SYNCING)
    replica.target.local = Local.ONLINE
    tag = Tag("c", 1, 1, 1)
    replica.store.perform(effects.Merge(3, [craq.Remembered(tag, 1, CHAIN, 0, 0)]))
    start = SyncStart(3, CHAIN, (2, 1, 7))
    replica.run(resync.sync_start(replica.node, start))
    assert not replica.store.tags()
    # A copy of the message may not undo what came since.
    replica.store.perform(effects.Merge(3, [craq.Remembered(tag, 2, CHAIN, 0, 0)]))
    for late in (start, SyncStart(3, CHAIN, (2, 1, 6))):
        with pytest.raises(Refused, match="STALE_REQUEST"):
            replica.run(resync.sync_start(replica.node, late))
    assert replica.store.tags()
    replica.run(resync.sync_start(replica.node, SyncStart(3, CHAIN, (1, 9, 1))))
    assert not replica.store.tags()
