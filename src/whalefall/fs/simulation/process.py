"""File-system room: simulated processes — a manager, a storage node — around the cores.

A process runs procedures; its effects take virtual time; a crash forgets all of it but the disk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from whalefall.fs.core import craq, effects, work
from whalefall.fs.core.effects import Refused, Unreachable
from whalefall.fs.core.manager import LeaseLost, Manager
from whalefall.fs.core.messages import (
    Code,
    Failed,
    Heartbeat,
    HeartbeatDone,
    ManyDone,
    NodeInfo,
    Read,
    ReadDone,
)
from whalefall.fs.core.replica import Limits, StorageNode
from whalefall.fs.simulation.store import SimStore, Unsynced
from whalefall.fs.simulation.together import InStep

if TYPE_CHECKING:
    from whalefall.fs.simulation.world import World

__all__ = ["SimManager", "SimNode", "SimProcess"]

ON_DISK = (
    effects.Store, effects.Commit, effects.Abort, effects.Load, effects.Merge,
    effects.Forget, Unsynced,
)  # fmt: skip
FAILURES = (Refused, Unreachable, LeaseLost)


class SimProcess:
    """A name on the network that runs procedures. `life` changes with every crash."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.sim = world.sim
        self.alive, self.frozen, self.life = True, False, 0
        self._backlog: list[Callable[[], None]] = []

    # ---- events

    def later(self, delay_s: float, event: Callable[[], None]) -> None:
        """Run an event in this life of the process, once it is not frozen."""
        life = self.life

        def fire() -> None:
            if not self.alive or self.life != life:
                return
            if self.frozen:
                self._backlog.append(fire)
            else:
                event()

        self.sim.after(delay_s, fire)

    def freeze(self) -> None:
        """SIGSTOP."""
        self.frozen = True

    def thaw(self) -> None:
        """SIGCONT: everything that waited happens now."""
        self.frozen = False
        backlog, self._backlog = self._backlog, []
        for event in backlog:
            event()

    def crash(self) -> None:
        """kill -9."""
        self.alive, self.frozen = False, False
        self.life += 1
        self._backlog.clear()

    # ---- procedures

    def start(self, procedure: Any, done: Callable[[Any], None]) -> None:
        """Run a procedure; `done` gets its result, or the exception that ended it."""
        self._step(self.life, procedure, None, None, done)

    def _step(
        self,
        life: int,
        procedure: Any,
        value: Any,
        error: Exception | None,
        done: Callable[[Any], None],
    ) -> None:
        if life != self.life:
            return  # a dead life's procedure, woken as its locks were cleaned up
        try:
            effect = procedure.send(value) if error is None else procedure.throw(error)
        except StopIteration as stop:
            done(stop.value)
            return
        except FAILURES as failure:
            done(failure)
            return

        def resume(result: Any) -> None:
            if isinstance(result, Exception):
                self._step(life, procedure, None, result, done)
            else:
                self._step(life, procedure, result, None, done)

        self.perform(effect, resume)

    def perform(self, effect: Any, resume: Callable[[Any], None]) -> None:
        """Do one effect; `resume` is called once with its result."""
        if isinstance(effect, effects.Sleep):
            self.later(effect.seconds, lambda: resume(None))
        elif isinstance(effect, effects.Call):
            self.call(self.world.storage_name(effect.node), effect, resume)
        elif isinstance(effect, effects.Calls):
            self._calls(effect, resume)
        elif isinstance(effect, effects.Together):
            InStep(self, effect.procedures, resume)
        else:
            raise TypeError(f"{self.name} cannot do {effect!r}")

    def _calls(self, effect: effects.Calls, resume: Callable[[Any], None]) -> None:
        results: list[Any] = [None] * len(effect.calls)
        left = len(results)

        def one(index: int) -> Callable[[Any], None]:
            def got(result: Any) -> None:
                nonlocal left
                results[index] = result
                left -= 1
                if not left:
                    resume(results)

            return got

        for index, call in enumerate(effect.calls):
            self.call(self.world.storage_name(call.node), call, one(index))

    # ---- calls

    def call(self, to: str, call: effects.Call, resume: Callable[[Any], None]) -> None:
        """Send a message; the answer, or Unreachable after the timeout, goes to `resume`."""
        open_ = [True]

        def finish(result: Any) -> None:
            if open_[0]:
                open_[0] = False
                resume(result)

        def reply(result: Any) -> None:
            self.world.network.send(to, self.name, lambda: self.later(0.0, lambda: finish(result)))

        receiver = self.world.processes.get(to)
        if receiver is not None:
            self.world.network.send(
                self.name, to, lambda: receiver.later(0.0, lambda: receiver.receive(call, reply))
            )
        self.later(call.timeout_s, lambda: finish(Unreachable("timeout")))

    def receive(self, call: effects.Call, reply: Callable[[Any], None]) -> None:
        """Handle a message."""
        raise NotImplementedError


