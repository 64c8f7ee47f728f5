"""File-system room: a storage node's view of its targets — routing, lease, what it may do.

In: routing, answers to heartbeats. Out: whether a request may run here, and what to report.
The lease: a target whose report was last believed more than T/2 ago (counted from when the report
was *sent*) refuses everything; the manager replaces it only T after it believed a report.
Source: 3FS chain states; the T/2 self-stop that its design notes describe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from whalefall.fs.core.chains import Chain, Local, Member, Public, read_tail
from whalefall.fs.core.effects import Refused
from whalefall.fs.core.locks import Locks
from whalefall.fs.core.messages import (
    ChunkMeta,
    Code,
    Heartbeat,
    HeartbeatDone,
    NodeInfo,
    Remembered,
    Routing,
    TargetReport,
    Update,
)

__all__ = ["Entry", "Limits", "StorageNode", "StoreView", "Target"]


@dataclass(frozen=True)
class Limits:
    """Times of the protocol, in seconds."""

    lease_s: float = 10.0  # T: declared dead after it; refuses after half of it
    call_s: float = 2.0  # one forward attempt
    forward_s: float = 30.0  # all attempts together
    pause_s: float = 0.05  # between attempts
    retry_s: float = 60.0  # a client's patience
    resync_chunks: int = 8  # that recovery sends at once


@dataclass
class Entry:
    """What a store has of one chunk."""

    committed: ChunkMeta | None = None
    pending: ChunkMeta | None = None


class StoreView(Protocol):
    """The part of a chunk store that answers from memory."""

    def entry(self, chunk: bytes) -> Entry | None: ...
    def entries(self) -> Mapping[bytes, Entry]: ...
    def pendings(self) -> list[bytes]: ...
    def remembered(self, client: str, channel: int) -> Remembered | None: ...
    def tags(self) -> list[Remembered]: ...
    def last(self, prefix: bytes) -> tuple[bytes | None, int, int]: ...
    def usage(self) -> tuple[int, int, int, int]: ...


@dataclass
class Target:
    """One disk's share of one chain, in memory; a dropped target gets a fresh one of these."""

    target: int
    store: StoreView
    locks: Locks = field(default_factory=Locks)
    local: Local = Local.OFFLINE
    lease_until_s: float = 0.0
    # Operations that run now; a dropped target comes back only when none does.
    inflight: int = 0
    busy: set[tuple[str, int]] = field(default_factory=set)
    # Chunk → the newest packet of our predecessor; void when the chain's version changes.
    orders: dict[bytes, tuple[int, int, int]] = field(default_factory=dict)
    # Chunk → chain version under which its pending was stored here as at the reads' tail.
    tail_marks: dict[bytes, int] = field(default_factory=dict)
    # Served last before everything stopped: commits what is pending before it serves again.
    settling: bool = False
    reloading: bool = False
    wanted_offline: bool = False
    session: tuple[int, int, int] | None = None
    chain_version: int = 0


