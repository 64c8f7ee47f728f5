"""File-system room: one storage node as a process — requests, heartbeats, recovery, scrub.

In: a folder for its targets, the managers' addresses. Out: a node that serves until it is told to
stop; on a clean stop it reports its targets offline first.
"""

from __future__ import annotations

import array
import contextlib
import logging
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from whalefall.fs.core import craq, effects, work
from whalefall.fs.core.chains import Local, Public
from whalefall.fs.core.effects import Refused, Unreachable
from whalefall.fs.core.messages import (
    Code,
    Done,
    Heartbeat,
    HeartbeatDone,
    NodeInfo,
    Read,
    ReadDone,
    Routing,
)
from whalefall.fs.core.replica import Limits, StorageNode, Target
from whalefall.fs.driver import StorageDriver
from whalefall.fs.rpc import Call, Memory, Pool, Result, Server
from whalefall.fs.storage import native_io
from whalefall.fs.storage.engine import ChunkEngine
from whalefall.fs.storage.scrub import Scrubber

__all__ = ["StorageServer", "next_boot"]
log = logging.getLogger("whalefall.fs")
MAX_REPLY_BYTES = 512 << 20


class Kept(threading.local):
    """A thread's memory for its replies."""

    def __init__(self) -> None:
        self.memory = Memory()


def next_boot(folder: Path) -> int:
    """How many times the node in this folder has started, this time included."""
    path = folder / "boot"
    boot = int(path.read_text()) + 1 if path.exists() else 1
    temporary = path.with_suffix(".new")
    with temporary.open("w") as file:
        file.write(str(boot))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return boot