class SimManager(SimProcess):
    """A cluster manager."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name)
        self.boot()

    def boot(self) -> None:
        """A new life."""
        self.alive = True
        name = f"{self.name}/{self.life}"
        self.core = Manager(name, self.world.lease_s, self.world.lease_s, self.sim.clock)
        self.busy = False
        self.later(self.sim.random.uniform(0, 0.1), self.tick)

    def tick(self) -> None:
        """One round: the lease, then the chains."""
        self.later(self.world.lease_s / 12, self.tick)
        if self.busy:
            return
        self.busy = True
        self.start(self.core.campaign(), self._campaigned)

    def _campaigned(self, result: Any) -> None:
        if result is True:
            self.start(self.core.check(), self._checked)
        else:
            self.busy = False

    def _checked(self, result: Any) -> None:
        self.busy = False

    def perform(self, effect: Any, resume: Callable[[Any], None]) -> None:
        if not isinstance(effect, effects.Transact):
            super().perform(effect, resume)
            return

        def run() -> None:
            result = self.world.transact(self, effect.function)
            self.later(self.sim.random.uniform(0.0, 0.005), lambda: resume(result))

        self.later(self.sim.random.uniform(0.0, 0.005), run)

    def receive(self, call: effects.Call, reply: Callable[[Any], None]) -> None:
        message = call.message
        if not self.core.primary:
            reply((Failed(Code.NOT_PRIMARY, "not primary"), b""))
        elif isinstance(message, Heartbeat):
            try:
                reply((self.core.heartbeat(message), b""))
            except Refused as refusal:
                reply((Failed(refusal.code, refusal.reason), b""))
        else:
            newer = self.core.routing.version > message
            reply((self.core.routing if newer else None, b""))


class SimNode(SimProcess):
    """A storage node; its stores outlive its crashes."""

    def __init__(self, world: World, number: int, stores: dict[int, SimStore]) -> None:
        super().__init__(world, world.storage_name(number))
        self.number, self.stores = number, stores
        self.managers = list(world.manager_names)
        self.boots = 0
        self.boot()

    def boot(self) -> None:
        """A new life: all targets offline until the manager has seen it."""
        self.alive = True
        self.boots += 1
        lease_s = self.world.lease_s
        info = NodeInfo(self.number, "storage", self.name, 0, self.boots)
        limits = Limits(
            lease_s, lease_s / 2, self.world.forward_s, 0.05, 0, self.world.resync_chunks
        )
        self.node = StorageNode(info, self.stores, limits, self.sim.clock)
        self.jobs: set[tuple[str, int]] = set()
        self.beating = False
        self.beat_s = 0.0
        self.later(self.sim.random.uniform(0, 0.05), self.tick)

    def crash(self) -> None:
        super().crash()
        for store in self.stores.values():
            store.crash()

    def tick(self) -> None:
        """Heartbeat, states, background work."""
        self.later(0.05, self.tick)
        self.node.tick()
        if not self.beating and (self.node.report_now or self.sim.now >= self.beat_s):
            self._beat()
        for target in self.node.targets.values():
            for name, procedure in work.background(self.node, target):
                key = (name, target.target)
                if key in self.jobs:
                    procedure.close()
                    continue
                self.jobs.add(key)
                self.start(procedure, partial(self._job_done, key))

    def _job_done(self, key: tuple[str, int], result: Any) -> None:
        if isinstance(result, Exception):
            self.sim.note(f"{self.name}: {key[0]} of {key[1]} stopped: {result}")
            self.later(0.1, lambda: self.jobs.discard(key))
        else:
            self.jobs.discard(key)

    def _beat(self) -> None:
        self.beating = True
        self.beat_s = self.sim.now + self.world.lease_s / 8
        message, sent_s = self.node.heartbeat(), self.sim.now
        call = effects.Call(0, message, b"", self.world.lease_s / 4)

        def got(result: Any) -> None:
            self.beating = False
            if not isinstance(result, Exception) and isinstance(result[0], HeartbeatDone):
                self.node.heartbeat_done(sent_s, result[0])
            else:
                self.managers.append(self.managers.pop(0))
                self.beat_s = self.sim.now + 0.02

        self.call(self.managers[0], call, got)

    def perform(self, effect: Any, resume: Callable[[Any], None]) -> None:
        if isinstance(effect, effects.Acquire):
            locks = self.node.targets[effect.target].locks
            locks.acquire(effect.chunk, lambda: self.later(0.0, lambda: resume(None)))
        elif isinstance(effect, ON_DISK):
            self._on_disk(effect, resume)
        else:
            super().perform(effect, resume)

    def _on_disk(self, effect: Any, resume: Callable[[Any], None]) -> None:
        def run() -> None:
            try:
                result = self.stores[effect.target].perform(effect)
                if isinstance(effect, effects.Commit):
                    self.world.check_commit(self.node, effect)
            except Refused as refusal:
                result = refusal
            self.later(self.sim.random.uniform(0.0, 0.004), lambda: resume(result))

        self.later(self.sim.random.uniform(0.0, 0.004), run)

    def receive(self, call: effects.Call, reply: Callable[[Any], None]) -> None:
        if isinstance(call.message, Read):
            reply(self._read(call.message))
            return

        def done(result: Any) -> None:
            if isinstance(result, Refused):
                self.world.refused(self.name, call.message, result)
                reply((Failed(result.code, result.reason), b""))
            elif isinstance(result, Exception):
                reply((Failed(Code.TIMED_OUT, str(result)), b""))
            else:
                self._note_refusals(call.message, result[0])
                reply(result)

        self.start(work.handle(self.node, call.message, call.data), done)

    def _note_refusals(self, message: Any, answer: Any) -> None:
        if isinstance(answer, ManyDone):
            for update, done in zip(message.updates, answer.replies, strict=True):
                if isinstance(done, Failed):
                    self.world.refused(self.name, update, Refused(done.code, done.reason))

    def _read(self, message: Read) -> tuple[Any, Any]:
        try:
            target = craq.readable(self.node, message)
        except Refused as refusal:
            return Failed(refusal.code, refusal.reason), b""
        results, data = [], []
        for chunk, _, _ in message.ios:
            code, entry = craq.visible(self.node, target, message, chunk)
            meta = entry.committed if entry is not None else None
            content = self.stores[target.target].content(chunk) if meta is not None else b""
            results.append((int(code), len(content), meta.version if meta else 0))
            data.append(content)
        return ReadDone(results), data
