"""Ep room: the shared memory of a host's ranks, laid out and attached; statuses as errors.

A rank's region: a control page; then for its own stream, and for that of each rank of another host
which it serves, a head page and mailboxes; then the slots of all these streams; then memory for
results (`SharedArena`). `native/wire.h`
says how they are used. Once every rank has attached, the names are removed, so a crash leaves
nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from whalefall import comm
from whalefall.comm.library import address
from whalefall.ep.library import (
    KCLOSED,
    KDEAD,
    KFAILED,
    KNOMEMORY,
    KNOROOM,
    KSILENT,
    GroupView,
    library,
)
from whalefall.ep.shared import SharedArena
from whalefall.ep.topology import Topology
from whalefall.errors import ConfigError, LimitError, RankFailure, WhalefallError

__all__ = ["CLOSED", "Fabric", "Lock", "Plan", "kind_and_rank"]

PAGE = 4096
CLOSED = "ep: the Buffer (or engine) is destroyed; make a new one"
MAILBOXES = 8
# Looking again and again pays where every rank has a core of its own; there for some 0.4 ms, since
# to be woken takes longer than most waits of a small collective. With more ranks than cores a rank
# gives its core away between looks, so often.
SPINS_ALONE, SPINS_CROWDED = 30_000, 100
_FLOCK = struct.Struct("hhqqi4x")
_still_used: list[object] = []  # regions that outlive their fabric


@dataclass(frozen=True)
class Plan:
    """Sizes of one fabric, the same on all ranks.

    Attributes:
        name: of its regions, the same on all ranks of the group.
        slots: of a stream.
        slot_bytes: address space of a slot; memory is reserved when used.
        chunk_bytes: what a stream of another host's rank may fill of a slot; reserved at once.
        mailbox_bytes: of a header.
        timeout_s: how long a rank may be silent.
        shrink: mask failed ranks instead of raising.
        shared_bytes: address space of a rank's memory for results; 0: none.
        form: of the calls, in words.
    """

    name: str
    slots: int
    slot_bytes: int
    chunk_bytes: int
    mailbox_bytes: int
    timeout_s: float
    shrink: bool = False
    shared_bytes: int = 0
    form: str = "normal"

    @property
    def head_bytes(self) -> int:
        """Head page and mailboxes of a stream."""
        return PAGE + MAILBOXES * self.mailbox_bytes

    def offsets(self, streams: int) -> tuple[int, int]:
        """Where the slots of a region with so many streams begin, and its size."""
        slots_at = -(-(PAGE + streams * self.head_bytes) // PAGE) * PAGE
        end = -(-(slots_at + streams * self.slots * self.slot_bytes) // PAGE) * PAGE
        return slots_at, end + self.shared_bytes


def kind_and_rank(status: int) -> tuple[int, int]:
    """Of a status that names a rank: KDEAD, KSILENT or KFAILED, and the rank."""
    kind = next(k for k in (KFAILED, KSILENT, KDEAD) if -status >= k)
    return kind, -status - kind


class Lock:
    """Each rank locks its byte of the host's lock file; at its death the kernel unlocks it."""

    def __init__(self, name: str, local: int) -> None:
        try:
            self.region = comm.Region.create(f"{name}-lock", PAGE)
        except FileExistsError:
            self.region = comm.Region.attach(f"{name}-lock")
        request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, local, 1, 0)
        fcntl.fcntl(self.region.descriptor, fcntl.F_OFD_SETLK, request)

    def close(self) -> None:
        """Release the lock: to the others this rank is gone."""
        with contextlib.suppress(BufferError):
            self.region.close()