class StorageNode:
    """The state of one storage node; procedures (`craq.py`, `resync.py`) run on it.

    Args:
        info: the node's number, address and boot count (which grows with every start).
        stores: target → its chunk store.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        info: NodeInfo,
        stores: Mapping[int, StoreView],
        limits: Limits,
        clock: Callable[[], float],
    ) -> None:
        self.info, self.limits, self.clock = info, limits, clock
        self.routing = Routing()
        self.targets = {number: Target(number, store) for number, store in stores.items()}
        self.report_now = True
        self._seats: Mapping[int, tuple[Chain | None, Member | None]] = {}
        self._counter = 0
        self._seq = 0

    # ---- routing and states

    def apply_routing(self, routing: Routing) -> None:
        """Take newer routing; older is ignored."""
        if routing.version <= self.routing.version:
            return
        self.routing = routing
        chains = routing.chains.values()
        self._seats = {m.target: (chain, m) for chain in chains for m in chain.members}
        for target in self.targets.values():
            chain, member = self.seat(target)
            if chain is None or member is None:
                continue
            if chain.version != target.chain_version:
                target.chain_version = chain.version
                target.orders.clear()
                self.report_now = True
            self._follow(target, member)

    def adopt(self, number: int, store: StoreView, fresh: bool) -> None:
        """Take a target that was just made; in a chain that was just made it may serve at once."""
        target = self.targets[number] = Target(number, store)
        target.local = Local.ONLINE if fresh else Local.OFFLINE
        chain, member = self.seat(target)
        if chain is not None and member is not None:
            target.chain_version = chain.version
            self._follow(target, member)
        self.report_now = True

    def seat(self, target: Target) -> tuple[Chain | None, Member | None]:
        """The chain that has a target, and its place there."""
        return self._seats.get(target.target, (None, None))

    def _follow(self, target: Target, member: Member) -> None:
        serving = member.public is Public.SERVING
        dropped = member.public in (Public.OFFLINE, Public.LASTSRV, Public.WAITING)
        if target.local is Local.ONLINE and serving:
            target.local = Local.UPTODATE
            target.settling = True
            self.report_now = True
        elif target.local is Local.UPTODATE and dropped:
            self.drop(target)

    def drop(self, target: Target) -> None:
        """Take one target out; it reports online again once nothing uses it."""
        target.local = Local.OFFLINE
        target.reloading = True
        target.settling = False
        target.session = None
        self.report_now = True

    def tick(self) -> None:
        """Bring targets online whose time has come."""
        for target in self.targets.values():
            if target.local is not Local.OFFLINE or target.wanted_offline or target.inflight:
                continue
            _, member = self.seat(target)
            # After a start, the others must first have seen this one leave.
            left = member is None or member.public in (Public.OFFLINE, Public.LASTSRV)
            if self.routing.version and (left or target.reloading):
                if member is not None and member.public in (Public.SERVING, Public.SYNCING):
                    continue
                target.local = Local.ONLINE
                target.reloading = False
                target.busy.clear()
                target.tail_marks.clear()
                self.report_now = True

    # ---- heartbeats

    def heartbeat(self) -> Heartbeat:
        """What to tell the manager now."""
        self._seq += 1
        self.report_now = False
        reports = []
        for target in self.targets.values():
            used, free, chunks, bad = target.store.usage()
            reports.append(
                TargetReport(
                    target.target, target.local, target.chain_version, used, free, chunks, bad
                )
            )
        return Heartbeat(self.info, self._seq, self.routing.version, tuple(reports))

    def heartbeat_done(self, sent_s: float, done: HeartbeatDone) -> None:
        """The manager answered a heartbeat that was sent at `sent_s`."""
        if done.routing is not None:
            self.apply_routing(done.routing)
        for number in done.believed:
            target = self.targets.get(number)
            if target is not None:
                until = sent_s + self.limits.lease_s / 2
                target.lease_until_s = max(target.lease_until_s, until)

    # ---- admission

    def next_order(self) -> tuple[int, int, int]:
        """A number larger than all before it from this node, over restarts."""
        self._counter += 1
        return (self.info.node, self.info.boot, self._counter)

    def place(self, target: Target) -> tuple[Chain, Member]:
        """The chain and member of a target that may work now.

        Raises: Refused if it is out, or the manager has not been heard for T/2.
        """
        chain, member = self.seat(target)
        if chain is None or member is None:
            raise Refused(Code.TARGET_OFFLINE, f"target {target.target} is in no chain")
        if target.local is Local.OFFLINE or member.public not in (Public.SERVING, Public.SYNCING):
            raise Refused(
                Code.TARGET_OFFLINE,
                f"target {target.target} is {member.public.name} here {target.local.name}",
            )
        if self.clock() >= target.lease_until_s:
            raise Refused(
                Code.TARGET_OFFLINE,
                f"target {target.target} has not heard from the manager for T/2 = "
                f"{self.limits.lease_s / 2} s and stopped itself",
            )
        return chain, member

    def admit(self, number: int, chain_version: int) -> tuple[Target, Chain, Member]:
        """As `place`, for a request made under a chain version."""
        target = self.targets.get(number)
        if target is None:
            raise Refused(Code.TARGET_OFFLINE, f"node {self.info.node} has no target {number}")
        chain, member = self.place(target)
        if chain_version != chain.version:
            raise Refused(
                Code.ROUTING_MISMATCH,
                f"chain {chain.chain} is at version {chain.version}, got {chain_version}",
            )
        if target.settling:
            raise Refused(Code.NOT_READY, f"target {number} commits what was pending")
        return target, chain, member

    def is_read_tail(self, target: Target) -> bool:
        """Whether `target` is the last serving one of its chain."""
        chain, _ = self.seat(target)
        tail = read_tail(chain) if chain is not None else None
        return tail is not None and tail.target == target.target

    def recall(self, target: Target, message: Update) -> Remembered | None:
        """The remembered result of an operation that succeeded here before.

        Raises: Refused for a packet of an operation that its channel has left behind.
        """
        tag = message.tag
        last = target.store.remembered(tag.client, tag.channel) if tag is not None else None
        if tag is None or last is None or last.tag.seq < tag.seq:
            return None
        if last.tag.seq > tag.seq and message.order is not None:
            # The predecessor finishes what it stored before the client gave up: its version tells.
            return None
        if last.tag.seq > tag.seq:
            raise Refused(
                Code.STALE_REQUEST,
                f"operation {tag.seq} on channel {tag.channel}: {last.tag.seq} came since",
            )
        if last.tag.request != tag.request:
            raise Refused(Code.PROTOCOL, f"operation {tag.seq} names two different requests")
        if message.version not in (0, last.version):
            raise Refused(
                Code.VERSION_CONFLICT, f"is version {last.version} here, got {message.version}"
            )
        return last
