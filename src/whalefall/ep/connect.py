"""Ep room: which host this is, and the connections to the others."""

from __future__ import annotations

import os
import time
from pathlib import Path

import msgspec

from whalefall import comm, env
from whalefall.ep.callers import Caller, Callers, hear_of_loss, tell_of_loss
from whalefall.ep.combining import Combining
from whalefall.ep.fabric import Fabric, Lock
from whalefall.ep.group import Group
from whalefall.ep.library import library
from whalefall.ep.links import PATIENCE, HostLinks
from whalefall.ep.worker import Worker
from whalefall.errors import ConfigError, RankFailure

__all__ = ["close_all", "host_name", "open_links"]


class _Where(msgspec.Struct):
    address: str
    port: int
    token: bytes


def host_name() -> str:
    """WHALEFALL_HOST, else what tells apart machines that do not share memory."""
    if name := env.get("WHALEFALL_HOST"):
        return name
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    memory = os.stat("/dev/shm")
    return f"{boot}-{memory.st_dev}-{memory.st_ino}"


def open_links(group: Group, fabric: Fabric) -> HostLinks:
    """Connect to the proxies of this rank, and accept the ranks that it serves; collective.

    Raises: RankFailure naming a rank that died meanwhile, or did not come within the timeout.
    """
    if not group.address:
        raise ConfigError("ep: several hosts, but the group does not know our address")
    token, rank, topology = comm.new_token(), fabric.rank, fabric.topology
    limits = comm.Limits(payload_bytes=fabric.plan.slot_bytes)
    listener = comm.listen(group.address)
    mine = _Where(group.address, listener.getsockname()[1], token)
    callers = Callers(listener, token, fabric.streams_of[rank][1:], limits)
    up: dict[int, comm.Channel] = {}
    try:
        raw = group.all_gather(msgspec.msgpack.encode(mine))
        where = [msgspec.msgpack.decode(m, type=_Where) for m in raw]
        proxies = {h: topology.proxy(rank, h) for h in range(len(topology.hosts))}
        del proxies[fabric.host]
        _connect_all(fabric, {h: (r, where[r]) for h, r in proxies.items()}, up, limits)
        end = time.monotonic() + fabric.plan.timeout_s * PATIENCE + 1  # whoever it misses is first
        absent = callers.wait(end, lambda: _look_around(fabric, proxies, up, callers.arrived))
        if callers.lost >= 0:
            raise _failure(callers.lost, "another rank could not reach it")
        if absent:
            raise _failure(absent[0], f"it did not connect within {fabric.plan.timeout_s} s")
        group.all_gather(b"")
    except BaseException as error:
        if isinstance(error, RankFailure) and error.rank is None:
            error.rank = _dead_neighbour(fabric)
        lost = getattr(error, "rank", None)
        tell_of_loss(
            [*up.values(), *callers.arrived.values()], rank, rank if lost is None else lost
        )
        raise
    finally:
        callers.close()
    return HostLinks(fabric, up, callers.arrived)


def _connect_all(
    fabric: Fabric, proxies: dict[int, tuple[int, _Where]], up: dict[int, comm.Channel],
    limits: comm.Limits,
) -> None:  # fmt: skip
    """Fill `up`, host by host; where one proxy is gone, the others hear which."""
    failure: RankFailure | None = None
    for host, (proxy, at) in proxies.items():
        try:
            up[host] = comm.connect(
                at.address, at.port, at.token, timeout_s=fabric.plan.timeout_s, limits=limits
            )
        except OSError as error:
            failure = failure or _failure(proxy, f"{at.address}:{at.port}: {error}")
    lost = -1 if failure is None or failure.rank is None else failure.rank
    for host, channel in up.items():
        try:
            channel.send(Caller(fabric.rank, lost))
        except OSError as error:
            failure = failure or _failure(proxies[host][0], str(error))
    if failure is not None:
        raise failure


def _failure(rank: int, why: str) -> RankFailure:
    return RankFailure(
        f"ep: rank {rank} died, left or hangs while connections were made: {why}; start all ranks "
        "again", rank=rank,
    )  # fmt: skip


def _dead_neighbour(fabric: Fabric) -> int | None:
    """A rank of this host that is dead, if there is one."""
    alive = library().wf_ep_is_alive
    dead = (r for local, r in enumerate(fabric.locals) if not alive(fabric.attached, local))
    return next(dead, None)


def _look_around(
    fabric: Fabric, proxies: dict[int, int], up: dict[int, comm.Channel],
    arrived: dict[int, comm.Channel],
) -> None:  # fmt: skip
    """Raise RankFailure if a rank that this one has to do with has gone, or says that one has."""
    for rank, channel in [*((proxies[h], c) for h, c in up.items()), *list(arrived.items())]:
        if (lost := hear_of_loss(rank, channel)) >= 0:
            raise _failure(lost, "its connection ended" if lost == rank else f"rank {rank} says so")
    if (dead := _dead_neighbour(fabric)) is not None:
        raise _failure(dead, "it is dead")


def close_all(worker: Worker, normal: Combining, low: Combining | None, lock: Lock) -> None:
    """Leave the group, once what is under way has ended."""
    worker.close()  # at the interpreter's end something may be under way
    for exchange in (normal, low):
        if exchange is not None:
            exchange.forwarder.close()
            exchange.fabric.close(unmap=exchange.links.close())
    lock.close()