class Fabric:
    """This process's view of one set of regions.

    Args:
        plan: sizes.
        topology: hosts and ranks.
        rank: this process.
        lock: held by this rank.
        barrier: returns when every rank of the group has called it.
    Attributes:
        view: the native structure.
        pointer: its address for collectives; whoever asks for it after one has failed is told so.
        attached: its address until the fabric is closed.
        tell: called with the status once a collective has failed.
        twin: that of the same ranks' other form, whose collectives end with this one's.
        masked: [ranks] int32, 1: treated as gone.
        shared: this rank's memory for results; None where the plan has none.
        shared_of: [ranks] uint64, where that of each local rank begins in this process.
    """

    def __init__(
        self, plan: Plan, topology: Topology, rank: int, lock: Lock, barrier: Callable[[], object]
    ) -> None:
        self.plan, self.topology, self.rank = plan, topology, rank
        self.host = topology.host_of(rank)
        self.locals = topology.hosts[self.host]
        self.streams_of = {r: [r, *topology.served(r)] for r in self.locals}
        self._regions: dict[int, comm.Region] = {}
        self._keep: list[np.ndarray] = []
        _, size = plan.offsets(len(self.streams_of[rank]))
        mine = comm.Region.create(f"{plan.name}-{rank}", size, reserve=False)
        self._regions[rank] = mine
        slots_at, _ = plan.offsets(len(self.streams_of[rank]))
        mine.reserve(0, slots_at)
        for i in range(plan.slots, plan.slots * len(self.streams_of[rank])):
            mine.reserve(slots_at + i * plan.slot_bytes, plan.chunk_bytes)
        barrier()
        for r in self.locals:
            if r != rank:
                self._regions[r] = comm.Region.attach(f"{plan.name}-{r}")
        barrier()
        mine.unlink()
        self.masked = np.zeros(topology.num_ranks, np.int32)
        self.shared: SharedArena | None = None
        if plan.shared_bytes:
            self.shared = SharedArena(mine, size - plan.shared_bytes, plan.shared_bytes)
        self.view = self._native_view(lock, slots_at)
        self.pointer = self.attached = ctypes.addressof(self.view)
        self.tell: Callable[[int], None] | None = None
        self.twin: Fabric | None = None
        self._failure: WhalefallError | None = None

    def _native_view(self, lock: Lock, slots_at: int) -> GroupView:
        plan, R = self.plan, self.topology.num_ranks
        owner = np.zeros(R, np.int32)
        heads, mailboxes, slots, shared = (np.zeros(R, np.uint64) for _ in range(4))
        bases = {r: address(region.view) for r, region in self._regions.items()}
        for local, r in enumerate(self.locals):
            first_slot, end = plan.offsets(len(self.streams_of[r]))
            shared[r] = bases[r] + end - plan.shared_bytes
            for i, stream in enumerate(self.streams_of[r]):
                owner[stream] = local
                heads[stream] = bases[r] + PAGE + i * plan.head_bytes
                mailboxes[stream] = heads[stream] + np.uint64(PAGE)
                slots[stream] = bases[r] + first_slot + i * plan.slots * plan.slot_bytes
        self._heads, self._mailboxes, self._slots = heads, mailboxes, slots
        self.shared_of = shared
        local_of = np.full(R, -1, np.int32)
        local_of[list(self.locals)] = np.arange(len(self.locals))
        control = np.array([bases[r] for r in self.locals], np.uint64)
        arrays: list[np.ndarray] = [
            np.array(self.locals, np.int32),
            local_of,
            owner,
            control,
            heads,
            mailboxes,
        ]
        arrays += [slots, shared, self.masked, np.zeros(plan.slots, np.int64)]
        self._keep += arrays
        alone = len(self.locals) <= len(os.sched_getaffinity(0))
        return GroupView(
            self.rank, R, self.locals.index(self.rank), len(self.locals), plan.slots,
            SPINS_ALONE if alone else SPINS_CROWDED, not alone, lock.region.descriptor,
            plan.shrink, not plan.shared_bytes, 0, plan.slot_bytes, int(plan.timeout_s * 1e9),
            plan.mailbox_bytes, MAILBOXES, *(a.ctypes.data for a in arrays),
            self._regions[self.rank].descriptor, slots_at,
        )  # fmt: skip

    @property
    def stream_bytes(self) -> int:
        """What another host's rank may fill of a slot."""
        return min(self.plan.chunk_bytes, self.plan.slot_bytes)

    def slot_address(self, stream: int, tick: int) -> int:
        """Where the slot of a stream for a tick begins."""
        offset = tick % (1 << 32) % self.plan.slots * self.plan.slot_bytes
        return int(self._slots[stream]) + offset

    def mailbox_address(self, stream: int, count: int) -> int:
        """Where header number `count` of a stream is."""
        return int(self._mailboxes[stream]) + count % MAILBOXES * self.plan.mailbox_bytes

    def _own_slot(self, tick: int) -> int:
        first, _ = self.plan.offsets(len(self.streams_of[self.rank]))
        return first + tick % (1 << 32) % self.plan.slots * self.plan.slot_bytes

    def slot_view(self, tick: int) -> memoryview:
        """The memory of this rank's own slot for a tick."""
        begin = self._own_slot(tick)
        return self._regions[self.rank].view[begin : begin + self.plan.slot_bytes]

    def reserve(self, tick: int, offset: int, nbytes: int) -> None:
        """Take the memory of a part of this rank's own slot for a tick."""
        if nbytes:
            self._regions[self.rank].reserve(self._own_slot(tick) + offset, nbytes)

    def own_memory(self, offset: int, nbytes: int) -> memoryview:
        """A part of this rank's own slots, taken from the host's memory."""
        first = self._own_slot(0) + offset
        self._regions[self.rank].reserve(first, nbytes)
        return self._regions[self.rank].view[first : first + nbytes]

    def check(self, status: int, where: str) -> None:
        """Turn a native status into the error it means; the collectives of this fabric end with it.

        Raises: RankFailure naming the rank; LimitError; ConfigError once this rank leaves.
        """
        if status == KCLOSED:
            raise ConfigError(CLOSED)
        if status < 0:
            self.give_up(status, self._error(status, where))

    def _error(self, status: int, where: str) -> WhalefallError:
        if status == KNOROOM:
            return LimitError(
                f"ep: {where}: a block does not fit a slot of {self.plan.slot_bytes} bytes; make "
                "the buffer larger (num_nvl_bytes, num_rdma_bytes, chunk_bytes)"
            )
        if status == KNOMEMORY:
            return LimitError(f"ep: {where}: shared memory (/dev/shm) is full")
        kind, rank = kind_and_rank(status)
        how = {
            KFAILED: "gave up after an error of its own",
            KSILENT: f"was silent for {self.plan.timeout_s} s", KDEAD: "is dead",
        }[kind]  # fmt: skip
        if rank == self.rank:
            how = f"(this one) {how}: a hook was not called, it made other calls than the others, "
            how += "or the others went on without it"
            how += "; make a new Buffer (or engine) on all ranks" * self.plan.shrink
        if kind == KSILENT and rank != self.rank and self._other_form(rank):
            how += (
                f": it waits in a {self._other_form(rank)} call, this rank in a {self.plan.form} "
                "one; all ranks must agree on their calls and the order of them"
            )
        return RankFailure(f"ep: {where}: rank {rank} {how}", rank=rank)

    def _other_form(self, rank: int) -> str:
        """The other form, if another rank waits in a call of it."""
        twin = self.twin
        there = twin is not None and library().wf_ep_awaited_by(twin.attached, rank) >= 0
        return twin.plan.form if twin is not None and there else ""

    def give_up(self, status: int, error: WhalefallError) -> NoReturn:
        """Take part in nothing more: ranks may be at different steps now; the others are told.

        Raises: `error`, and from here on every call that wants `pointer`.
        """
        if status in (KNOROOM, KNOMEMORY):
            status = -(KFAILED + self.rank)
        self._end(status, error)
        # With shrink the low-latency form goes on without a lost rank, whatever ends this one.
        if self.twin is not None and not self.twin.plan.shrink:
            self.twin._end(status, error)
        raise error

    def _end(self, status: int, error: WhalefallError) -> None:
        if self._failure is None:
            self._failure = error
            library().wf_ep_give_up(self.attached, status)
            self.__dict__.pop("pointer", None)
            if self.tell is not None:
                self.tell(status)

    def end_waits(self) -> None:
        """End the waits of other threads of this process, which leaves."""
        self.view.closing = 1

    def close(self, unmap: bool = True) -> None:
        """Detach; the memory is freed with its last user.

        Args:
            unmap: False: some thread is still in a native call, whose memory must stay.
        """
        if self.shared is not None:
            self.shared.clear()
        for region in self._regions.values() if unmap else ():
            with contextlib.suppress(BufferError):  # a caller still looks at a buffer
                region.close()
        if not unmap:
            _still_used.append(self._regions)
        # From here on the native side would touch memory that is gone.
        self._failure = self.twin = None
        for name in ("_regions", "shared", "pointer", "attached"):
            self.__dict__.pop(name, None)

    def __getattr__(self, name: str) -> NoReturn:
        if name == "pointer" and (failure := self.__dict__.get("_failure")) is not None:
            words = f"{failure}; that ended this Buffer's (or engine's) calls: make a new one"
            if isinstance(failure, RankFailure):
                raise RankFailure(words, rank=failure.rank)
            raise type(failure)(words)
        if name in ("_regions", "shared", "pointer", "attached"):
            raise ConfigError(CLOSED)
        raise AttributeError(name)
