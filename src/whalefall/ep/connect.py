"""Ep room: which host this is, and the connections to the others."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import msgspec

from whalefall import comm, env
from whalefall.ep.combining import Combining
from whalefall.ep.fabric import Fabric, Lock
from whalefall.ep.group import Group
from whalefall.ep.links import HostLinks
from whalefall.ep.worker import Worker
from whalefall.errors import ConfigError

__all__ = ["close_all", "host_name", "open_links"]


class _Where(msgspec.Struct):
    address: str
    port: int
    token: bytes


class _Caller(msgspec.Struct):
    rank: int


def host_name() -> str:
    """WHALEFALL_HOST, else what tells apart machines that do not share memory."""
    if name := env.get("WHALEFALL_HOST"):
        return name
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    memory = os.stat("/dev/shm")
    return f"{boot}-{memory.st_dev}-{memory.st_ino}"


def open_links(group: Group, fabric: Fabric) -> HostLinks:
    """Connect to the proxies of this rank, and accept the ranks that it serves; collective."""
    if not group.address:
        raise ConfigError("ep: several hosts, but the group does not know our address")
    token = comm.new_token()
    limits = comm.Limits(payload_bytes=fabric.plan.slot_bytes)
    up: dict[int, comm.Channel] = {}
    down: dict[int, comm.Channel] = {}
    with comm.listen(group.address) as listener:
        listener.settimeout(60.0)
        mine = _Where(group.address, listener.getsockname()[1], token)
        raw = group.all_gather(msgspec.msgpack.encode(mine))
        where = [msgspec.msgpack.decode(m, type=_Where) for m in raw]

        def accept() -> None:
            while len(down) < len(fabric.streams_of[fabric.rank]) - 1:
                channel = comm.accept(listener, token, limits=limits)
                caller, _ = channel.recv(_Caller)
                down[caller.rank] = channel

        thread = threading.Thread(target=accept)
        thread.start()
        for host in range(len(fabric.topology.hosts)):
            if host != fabric.host:
                proxy = where[fabric.topology.proxy(fabric.rank, host)]
                up[host] = comm.connect(proxy.address, proxy.port, proxy.token, limits=limits)
                up[host].send(_Caller(fabric.rank))
        thread.join()
    group.all_gather(b"")
    return HostLinks(fabric, up, down)


def close_all(worker: Worker, normal: Combining, low: Combining | None, lock: Lock) -> None:
    """Leave the group, once what is under way has ended."""
    worker.close()  # at the interpreter's end something may be under way
    for exchange in (normal, low):
        if exchange is not None:
            exchange.forwarder.close()
            exchange.fabric.close(unmap=exchange.links.close())
    lock.close()
