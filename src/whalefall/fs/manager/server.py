"""File-system room: a cluster manager as a process, over the key-value store.

In: heartbeats and operator calls. Out: routing, written durably, pushed to all nodes when it
changes and pulled by clients.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from whalefall.fs.core.chains import Public
from whalefall.fs.core.effects import Effect, Procedure, Refused, Transact, Unreachable
from whalefall.fs.core.manager import LeaseLost, Manager
from whalefall.fs.core.messages import Code, Heartbeat, Routing
from whalefall.fs.driver import drive
from whalefall.fs.kv import KeyValue
from whalefall.fs.rpc import Call, Pool, Result, Server

__all__ = ["ManagerServer"]
log = logging.getLogger("whalefall.fs")


class ManagerServer:
    """One manager; several over one store elect a primary.

    Args:
        store: where lease and routing live.
        dead_s: T.
        token: the cluster's secret.
    """

    def __init__(
        self, store: KeyValue, dead_s: float, token: bytes, host: str = "127.0.0.1", port: int = 0
    ) -> None:
        self.store = store
        self.core = Manager(uuid.uuid4().hex, dead_s, dead_s, time.monotonic)
        self.pool = Pool(token)
        self.server = Server(self._handle, token, host, port)
        self.mutex = threading.RLock()
        self._writing = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="manager", daemon=True)
        self._last_campaign_s = float("-inf")

    def start(self) -> None:
        """Campaign, serve, check."""
        self.server.start()
        self._thread.start()

    def stop(self) -> None:
        """Stop serving."""
        self._stop.set()
        self.server.close()
        self._thread.join(2)

    def _perform(self, effect: Effect) -> Any:
        assert isinstance(effect, Transact)
        return self.store.transact(effect.function)

    def _drive(self, procedure: Procedure[Any]) -> Any:
        return drive(procedure, self._perform, self.mutex)

    def _run(self) -> None:
        pause_s = min(0.05, self.core.dead_s / 40)
        while not self._stop.wait(pause_s):
            try:
                due_s = self._last_campaign_s + self.core.lease_s / 6
                if time.monotonic() >= due_s or not self.core.primary:
                    self._last_campaign_s = time.monotonic()
                    self._drive(self.core.campaign())
                if self.core.primary:
                    self._check()
            except LeaseLost:
                log.warning("fs: manager %s lost its lease", self.core.name)
            except Exception:
                log.exception("fs: the manager's round failed")

    def _check(self) -> None:
        with self.mutex:
            changed = self.core.pending_chains()
        if not changed:
            return
        with self._writing:
            if self._drive(self.core.check()):
                for chain in changed.values():
                    states = " ".join(f"{m.target}:{m.public.name}" for m in chain.members)
                    log.info("fs: chain %d version %d: %s", chain.chain, chain.version, states)
        self._push()

    def _write(self, change: Callable[[Routing], Routing]) -> None:
        try:
            with self._writing:
                self._drive(self.core.write(change))
        except LeaseLost:
            raise Refused(Code.NOT_PRIMARY, "the lease was lost") from None
        self._push()

    def _push(self) -> None:
        routing = self.core.routing
        for info in routing.nodes.values():
            threading.Thread(target=self._send, args=(info, routing), daemon=True).start()

    def _send(self, info: Any, routing: Routing) -> None:
        with contextlib.suppress(Unreachable):  # it will ask with its next heartbeat
            self.pool.call((info.host, info.port), routing, b"", self.core.dead_s / 2)

    # ---- what others ask

    def _handle(self, message: Any, payload: memoryview) -> tuple[Any, Sequence[Any]]:
        if isinstance(message, Heartbeat):
            return self._heartbeat(message), ()
        if isinstance(message, Call):
            if not self.core.primary:
                raise Refused(Code.NOT_PRIMARY, "this manager is not the primary")
            method = getattr(self, f"call_{message.name}", None)
            if method is None:
                raise Refused(Code.PROTOCOL, f"a manager has no command {message.name!r}")
            value = method(**message.args)
            return (value if isinstance(value, Routing) else Result(value)), ()
        raise Refused(Code.PROTOCOL, f"a manager does not take {type(message).__name__}")

    def _heartbeat(self, message: Heartbeat) -> Any:
        with self.mutex:
            done = self.core.heartbeat(message)
            unknown = self.core.unregistered(message.info)
        if unknown:
            self._write(self.core.register(message.info))
            with self.mutex:
                done = msgspec.structs.replace(done, routing=self.core.routing)
        return done

    def call_routing(self, version: int) -> Any:
        """The routing, if it is newer than what the caller has."""
        with self.mutex:
            newer = self.core.routing.version > version
            return self.core.routing if newer else None

    def call_status(self) -> dict[str, Any]:
        """Nodes, chains and targets, for people and scripts."""
        with self.mutex:
            core, now = self.core, time.monotonic()
            nodes = [
                {
                    "node": info.node, "kind": info.kind, "address": f"{info.host}:{info.port}",
                    "boot": info.boot,
                    "heard_s": round(now - core.node_heard[n], 3) if n in core.node_heard else None,
                    "alive": n in core.node_heard and now - core.node_heard[n] <= core.dead_s,
                }
                for n, info in sorted(core.routing.nodes.items())
            ]  # fmt: skip
            return {
                "version": core.routing.version, "lease_s": core.dead_s,
                "term": core.generation, "nodes": nodes,
                "chains": [self._chain_row(c) for _, c in sorted(core.routing.chains.items())],
            }  # fmt: skip

    def _chain_row(self, chain: Any) -> dict[str, Any]:
        serving = len(chain.serving())
        wanted = len(chain.members)
        state = "SERVING" if serving == wanted else f"SERVING({serving}/{wanted})"
        if any(m.public is Public.SYNCING for m in chain.members):
            state = "SYNCING"
        if not serving:
            state = "UNAVAILABLE"
        rows = []
        for member in chain.members:
            report = self.core.reports.get(member.target)
            rows.append({
                "target": member.target, "node": member.node, "public": member.public.name,
                "local": report.local.name if report else "UNKNOWN",
                "used_bytes": report.used_bytes if report else 0,
                "free_bytes": report.free_bytes if report else 0,
                "chunks": report.chunks if report else 0,
                "bad_blocks": report.bad_blocks if report else 0,
            })  # fmt: skip
        return {"chain": chain.chain, "version": chain.version, "state": state, "targets": rows}

    def call_create_chains(self, placement: dict[int, list[list[int]]], table: int) -> int:
        """New chains and the table that names them; returns how many chains there are."""
        frozen = {int(c): tuple((t, n) for t, n in ms) for c, ms in placement.items()}
        with self.mutex:
            known = all(n in self.core.routing.nodes for ms in frozen.values() for _, n in ms)
        if not known:
            raise Refused(Code.INVALID, "a chain names a node that has not reported yet")
        with self.mutex:
            change = self.core.create_chains(frozen, table)
        self._write(change)
        return len(self.core.routing.chains)

    def call_drain(self, node: int, drained: bool) -> list[int]:
        """Take a node's targets out of service (or let them back), one chain at a time.

        A target that is the last one to serve is left alone. Returns the targets asked to leave.
        """
        with self.mutex:
            routing = self.core.routing
            mine = [
                (m.target, c) for c in routing.chains.values() for m in c.members if m.node == node
            ]
            info = routing.nodes.get(node)
        if info is None:
            raise Refused(Code.INVALID, f"there is no node {node}")
        if info.kind != "storage":
            what = f"node {node} is no storage node ({info.kind}): it has no targets"
            raise Refused(Code.INVALID, what)
        asked = []
        for target, chain in mine:
            if drained and [m.target for m in chain.serving()] == [target]:
                continue
            call = Call("offline", {"target": target, "offline": drained})
            self.pool.call((info.host, info.port), call, b"", self.core.dead_s)
            asked.append(target)
        return asked

    def healthy(self) -> bool:
        """Whether every member of every chain serves."""
        chains = self.core.routing.chains.values()
        return all(m.public is Public.SERVING for c in chains for m in c.members)
