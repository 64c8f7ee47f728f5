"""File-system room: the cluster manager — one primary by lease, heartbeats, chain states.

In: heartbeats, operator commands, time. Out: routing, versioned, written in one transaction that
re-checks the lease.

Lease. The record {holder, generation, beat} changes with every renewal. A challenger that saw it
unchanged for `lease_s` on its own clock takes the next generation; the holder stops answering
`lease_s` after it *began* its last renewal. So terms never overlap, whatever the clocks say.

Take-over. A new primary knows no local state. It leaves a chain alone until each member that is
not offline has been heard in this term, or T has passed since the term began: by then every
replica that an earlier primary answered has stopped itself (T/2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from whalefall.fs.core.chains import Chain, Local, Member, Public, next_chain
from whalefall.fs.core.effects import Procedure, Refused, Transact
from whalefall.fs.core.messages import (
    Code,
    Heartbeat,
    HeartbeatDone,
    NodeInfo,
    Routing,
    TargetReport,
)

__all__ = ["LEASE_KEY", "ROUTING_KEY", "Lease", "LeaseLost", "Manager"]

LEASE_KEY, ROUTING_KEY = b"SING/lease", b"SING/routing"


class Lease(msgspec.Struct, frozen=True, array_like=True):
    """Who is primary: compare the whole record to see whether its holder is alive."""

    holder: str
    generation: int
    beat: int


class LeaseLost(Exception):
    """Another manager is primary."""


@dataclass
class Heard:
    """The last report of a target that was believed in this term."""

    at_s: float
    local: Local


class Manager:
    """The state of one manager.

    Args:
        name: unique to this start of this manager.
        dead_s: T: a target not heard for this long is dead.
        lease_s: the primary's lease.
        clock: seconds, monotonic.
    """

    def __init__(
        self, name: str, dead_s: float, lease_s: float, clock: Callable[[], float]
    ) -> None:
        self.name, self.dead_s, self.lease_s, self.clock = name, dead_s, lease_s, clock
        self.routing = Routing(lease_s=dead_s)
        self.generation = 0
        self.lease_until_s = float("-inf")
        self.term_began_s = 0.0
        self.heard: dict[int, Heard] = {}
        self.reports: dict[int, TargetReport] = {}
        self.sequence: dict[int, tuple[int, int]] = {}
        self.node_heard: dict[int, float] = {}
        self.born: dict[int, float] = {}
        self._changing: set[int] = set()  # chains whose new state is being written
        self._seen: tuple[Lease | None, float] = (None, float("-inf"))

    @property
    def primary(self) -> bool:
        """Whether this manager may answer now."""
        return self.clock() < self.lease_until_s

    # ---- the lease

    def campaign(self) -> Procedure[bool]:
        """Renew the lease, or take one that its holder left; returns whether this is primary."""
        began_s = self.clock()
        was_primary = self.primary
        lease = yield Transact(self._take)
        if lease.holder != self.name:
            self.lease_until_s = float("-inf")
            if lease != self._seen[0]:
                self._seen = (lease, self.clock())
            return False
        if not was_primary or lease.generation != self.generation:
            self.routing = yield Transact(self._load)
            self._begin_term(lease.generation)
        self.lease_until_s = began_s + self.lease_s
        return self.primary

    def _take(self, transaction: Any) -> Lease:
        lease = _decode(transaction.get(LEASE_KEY), Lease)
        if lease is not None and lease.holder == self.name:
            mine = Lease(self.name, lease.generation, lease.beat + 1)
        elif lease is None or (
            lease == self._seen[0] and self.clock() - self._seen[1] >= self.lease_s
        ):
            mine = Lease(self.name, (lease.generation if lease else 0) + 1, 0)
        else:
            return lease
        transaction.put(LEASE_KEY, msgspec.msgpack.encode(mine))
        return mine

    def _load(self, transaction: Any) -> Routing:
        routing = _decode(transaction.get(ROUTING_KEY), Routing)
        return routing or Routing(lease_s=self.dead_s)

    def _begin_term(self, generation: int) -> None:
        self.generation = generation
        self.term_began_s = self.clock()
        self.heard.clear()
        self.reports.clear()
        self.sequence.clear()
        self.node_heard.clear()

    def resign(self) -> None:
        """Stop answering: the lease has gone to another."""
        self.lease_until_s = float("-inf")

    # ---- heartbeats

    def heartbeat(self, message: Heartbeat) -> HeartbeatDone:
        """Take a node's report.

        Raises: Refused if this is not the primary, or the report is older than one taken before.
        """
        if not self.primary:
            raise Refused(Code.NOT_PRIMARY, f"manager {self.name} is not the primary")
        node, order = message.info.node, (message.info.boot, message.seq)
        if order <= self.sequence.get(node, (-1, -1)):
            raise Refused(Code.STALE_REQUEST, f"heartbeat {order} of node {node} is late")
        self.sequence[node] = order
        self.node_heard[node] = self.clock()
        believed = [r.target for r in message.targets if self._believe(r)]
        newer = self.routing.version > message.routing_version
        return HeartbeatDone(tuple(believed), self.routing if newer else None)

    def _believe(self, report: TargetReport) -> bool:
        chain = self.routing.chain_of(report.target)
        self.reports[report.target] = report
        if chain is None:
            return True
        if chain.chain in self._changing:
            return False  # it may be out already: no lease under a state that is about to end
        if report.local is not Local.OFFLINE and report.chain_version != chain.version:
            return False  # said about an older chain: no sign of life in this one
        self.heard[report.target] = Heard(self.clock(), report.local)
        return True

    def unregistered(self, info: NodeInfo) -> bool:
        """Whether routing must be told of a node's address."""
        return self.routing.nodes.get(info.node) != info

    # ---- chain states

    def pending_chains(self) -> dict[int, Chain]:
        """The chains whose state must change now."""
        changed = {}
        for chain in self.routing.chains.values():
            local = self._local_states(chain)
            after = next_chain(chain, local) if local is not None else chain
            if after is not chain:
                changed[chain.chain] = after
        return changed

    def _local_states(self, chain: Chain) -> dict[int, Local] | None:
        """What each member's node says; None while that is not known yet."""
        now = self.clock()
        states = {}
        for member in chain.members:
            heard = self.heard.get(member.target)
            if heard is None:
                since = max(self.term_began_s, self.born.get(chain.chain, self.term_began_s))
                if member.public is not Public.OFFLINE and now - since <= self.dead_s:
                    return None
                states[member.target] = Local.OFFLINE
            else:
                alive = now - heard.at_s <= self.dead_s
                states[member.target] = heard.local if alive else Local.OFFLINE
        return states

    def check(self) -> Procedure[bool]:
        """One pass over all chains; returns whether routing changed."""
        changed = self.pending_chains() if self.primary else {}
        if not changed:
            return False
        yield from self.write(lambda old: msgspec.structs.replace(
            old, chains={**old.chains, **changed}
        ))  # fmt: skip
        return True

    def write(self, change: Callable[[Routing], Routing]) -> Procedure[Routing]:
        """Change the routing: durably first, then here. One at a time.

        Raises: LeaseLost.
        """
        before = self.routing
        after = msgspec.structs.replace(change(before), version=before.version + 1)

        def commit(transaction: Any) -> bool:
            lease = _decode(transaction.get(LEASE_KEY), Lease)
            if lease is None or (lease.holder, lease.generation) != (self.name, self.generation):
                return False
            stored = _decode(transaction.get(ROUTING_KEY), Routing)
            if stored == after:
                return True  # the first try was committed after all
            transaction.put(ROUTING_KEY, msgspec.msgpack.encode(after))
            return True

        self._changing = {n for n, c in after.chains.items() if before.chains.get(n) != c}
        try:
            if not (yield Transact(commit)):
                self.resign()
                raise LeaseLost(self.name)
            self.routing = after
        finally:
            self._changing = set()
        return after

    # ---- operator's changes, for `write`

    def register(self, info: NodeInfo) -> Callable[[Routing], Routing]:
        """Tell of a node's address."""
        return lambda old: msgspec.structs.replace(old, nodes={**old.nodes, info.node: info})

    def create_chains(
        self, placement: Mapping[int, tuple[tuple[int, int], ...]], table: int
    ) -> Callable[[Routing], Routing]:
        """New chains, all members serving, and a chain table naming them.

        Args:
            placement: chain → its (target, node)s, head first; at most one target a node.
        Raises: Refused for a chain that exists or uses one node twice.
        """
        for chain, members in placement.items():
            if chain in self.routing.chains:
                raise Refused(Code.INVALID, f"chain {chain} exists already")
            if len({node for _, node in members}) != len(members):
                raise Refused(Code.INVALID, f"chain {chain} has two targets on one node")
            self.born[chain] = self.clock()
        fresh = {
            number: Chain(number, 1, tuple(Member(t, n, Public.SERVING) for t, n in members))
            for number, members in placement.items()
        }
        return lambda old: msgspec.structs.replace(
            old,
            chains={**old.chains, **fresh},
            tables={**old.tables, table: tuple(sorted(fresh))},
        )


def _decode(data: bytes | None, kind: Any) -> Any:
    return None if data is None else _DECODERS[kind].decode(data)


_DECODERS: dict[Any, msgspec.msgpack.Decoder[Any]] = {
    kind: msgspec.msgpack.Decoder(kind) for kind in (Lease, Routing)
}