class StorageServer:
    """A storage node.

    Args:
        number: the node's number in the cluster.
        folder: one sub-folder a target.
        managers: their addresses.
        token: the cluster's secret.
        limits: the protocol's times.
        scrub_s: seconds between two passes of the scrub over all chunks; 0: no scrub.
    """

    def __init__(
        self, number: int, folder: Path, managers: list[tuple[str, int]], token: bytes,
        limits: Limits, host: str = "127.0.0.1", port: int = 0, scrub_s: float = 3600.0,
        reserve_bytes: int = 16 << 20,
    ) -> None:  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.managers, self.limits = folder, managers, limits
        self.reserve_bytes = reserve_bytes
        self.pool = Pool(token)
        self.server = Server(self._handle, token, host, port)
        info = NodeInfo(number, "storage", host, self.server.port, next_boot(folder))
        self.engines = {
            number: self._open(number)
            for number in sorted(int(path.name[7:]) for path in folder.glob("target-*"))
        }
        self.node = StorageNode(info, dict(self.engines), limits, time.monotonic)
        self.driver = StorageDriver(self.node, self.engines, self._call)
        self.scrubber = Scrubber(self.driver, self.engines, self.fetch, scrub_s)
        self._kept = Kept()
        self._stop = threading.Event()
        self._jobs: set[tuple[str, int]] = set()
        self._threads = [
            threading.Thread(target=loop, name=loop.__name__, daemon=True)
            for loop in (self._beat, self._work)
        ]

    def _open(self, number: int) -> ChunkEngine:
        return ChunkEngine(
            self.folder / f"target-{number}", reserve_bytes=self.reserve_bytes,
            rotten=lambda chunk: self.scrubber.report(number, chunk),
        )  # fmt: skip

    def start(self) -> None:
        """Serve, heartbeat, recover."""
        self.server.start()
        for thread in self._threads:
            thread.start()
        self.scrubber.start()

    def stop(self) -> None:
        """Leave the cluster, then end."""
        with self.driver.mutex:
            for target in self.node.targets.values():
                target.wanted_offline = True
                if target.local is not Local.OFFLINE:
                    self.node.drop(target)
        with contextlib.suppress(Unreachable, Refused):
            self._heartbeat()
        self._stop.set()
        self.scrubber.stop()
        self.server.close()
        for thread in self._threads:
            thread.join(2)
        for engine in self.engines.values():
            engine.close()

    # ---- what others ask

    def _handle(self, message: Any, payload: memoryview) -> tuple[Any, Sequence[Any]]:
        if isinstance(message, Read):
            return self._read(message)
        if isinstance(message, Routing):
            with self.driver.mutex:
                self._apply(message)
            return Done(), ()
        if isinstance(message, Call):
            with self.driver.mutex:
                return Result(self._administer(message.name, **message.args)), ()
        reply, data = self.driver.run(work.handle(self.node, message, payload))
        return reply, (data,)

    def _read(self, message: Read) -> tuple[ReadDone, Sequence[Any]]:
        results: list[tuple[int, int, int]] = []
        found: list[Any] = []  # their checksums must live until they were read
        contents: list[bytes] = []
        plan = array.array("q")
        if any(offset < 0 for _, offset, _ in message.ios):
            raise Refused(Code.INVALID, "a read at a negative offset")
        with self.driver.mutex:
            target = craq.readable(self.node, message)
            engine = self.engines[message.target]
            pin = engine.pin()
            for chunk, offset, length in message.ios:
                code, entry = craq.visible(self.node, target, message, chunk)
                if entry is None or entry.committed is None:
                    results.append((int(code), 0, 0))
                    continue
                meta = entry.committed
                got = min(length, meta.length - offset)
                if got > 0:
                    found.append(entry)
                    contents.append(engine.content(entry))  # type: ignore[arg-type]
                    plan.extend((offset, got))
                results.append((0, max(got, 0), meta.version))
        try:
            total = sum(plan[1::2])
            if total > MAX_REPLY_BYTES:
                raise Refused(Code.INVALID, f"{total} bytes in one read, at most {MAX_REPLY_BYTES}")
            # This thread's last reply is sent: its memory is free.
            buffer = self._kept.memory.take(total)
            status = engine.read(contents, plan, native_io.address(buffer)[0])
        finally:
            engine.unpin(pin)
        if any(status):
            return self._without_bad(target, message, results, status, plan, buffer)
        return ReadDone(results), (buffer,)

    def _without_bad(
        self, target: Target, message: Read, results: list[tuple[int, int, int]],
        status: list[int], plan: array.array[int], buffer: memoryview,
    ) -> tuple[ReadDone, Sequence[Any]]:  # fmt: skip
        """The reply without the pieces that could not be read; they are mended meanwhile."""
        kept, at = [], 0
        where = [index for index, (_, got, _) in enumerate(results) if got]
        for code, index, got in zip(status, where, plan[1::2], strict=True):
            if code == 0:
                kept.append(buffer[at : at + got])
            else:
                bad = Code.CORRUPT if code == native_io.CORRUPT else Code.DISK
                results[index] = (int(bad), 0, 0)
                self.scrubber.report(target.target, message.ios[index][0])
            at += got
        return ReadDone(results), kept

    def fetch(self, target: int, chunk: bytes) -> tuple[Any, bytes] | None:
        """A chunk's committed content from another serving replica, with its version."""
        chain = self.node.routing.chain_of(target)
        for member in chain.serving() if chain else []:
            if member.target == target or chain is None:
                continue
            size = 64 << 20
            message = Read(member.target, chain.version, [(chunk, 0, size)], relaxed=True)
            with contextlib.suppress(Unreachable):
                reply, data = self._call(effects.Call(member.node, message, b"", 10))
                if isinstance(reply, ReadDone) and reply.results[0][0] == Code.OK:
                    return reply.results[0][2], bytes(data)
        return None

    def _administer(self, name: str, **args: Any) -> Any:
        if name == "ping":
            return {"node": self.node.info.node, "boot": self.node.info.boot}
        if name == "offline":
            target = self.node.targets[args["target"]]
            target.wanted_offline = bool(args["offline"])
            if target.wanted_offline and target.local is not Local.OFFLINE:
                self.node.drop(target)
            return {"target": target.target, "offline": target.wanted_offline}
        if name == "chunks":
            engine = self.engines[args["target"]]
            prefix = args["prefix"]
            return [
                (key, e.committed.version, e.committed.length, e.committed.checksum)
                for key, e in sorted(engine.entries().items())
                if e.committed is not None and key.startswith(prefix)
            ]
        if name == "scrub":
            return {"checked": self.scrubber.start_pass()}
        if name == "counters":
            return self.scrubber.counters()
        raise Refused(Code.PROTOCOL, f"a storage node has no command {name!r}")

    # ---- what it asks of others

    def _call(self, call: effects.Call) -> tuple[Any, Any]:
        info = self.node.routing.nodes.get(call.node)
        if info is None:
            raise Unreachable(f"node {call.node} has no address yet")
        return self.pool.call((info.host, info.port), call.message, call.data, call.timeout_s)

    def _apply(self, routing: Routing) -> None:
        self.node.apply_routing(routing)
        for chain in routing.chains.values():
            for member in chain.members:
                if member.node == self.node.info.node and member.target not in self.engines:
                    self._adopt(member.target, chain.version == 1, member.public)

    def _adopt(self, number: int, fresh: bool, public: Public) -> None:
        """Make a target that routing gives this node and whose folder is not there."""
        if not fresh and public in (Public.SERVING, Public.LASTSRV, Public.SYNCING):
            if public is Public.LASTSRV:
                log.error("fs: the data of target %d, the last one that served, is gone", number)
                return
            if public is Public.SERVING:
                return  # the manager will see it offline; then it may be filled
        engine = self._open(number)
        self.engines[number] = engine
        self.node.adopt(number, engine, fresh)

    def _heartbeat(self) -> bool:
        with self.driver.mutex:
            message: Heartbeat = self.node.heartbeat()
        for index, address in enumerate(self.managers):
            sent_s = time.monotonic()
            with contextlib.suppress(Unreachable):
                reply, _ = self.pool.call(address, message, b"", self.limits.lease_s / 2)
                if isinstance(reply, HeartbeatDone):
                    with self.driver.mutex:
                        if reply.routing is not None:
                            self._apply(reply.routing)
                        self.node.heartbeat_done(sent_s, reply)
                    self.managers.insert(0, self.managers.pop(index))
                    return True
        return False

    def _beat(self) -> None:
        interval_s = self.limits.lease_s / 10
        while not self._stop.is_set():
            heard = self._heartbeat()
            end_s = time.monotonic() + interval_s
            while time.monotonic() < end_s and not (heard and self.node.report_now):
                if self._stop.wait(min(0.02, interval_s)):
                    return

    def _work(self) -> None:
        while not self._stop.wait(min(0.05, self.limits.lease_s / 20)):
            with self.driver.mutex:
                self.node.tick()
                targets = list(self.node.targets.values())
            for target in targets:
                with self.driver.mutex:
                    jobs = work.background(self.node, target)
                for name, procedure in jobs:
                    self._job(name, target, procedure)

    def _job(self, name: str, target: Target, procedure: Any) -> None:
        key = (name, target.target)
        if key in self._jobs:
            procedure.close()
            return
        self._jobs.add(key)

        def run() -> None:
            try:
                began_s = time.monotonic()
                result = self.driver.run(procedure)
                if name == "resync":
                    log.info("fs: filled the successor of target %d: %s chunks in %.2f s",
                             target.target, result, time.monotonic() - began_s)  # fmt: skip
            except (Refused, Unreachable) as error:
                log.info("fs: %s of target %d stopped: %s", name, target.target, error)
                time.sleep(self.limits.pause_s)
            finally:
                self._jobs.discard(key)

        threading.Thread(target=run, name=name, daemon=True).start()
