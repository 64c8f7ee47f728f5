"""File-system room: one seeded schedule — what clients do, what fails, and the final checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from whalefall.fs.core.effects import Procedure, Refused, Together
from whalefall.fs.core.messages import Code, Kind
from whalefall.fs.profiles import PROFILES
from whalefall.fs.simulation.client import SimClient
from whalefall.fs.simulation.history import Operation, linearizable
from whalefall.fs.simulation.process import SimNode
from whalefall.fs.simulation.world import Size, Violation, World
from whalefall.sim import Faults, Simulation

__all__ = ["PROFILES", "Outcome", "Violation", "run_schedule"]

SLOT = 4  # bytes of a chunk that one partial write changes
FAULTS_BEGIN_S, HEAL_S, CALM_S, STOP_S, PATIENCE_S = 0.6, 5.0, 8.5, 9.5, 60.0
QUIET_S = 2.0


@dataclass
class Outcome:
    """What became of one schedule."""

    seed: int
    violation: str = ""
    faults: dict[str, int] = field(default_factory=dict)
    operations: int = 0
    unknown: int = 0
    steps: int = 0
    messages: int = 0
    chain_versions: int = 0
    conflicts: int = 0
    transcript: list[str] = field(default_factory=list)


class Schedule:
    """The random choices of one run; everything follows from the seed and the profile."""

    def __init__(self, seed: int, keep_transcript: bool, profile: str) -> None:
        force = PROFILES[profile]
        self.sim = Simulation(seed, keep_transcript)
        chance = self.sim.random

        def pick(name: str, *values: Any) -> Any:
            drawn = chance.choice(values)
            return force.get(name, drawn)

        size = Size(
            nodes=pick("nodes", 3, 3, 4), replicas=pick("replicas", 2, 3, 3),
            chains=pick("chains", 1, 1, 2), managers=pick("managers", 1, 2, 2),
            clients=pick("clients", 2, 3), chunks=pick("chunks", 1, 2),
        )  # fmt: skip
        faults = Faults(
            loss=pick("loss", 0.0, 0.0, 0.02, 0.1), duplicate=pick("duplicate", 0.0, 0.05, 0.2),
            slow=pick("slow", 0.0, 0.02, 0.1), slow_s=pick("slow_s", 0.2, 1.0, 2.5),
        )  # fmt: skip
        self.retry_s = pick("retry_s", 1.5, 8.0)
        # As one kind of operation among writes and reads, of which there are 40 each.
        self.removes = pick("removes", 0, 8)
        self.kinds = chance.sample(
            ("crash", "freeze", "cut off", "half cut", "manager", "all", "full"),
            k=chance.randint(1, 4),
        )
        if chance.random() < 0.1:
            # Two replicas tell which one is wrong only while both are there.
            self.kinds, faults.loss = ["flip", "full"], 0.0
        self.kinds = force.get("kinds", self.kinds)
        self.together = force.get("together", False)
        at_once = force.get("resync_chunks", 1)
        self.world = World(self.sim, size, faults, retry_s=self.retry_s, resync_chunks=at_once)
        self.history: list[Operation] = []
        self.running = 0
        self.written = 0
        self.faults: dict[str, int] = {}
        self.failure = ""

    # ---- faults

    def plan(self) -> None:
        """Decide when what fails."""
        at = FAULTS_BEGIN_S
        while (at := at + self.sim.random.expovariate(1.4)) < HEAL_S:
            kind = self.sim.random.choice(self.kinds)
            self.sim.after(at, partial(self.fail, kind))
        self.sim.after(HEAL_S, self.heal)

    def fail(self, kind: str) -> None:
        """Let one thing fail."""
        self.faults[kind] = self.faults.get(kind, 0) + 1
        chance, world = self.sim.random, self.world
        node = chance.choice(world.nodes)
        lasts_s = chance.choice((0.1, 0.5, 1.5, 3.0))
        self.sim.note(f"FAULT {kind} ({node.name}, {lasts_s} s)")
        if kind == "crash":
            self.crash(node, lasts_s)
        elif kind == "all":
            for one in world.nodes:
                self.crash(one, chance.choice((0.1, 0.5, 2.0)))
        elif kind == "freeze":
            if node.alive and not node.frozen:
                node.freeze()
                self.sim.after(lasts_s, node.thaw)
        elif kind == "manager":
            manager = chance.choice(world.managers)
            if manager.alive and chance.random() < 0.5:
                manager.crash()
                self.sim.after(lasts_s, lambda: None if manager.alive else manager.boot())
            elif manager.alive and not manager.frozen:
                manager.freeze()
                self.sim.after(lasts_s, manager.thaw)
        elif kind in ("cut off", "half cut", "manager cut"):
            others = [n for n in world.processes if n != node.name]
            if kind == "manager cut" or chance.random() < 0.5:
                others = list(world.manager_names)  # it would still serve clients
            into = kind == "cut off" or chance.random() < 0.5
            world.network.isolate(node.name, others, into, kind != "half cut" or not into)
            self.sim.after(lasts_s, world.faults.cut.clear)
        elif kind == "full":
            self.fill(node, lasts_s)
        elif kind == "flip":
            self.flip()

    def crash(self, node: SimNode, lasts_s: float) -> None:
        if node.alive:
            node.crash()
            self.sim.after(lasts_s, lambda: None if node.alive else node.boot())

    def fill(self, node: SimNode, lasts_s: float) -> None:
        for store in node.stores.values():
            store.full = True
            self.sim.after(lasts_s, partial(setattr, store, "full", False))

    def flip(self) -> None:
        """A replica that is not the head will store other bytes than it was given."""
        chain = self.sim.random.choice(list(self.world.routing.chains.values()))
        followers = chain.serving()[1:]
        if followers:
            member = self.sim.random.choice(followers)
            self.world.nodes[member.node - 1].stores[member.target].flip = True

    def heal(self) -> None:
        """From here on nothing fails any more."""
        self.sim.note("HEAL")
        world = self.world
        world.faults.cut.clear()
        world.faults.loss = world.faults.duplicate = world.faults.slow = 0.0
        for process in (*world.nodes, *world.managers):
            if process.frozen:
                process.thaw()
        for node in world.nodes:
            if not node.alive:
                node.boot()
        for manager in world.managers:
            if not manager.alive:
                manager.boot()
        for node in world.nodes:
            for store in node.stores.values():
                store.full = store.flip = False

    # ---- clients

    def work(self, client: SimClient) -> None:
        """One operation of a client, then the next."""
        if self.sim.now > STOP_S:
            return
        chance = self.sim.random
        if self.together and chance.random() < 0.3:
            self._write_several(client)
            return
        chain = chance.randint(1, self.world.size.chains)
        number = chance.randint(1, self.world.size.chunks)
        chunk = f"{chain}.{number}".encode()
        kind = chance.choices(("write", "whole", "read", "remove"), (40, 8, 40, self.removes))[0]
        if number == 1 and self.sim.now > QUIET_S and chance.random() < 0.9:
            kind = "read"  # what is seldom written must be right too
        op = Operation(client.name, "read", chunk, self.sim.now)
        done = self._finisher(client, [op])
        if kind == "read":
            client.read(chain, chunk, done)
            return
        if kind == "remove":
            op.kind = "remove"
            procedure = client.core.update(chain, chunk, Kind.REMOVE, 0, 0, 64, b"")
        else:
            procedure = self._write(client, chain, op, 2 if kind == "whole" else 1)
        client.start(procedure, done)

    def _write(self, client: SimClient, chain: int, op: Operation, pieces: int) -> Any:
        """The procedure of a write, whose operation this completes."""
        op.kind = "write"
        self.written += 1
        op.data = b"".join((self.written * 2 + i).to_bytes(SLOT, "big") for i in range(pieces))
        op.offset = 0 if pieces == 2 else SLOT * self.sim.random.randint(0, 1)
        return client.core.update(chain, op.chunk, Kind.WRITE, op.offset, len(op.data), 64, op.data)

    def _write_several(self, client: SimClient) -> None:
        """Writes of several chunks of one chain that travel together."""
        chance, size = self.sim.random, self.world.size
        chain = chance.randint(1, size.chains)
        there = range(1 if self.sim.now < QUIET_S else 2, size.chunks + 1)
        numbers = chance.sample(there, chance.randint(2, len(there)))
        ops = [
            Operation(client.name, "write", f"{chain}.{n}".encode(), self.sim.now) for n in numbers
        ]
        writes = [self._write(client, chain, op, chance.randint(1, 2)) for op in ops]

        def together() -> Procedure[Any]:
            return (yield Together(tuple(writes)))

        client.start(together(), self._finisher(client, ops))

    def _finisher(self, client: SimClient, ops: list[Operation]) -> Callable[[Any], None]:
        """Begins operations; the result is what becomes of them, a list where they are several."""
        self.history += ops
        self.running += len(ops)

        def done(result: Any) -> None:
            results = result if isinstance(result, list) else [result] * len(ops)
            for op, one in zip(ops, results, strict=True):
                self._finish(op, one)
            client.later(self.sim.random.expovariate(8), lambda: self.work(client))

        return done

    def _finish(self, op: Operation, result: Any) -> None:
        self.running -= 1
        if not isinstance(result, Exception):
            op.returned_s = self.sim.now
            if op.kind == "read":
                op.data = result
            self.sim.note(f"{op}")
            return
        self.sim.note(f"{op.client} {op.kind} {op.chunk.decode()}: {result}")
        # Even a full disk's refusal is no promise: a packet of an earlier try may be late.
        full = isinstance(result, Refused) and result.code is Code.NO_SPACE
        if op.kind == "read":
            self.history.remove(op)
        if op.called_s > CALM_S and not full:
            raise Violation(f"an operation failed long after the last fault: {result}")

    # ---- the run

    def run(self) -> None:
        """Run to the end and check.

        Raises: Violation.
        """
        self.plan()
        for client in self.world.clients:
            client.later(self.sim.random.uniform(0.2, 0.5), partial(self.work, client))
        self.sim.run(STOP_S)
        while self.running or not self.world.healthy() or self._pending():
            if self.sim.now > PATIENCE_S:
                raise Violation(
                    f"{PATIENCE_S - HEAL_S:.0f} s after the last fault {self.running} operations "
                    f"still run; chains: {list(self.world.routing.chains.values())}"
                )
            self.sim.run(self.sim.now + 0.25)
        self.world.check_agreement()
        self._read_all()
        for chunk in sorted({op.chunk for op in self.history}):
            mine = [op for op in self.history if op.chunk == chunk]
            if not linearizable(mine):
                raise Violation(f"chunk {chunk.decode()}: what clients saw has no order that fits")

    def _pending(self) -> bool:
        return any(s.pendings() for n in self.world.nodes for s in n.stores.values())

    def _read_all(self) -> None:
        """Every replica's content is read once more."""
        for chain in self.world.routing.chains.values():
            for member in chain.members:
                store = self.world.nodes[member.node - 1].stores[member.target]
                for number in range(1, self.world.size.chunks + 1):
                    chunk = f"{chain.chain}.{number}".encode()
                    self.history.append(Operation(
                        "end", "read", chunk, self.sim.now, 0, store.content(chunk),
                        self.sim.now + 0.001,
                    ))  # fmt: skip


def run_schedule(seed: int, keep_transcript: bool = False, profile: str = "mixed") -> Outcome:
    """Run one schedule.

    Args:
        seed: decides cluster size, network, faults, operations and their interleaving.
        keep_transcript: keep a readable line for each thing that happens.
        profile: what trouble there is most of (`PROFILES`).
    Returns: the outcome; `violation` is empty if every invariant held.
    """
    schedule = Schedule(seed, keep_transcript, profile)
    outcome = Outcome(seed)
    try:
        schedule.run()
    except Violation as violation:
        outcome.violation = str(violation)
    outcome.faults = schedule.faults
    outcome.operations = len(schedule.history)
    outcome.unknown = sum(op.returned_s == float("inf") for op in schedule.history)
    outcome.steps = schedule.sim.steps
    outcome.messages = schedule.world.network.sent
    outcome.chain_versions = sum(c.version for c in schedule.world.routing.chains.values())
    outcome.conflicts = schedule.world.conflicts
    outcome.transcript = schedule.sim.transcript
    return outcome
