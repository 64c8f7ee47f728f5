"""File-system room: the simulated cluster — its processes, its store, what it checks on the way.

Checked as it runs: chains change only as they may, routing versions grow one by one, at most one
manager answers, no operation is committed twice under different versions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from whalefall.fs.core.chains import Chain, Local, Member, Public
from whalefall.fs.core.effects import Commit, Refused
from whalefall.fs.core.manager import ROUTING_KEY
from whalefall.fs.core.messages import Code, NodeInfo, Routing, Tag, Update
from whalefall.fs.core.replica import StorageNode
from whalefall.fs.kv import MemoryKV
from whalefall.fs.simulation.client import SimClient
from whalefall.fs.simulation.process import SimManager, SimNode, SimProcess
from whalefall.fs.simulation.store import SimStore
from whalefall.sim import Faults, Network, Simulation

__all__ = ["Size", "Violation", "World"]


class Violation(AssertionError):
    """An invariant does not hold."""


@dataclass(frozen=True)
class Size:
    """How large a simulated cluster is."""

    nodes: int = 3
    replicas: int = 3
    chains: int = 1
    managers: int = 2
    clients: int = 3
    chunks: int = 2


@dataclass
class World:
    """All processes of one run."""

    sim: Simulation
    size: Size
    faults: Faults
    lease_s: float = 1.0
    forward_s: float = 4.0
    retry_s: float = 8.0
    resync_chunks: int = 1
    processes: dict[str, SimProcess] = field(default_factory=dict)
    applied: dict[Tag, int] = field(default_factory=dict)
    conflicts: int = 0

    def __post_init__(self) -> None:
        self.network = Network(self.sim, self.faults)
        self.store = MemoryKV()
        self.manager_names = [f"manager {i}" for i in range(1, self.size.managers + 1)]
        self._write_routing()
        self.managers = [SimManager(self, name) for name in self.manager_names]
        self.nodes = [self._node(n) for n in range(1, self.size.nodes + 1)]
        self.clients = [
            SimClient(self, f"client {i}", self.retry_s) for i in range(1, self.size.clients + 1)
        ]
        for process in (*self.managers, *self.nodes, *self.clients):
            self.processes[process.name] = process

    @staticmethod
    def storage_name(number: int) -> str:
        """The process name of a storage node."""
        return f"storage {number}"

    def _placement(self) -> dict[int, Chain]:
        size = self.size
        return {
            c: Chain(c, 1, tuple(
                Member(((c - 1 + i) % size.nodes + 1) * 100 + c, (c - 1 + i) % size.nodes + 1,
                       Public.SERVING)
                for i in range(size.replicas)
            ))
            for c in range(1, size.chains + 1)
        }  # fmt: skip

    def _write_routing(self) -> None:
        infos = {
            n: NodeInfo(n, "storage", self.storage_name(n), 0)
            for n in range(1, self.size.nodes + 1)
        }
        self.routing = Routing(1, infos, self._placement(), {}, self.lease_s)
        data = msgspec.msgpack.encode(self.routing)
        self.store.transact(lambda t: t.put(ROUTING_KEY, data))

    def _node(self, number: int) -> SimNode:
        mine = [
            m.target for c in self.routing.chains.values() for m in c.members if m.node == number
        ]
        node = SimNode(self, number, {target: SimStore(self.on_commit) for target in mine})
        for target in node.node.targets.values():
            target.local = Local.ONLINE  # a chain just made: its targets may serve at once
        return node

    # ---- the store, and what is checked at its writes

    def transact(self, manager: SimManager, function: Callable[[Any], Any]) -> Any:
        """Run a transaction; now and then its outcome is in doubt and it runs again."""
        times = 2 if self.sim.random.random() < 0.05 else 1
        for _ in range(times):
            transaction = self.store.begin()
            result = function(transaction)
            self.store.commit(transaction)
            self._check_routing(manager)
        self._check_primaries()
        return result

    def _check_routing(self, manager: SimManager) -> None:
        data = self.store.read(lambda t: t.get(ROUTING_KEY))
        assert data is not None
        after: Routing = msgspec.msgpack.decode(data, type=Routing)
        before = self.routing
        if after.version == before.version and after == before:
            return
        if after.version != before.version + 1:
            raise Violation(
                f"{manager.name} wrote routing {after.version} over {before.version}: a fork"
            )
        for number, chain in after.chains.items():
            self._check_chain(before.chains[number], chain)
        self.routing = after

    def _check_chain(self, before: Chain, after: Chain) -> None:
        if before == after:
            return
        states = " ".join(f"{m.target}:{m.public.name}" for m in after.members)
        self.sim.note(f"chain {after.chain} version {after.version}: {states}")
        old = {m.target: m.public for m in before.members}
        counts = {p: [m.target for m in after.members if m.public is p] for p in Public}
        if after.version != before.version + 1:
            raise Violation(f"chain {after.chain}: version {before.version} to {after.version}")
        if [m.public for m in after.members] != sorted(m.public for m in after.members):
            raise Violation(f"chain {after.chain} is out of order: {states}")
        if bool(counts[Public.SERVING]) == bool(counts[Public.LASTSRV]):
            raise Violation(f"chain {after.chain}: either SERVING or LASTSRV: {states}")
        if len(counts[Public.LASTSRV]) > 1 or len(counts[Public.SYNCING]) > 1:
            raise Violation(f"chain {after.chain}: one LASTSRV, one SYNCING at most: {states}")
        lawful = (Public.SERVING, Public.LASTSRV, Public.SYNCING)
        if any(old[t] not in lawful for t in counts[Public.SERVING]):
            raise Violation(f"chain {after.chain}: one serves that had not been filled: {states}")
        if any(old[t] not in lawful[:2] for t in counts[Public.LASTSRV]):
            raise Violation(f"chain {after.chain}: the last one did not serve: {states}")

    def _check_primaries(self) -> None:
        primaries = [m.name for m in self.managers if m.alive and m.core.primary]
        if len(primaries) > 1:
            raise Violation(f"two primaries: {primaries}")

    # ---- what replicas report

    def on_commit(self, chunk: bytes, tag: Tag, version: int) -> None:
        """A replica commits an operation: everywhere, and always, the same version."""
        before = self.applied.setdefault(tag, version)
        if before != version:
            raise Violation(
                f"operation {tag.seq} of {tag.client} was applied twice to chunk "
                f"{chunk.decode()}: as version {before} and {version}"
            )

    def check_commit(self, node: StorageNode, effect: Commit) -> None:
        """What the serving successor has too is committed there under the same chain version."""
        chain, _ = node.seat(node.targets[effect.target])
        after = chain.successor(effect.target) if chain is not None else None
        mine = node.targets[effect.target].store.entry(effect.chunk)
        theirs = None
        if after is not None and after.public is Public.SERVING:
            theirs = self.nodes[after.node - 1].stores[after.target].entry(effect.chunk)
        one = mine.committed if mine else None
        two = theirs.committed if theirs else None
        if one and two and one.version == two.version and one.chain_version != two.chain_version:
            raise Violation(
                f"chunk {effect.chunk.decode()} version {one.version} is committed under chain "
                f"version {one.chain_version} here and {two.chain_version} at the successor"
            )

    def refused(self, name: str, message: Any, refusal: Refused) -> None:
        """A node turned a message down."""
        self.sim.note(f"{name} refuses: {refusal}")
        if isinstance(message, Update) and refusal.code in (
            Code.MISSING_UPDATE, Code.VERSION_CONFLICT,
        ):  # fmt: skip
            self.conflicts += 1

    # ---- what is checked at the end

    def healthy(self) -> bool:
        """Whether every replica of every chain serves."""
        return all(
            m.public is Public.SERVING for c in self.routing.chains.values() for m in c.members
        )

    def check_agreement(self) -> None:
        """All replicas of a chain hold the same, and nothing is pending."""
        for chain in self.routing.chains.values():
            stores = {m.target: self.nodes[m.node - 1].stores[m.target] for m in chain.members}
            views = {}
            for target, store in stores.items():
                if store.pendings():
                    raise Violation(f"target {target} still has pending content when all is quiet")
                views[target] = {
                    chunk: (e.committed.version, e.committed.chain_version, store.content(chunk))
                    for chunk, e in store.entries().items() if e.committed is not None
                }  # fmt: skip
            first = next(iter(views.values()))
            for view in views.values():
                if view != first:
                    raise Violation(f"replicas of chain {chain.chain} differ: {views}")
