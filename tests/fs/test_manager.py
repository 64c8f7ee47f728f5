"""The manager's lease: one primary, and no write by one that has lost it."""

from __future__ import annotations

import itertools
import threading
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tests.fs.mutations import LEASE_MUTATION, broken
from whalefall.fs.core.chains import Local
from whalefall.fs.core.effects import Refused, Transact
from whalefall.fs.core.manager import ROUTING_KEY, LeaseLost, Manager
from whalefall.fs.core.messages import Heartbeat, HeartbeatDone, NodeInfo, Routing, TargetReport
from whalefall.fs.core.replica import Limits
from whalefall.fs.kv import MemoryKV
from whalefall.fs.storage import server

LEASE_S = 10.0


class Time:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def run(store: MemoryKV, procedure: Any) -> Any:
    """Run a manager's procedure to its end."""
    value = None
    while True:
        try:
            effect = procedure.send(value)
        except StopIteration as stop:
            return stop.value
        assert isinstance(effect, Transact)
        value = store.transact(effect.function)


def stored(store: MemoryKV) -> Routing:
    data = store.read(lambda t: t.get(ROUTING_KEY))
    assert data is not None
    return msgspec.msgpack.decode(data, type=Routing)


def info(node: int) -> NodeInfo:
    return NodeInfo(node, "storage", "host", 1, 1)


def a_late_write_changes_nothing() -> None:
    """The first primary stops between asking for a write and the write; another takes over."""
    store, time = MemoryKV(), Time()
    one, two = (Manager(name, LEASE_S, LEASE_S, time) for name in ("one", "two"))
    assert run(store, one.campaign())
    run(store, one.write(one.register(info(1))))
    late = one.write(one.register(info(66)))
    write = next(late)
    assert isinstance(write, Transact)
    assert not run(store, two.campaign())
    time.now += LEASE_S
    assert run(store, two.campaign()) and not one.primary
    run(store, two.write(two.register(info(2))))
    done = store.transact(write.function)
    assert set(stored(store).nodes) == {1, 2}, "two primaries wrote: the routing forked"
    with pytest.raises(LeaseLost):
        late.send(done)


def test_a_late_write_changes_nothing() -> None:
    a_late_write_changes_nothing()


def test_mutation_20_is_caught() -> None:
    with broken(LEASE_MUTATION), pytest.raises(AssertionError):
        a_late_write_changes_nothing()


def test_a_challenger_waits_a_whole_lease_after_the_last_renewal() -> None:
    store, time = MemoryKV(), Time()
    one, two = (Manager(name, LEASE_S, LEASE_S, time) for name in ("one", "two"))
    assert run(store, one.campaign()) and not run(store, two.campaign())
    for _ in range(5):
        time.now += LEASE_S / 2
        assert run(store, one.campaign()) and not run(store, two.campaign())
    time.now += LEASE_S - 0.1
    assert not run(store, two.campaign()) and one.primary
    time.now += 0.1
    assert run(store, two.campaign()) and not one.primary and two.generation == 2


def test_late_heartbeats_and_strangers_are_refused() -> None:
    store, time = MemoryKV(), Time()
    manager = Manager("one", LEASE_S, LEASE_S, time)
    with pytest.raises(Refused, match="not the primary"):
        manager.heartbeat(Heartbeat(info(1), 1, 0))
    run(store, manager.campaign())
    manager.heartbeat(Heartbeat(info(1), 2, 0))
    with pytest.raises(Refused, match="is late"):
        manager.heartbeat(Heartbeat(info(1), 2, 0))


def test_no_lease_is_given_under_a_chain_that_is_about_to_change() -> None:
    store, time = MemoryKV(), Time()
    manager = Manager("one", LEASE_S, LEASE_S, time)
    sequence = itertools.count(1)

    def beat(target: int) -> tuple[int, ...]:
        chain = manager.routing.chains[1]
        report = TargetReport(target, Local.UPTODATE, chain.version, 0, 0, 0, 0)
        return manager.heartbeat(Heartbeat(info(target), next(sequence), 1, (report,))).believed

    run(store, manager.campaign())
    run(store, manager.write(manager.create_chains({1: ((1, 1), (2, 2))}, 1)))
    assert beat(1) == (1,) and beat(2) == (2,)
    for _ in range(3):
        time.now += LEASE_S / 2
        run(store, manager.campaign())
        beat(1)
    drop = manager.check()
    write = next(drop)  # target 2 was silent for too long: it is out once this is on disk
    assert isinstance(write, Transact)
    assert beat(2) == ()  # it wakes up while the disk takes its time
    with pytest.raises(StopIteration):
        drop.send(store.transact(write.function))
    assert [m.public.name for m in manager.routing.chains[1].members] == ["SERVING", "OFFLINE"]
    assert beat(1) == (1,)


def test_a_lease_counts_from_when_the_report_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    time, done = Time(), HeartbeatDone((1,), None)
    monkeypatch.setattr(server.time, "monotonic", time)

    def call(*_: Any) -> tuple[HeartbeatDone, bytes]:
        time.now += 3.0  # the answer takes its time
        return done, b""

    counted: list[Any] = []
    storage = object.__new__(server.StorageServer)
    storage.node = SimpleNamespace(  # type: ignore[assignment]
        heartbeat=lambda: None, heartbeat_done=lambda *told: counted.append(told)
    )
    storage.driver = SimpleNamespace(mutex=threading.Lock())  # type: ignore[assignment]
    storage.managers, storage.limits = [("m", 1)], Limits()
    storage.pool = SimpleNamespace(call=call)  # type: ignore[assignment]
    time.now = 10.0
    storage._heartbeat()
    assert counted == [(10.0, done)]
