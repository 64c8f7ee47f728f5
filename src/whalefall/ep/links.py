"""Ep room: connections between hosts — a token crosses to a host once, and comes back once.

For each other host a rank has one connection, to the rank that stands for it there (its proxy).
Over it go the rank's headers and packed blocks; the proxy receives them straight into the shared
memory of its host, as the rank's stream. Back come, for each block of tokens, what the proxy's host
has for this rank. Every queue is bounded, so a slow reader slows the writer and nothing piles up.
"""

from __future__ import annotations

import contextlib
import ctypes
import queue
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import msgspec
import numpy as np

from whalefall import comm
from whalefall.comm.library import address
from whalefall.ep.fabric import Fabric
from whalefall.ep.handle import Handle
from whalefall.ep.library import KDEAD, KFAILED, KSILENT, CombineCall, DispatchCall, library
from whalefall.errors import ConfigError, RankFailure

__all__ = ["HostLinks", "Links"]

QUEUE = 4  # blocks on their way between two threads
LOOK_S = 0.05  # how often a waiting thread looks whether the other host has failed
# Another host's rank gets more time: whoever waits for the culprit itself shall say so first.
PATIENCE = 1.25


class Frame(msgspec.Struct, array_like=True):
    """A message between hosts: "header", "block" (down to the proxy) or "partial" (back).

    "failed" goes both ways, with the status that ended the sender's collectives.
    """

    kind: str
    number: int  # of the header, or the tick, or the status


class Links:
    """No other hosts: the single-host case, whose calls do nothing; `HostLinks` has them.

    Attributes:
        bytes_sent: payload and headers sent to other hosts so far.
    """

    bytes_sent = 0

    def send_header(self, count: int, header: np.ndarray) -> None:
        """Post a header on the other hosts."""

    def send_blocks(self, call: DispatchCall, keep: list[Any]) -> Callable[[], None] | None:
        """Begin to send a dispatch's blocks; the result waits until all have left."""
        return None

    def send_partials(
        self, call: CombineCall, handle: Handle, i: int, most: int, stride: int
    ) -> None:
        """As a proxy: send what this host has for the ranks that it serves, for block i."""

    @contextlib.contextmanager
    def partials(self, call: CombineCall, i: int) -> Iterator[None]:
        """Have the other hosts' partial results of block i at hand."""
        yield

    def close(self) -> None:
        """Close all connections."""


class _Sender:
    """A thread that sends what is put into its bounded queue."""

    def __init__(
        self, channel: comm.Channel, name: str, timeout_s: float, failed: Callable[[int], None]
    ) -> None:
        self.channel, self._timeout_s, self._failed = channel, timeout_s, failed
        self.broken = False
        self._calls: queue.Queue[Callable[[comm.Channel], None] | None] = queue.Queue(QUEUE)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, call: Callable[[comm.Channel], None]) -> None:
        """Queue a call that sends; the other side has failed if it takes nothing for too long."""
        try:
            self._calls.put(call, timeout=self._timeout_s)
        except queue.Full:
            self.broken = True
            self._failed(KSILENT)

    def put_if_room(self, call: Callable[[comm.Channel], None]) -> None:
        """Queue a call, unless the other side is too far behind."""
        with contextlib.suppress(queue.Full):
            self._calls.put_nowait(call)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            if self.broken:
                continue
            try:
                call(self.channel)
            except (OSError, comm.CommError):
                self.broken = True
                time.sleep(LOOK_S)  # why it left may have come before; the one that receives reads
                self._failed(KDEAD)

    def close(self) -> None:
        """End after what is queued, and close the channel."""
        with contextlib.suppress(queue.Full):
            self._calls.put(None, timeout=5.0)
            self._thread.join(5.0)
        self.channel.close()


class HostLinks(Links):
    """The connections of one rank on one fabric.

    Args:
        fabric: this host's shared memory.
        up: for each other host, the channel to our proxy there.
        down: for each rank of another host that we serve, its channel to us.
    """

    def __init__(
        self, fabric: Fabric, up: dict[int, comm.Channel], down: dict[int, comm.Channel]
    ) -> None:
        self.fabric, self.lib = fabric, library()
        self._up, self._down = up, down
        self._closing = False
        self._partials: dict[int, queue.Queue[tuple[int, Any]]] = {
            h: queue.Queue(QUEUE) for h in up
        }
        self._lost: dict[int, int] = {}  # host: the status that its proxy ended with
        self._proxy = {h: fabric.topology.proxy(fabric.rank, h) for h in up}
        self._to_proxy = {
            h: _Sender(c, f"ep up {h}", fabric.plan.timeout_s, partial(self._host_gone, h))
            for h, c in up.items()
        }
        self._to_source = {
            s: _Sender(c, f"ep down {s}", fabric.plan.timeout_s, partial(self._source_gone, s))
            for s, c in down.items()
        }
        fabric.tell = self._tell
        self._threads = [
            threading.Thread(target=self._receive_partials, args=(h, c), daemon=True)
            for h, c in up.items()
        ]
        self._threads += [
            threading.Thread(target=self._receive_stream, args=(s, c), daemon=True)
            for s, c in down.items()
        ]
        self._ended = threading.Event()
        self._threads.append(threading.Thread(target=self._tell_whom_it_awaits, daemon=True))
        for thread in self._threads:
            thread.start()

    @property
    def bytes_sent(self) -> int:  # type: ignore[override]
        """Bytes sent to other hosts so far, with all headers."""
        return sum(c.bytes_sent for c in [*self._up.values(), *self._down.values()])

    # ---- as a source

    def send_header(self, count: int, header: np.ndarray) -> None:
        """Post a header on the other hosts."""
        data = header.tobytes()
        for sender in self._to_proxy.values():
            sender.put(partial(_send, Frame("header", count), data))

    def send_blocks(self, call: DispatchCall, keep: list[Any]) -> Callable[[], None]:
        """Begin to send a dispatch's blocks; the result waits until all have left."""
        done, sent = threading.Semaphore(0), [0]

        def send_all(ranks: np.ndarray, keep: list[Any], channel: comm.Channel) -> None:
            rows = min(call.block, call.tokens)
            row = -(-(call.x_bytes + call.scale_bytes + 3 + 8 * call.top_k) // 64) * 64
            room = np.empty(256 + rows * (row + 16), np.uint8)
            try:
                for i in range(call.ticks):
                    begin = min(i * call.block, call.tokens)
                    used = self.lib.wf_ep_pack(
                        self.fabric.attached, ctypes.addressof(call), begin,
                        min(begin + call.block, call.tokens), ranks.ctypes.data, len(ranks),
                        room.ctypes.data,
                    )  # fmt: skip
                    channel.send(Frame("block", call.base + i), room[:used])
                    sent[0] += 1
            finally:
                done.release()

        held = list(keep)  # the caller's arrays live until the last byte has left
        for host, sender in self._to_proxy.items():
            ranks = np.array(self.fabric.topology.hosts[host], np.int32)
            sender.put(partial(send_all, ranks, held))

        def wait() -> None:
            for host in self._to_proxy:
                seen, end = -1, 0.0
                with self._awaiting(host) as say:
                    while not done.acquire(timeout=LOOK_S):
                        say()
                        if sent[0] != seen:  # it moves
                            seen, end = sent[0], self._deadline()
                        self._check(host, end, "dispatch")

        return wait

    def _deadline(self) -> float:
        return time.monotonic() + self.fabric.plan.timeout_s * PATIENCE + 1

    def _check(self, host: int, end: float, where: str) -> None:
        """Raise RankFailure if a host's proxy has failed, or the time is up."""
        status = self._lost.get(host, 0)
        if not status and time.monotonic() > end:
            status = self.lib.wf_ep_silence(self.fabric.pointer, self._proxy[host])
        self.fabric.check(status, where)

    def _receive_partials(self, host: int, channel: comm.Channel) -> None:
        try:
            while True:
                frame, payload = channel.recv(Frame)
                if frame.kind == "failed":
                    self._lost.setdefault(host, frame.number)
                    self.lib.wf_ep_failed(self.fabric.attached, self._proxy[host], frame.number)
                elif frame.kind == "awaits":
                    self._hear(self._proxy[host], frame.number)
                else:
                    self._partials[host].put((frame.number, payload.obj))
        except (OSError, comm.CommError):
            self._host_gone(host, KDEAD)

    def _host_gone(self, host: int, how: int) -> None:
        if not self._closing:
            self._lost.setdefault(host, -(how + self._proxy[host]))

    def _tell(self, status: int) -> None:
        """Have all who wait for this rank on other hosts know why it takes part in nothing more."""
        for sender in [*self._to_proxy.values(), *self._to_source.values()]:
            sender.put_if_room(partial(_send, Frame("failed", status), b""))

    @contextlib.contextmanager
    def _awaiting(self, host: int) -> Iterator[Callable[[], None]]:
        """Say that this rank waits for a host's proxy; the call says it anew."""
        say = partial(self.lib.wf_ep_awaits, self.fabric.attached, self._proxy[host])
        say()
        try:
            yield say
        finally:
            self.lib.wf_ep_awaits(self.fabric.attached, -1)

    def _tell_whom_it_awaits(self) -> None:
        """Tell the ranks of other hosts whom this one waits for, while it does for long.

        Who waits for this rank shall name the one that keeps all waiting.
        """
        pause_s, awaited = min(1.0, self.fabric.plan.timeout_s / 8), -1
        while not self._ended.wait(pause_s):
            before, awaited = awaited, self.lib.wf_ep_awaited(self.fabric.attached)
            if before >= 0 and awaited in (before, -1):
                for sender in [*self._to_proxy.values(), *self._to_source.values()]:
                    sender.put_if_room(partial(_send, Frame("awaits", awaited), b""))

    def _hear(self, rank: int, awaited: int) -> None:
        self.lib.wf_ep_told_awaited(self.fabric.attached, rank, awaited)

    def _next_partial(self, host: int) -> tuple[int, Any]:
        end = self._deadline()
        with contextlib.suppress(queue.Empty):
            return self._partials[host].get_nowait()
        with self._awaiting(host) as say:
            while True:
                with contextlib.suppress(queue.Empty):
                    return self._partials[host].get(timeout=LOOK_S)
                say()
                self._check(host, end, "combine")

    @contextlib.contextmanager
    def partials(self, call: CombineCall, i: int) -> Iterator[None]:
        """Have the other hosts' partial results of block i at hand."""
        blocks: dict[int, Any] = {}
        table = np.zeros(len(self.fabric.topology.hosts), np.uint64)
        for host in self._partials:
            number, blocks[host] = self._next_partial(host)
            if number != call.base + i:
                rank = self._proxy[host]
                words = (
                    f"ep: combine: rank {rank} is at tick {number}, we at {call.base + i}; ranks "
                    "must call the same collectives in the same order"
                )
                self.fabric.give_up(-(KFAILED + rank), RankFailure(words, rank=rank))
            if blocks[host]:
                table[host] = address(blocks[host])
        call.remote = table.ctypes.data
        yield
        call.remote = None

    # ---- as a proxy

    def _receive_stream(self, source: int, channel: comm.Channel) -> None:
        fabric = self.fabric

        def target(frame: Frame, nbytes: int) -> Any:
            if frame.kind == "failed":
                self.lib.wf_ep_failed(fabric.attached, source, frame.number)
                return bytearray(nbytes)
            if frame.kind == "awaits":
                self._hear(source, frame.number)
                return bytearray(nbytes)
            if frame.kind == "header":
                where, room = (
                    fabric.mailbox_address(source, frame.number),
                    fabric.plan.mailbox_bytes,
                )
            else:
                fabric.check(self.lib.wf_ep_await_slot(fabric.pointer, frame.number), "forwarding")
                where, room = fabric.slot_address(source, frame.number), fabric.stream_bytes
            if nbytes > room:
                raise comm.CommError(f"ep: {frame.kind} of {nbytes} bytes from rank {source}")
            return (ctypes.c_uint8 * nbytes).from_address(where)

        self.lib.wf_ep_forwards()
        try:
            while True:
                frame, _ = channel.recv(Frame, into=target)
                if frame.kind == "failed":
                    return
                if frame.kind == "awaits":
                    continue
                post = self.lib.wf_ep_posted if frame.kind == "header" else self.lib.wf_ep_staged
                post(fabric.attached, source, frame.number)
        except (OSError, comm.CommError):
            self._source_gone(source, KDEAD)
        except (RankFailure, ConfigError):
            return  # of this host; this rank's own calls say so

    def _source_gone(self, source: int, how: int) -> None:
        if not self._closing:
            self.lib.wf_ep_failed(self.fabric.attached, source, -(how + source))

    def send_partials(
        self, call: CombineCall, handle: Handle, i: int, most: int, stride: int
    ) -> None:
        """As a proxy: send what this host has for the ranks that it serves, for block i."""
        row = -(-call.hidden * (4 if call.fp32 else 2) // 4) * 4
        row = -(-(row + (4 * call.top_k if call.row_weights else 0)) // 64) * 64
        if call.log_format:  # at most; most rows are shorter
            row += call.hidden // 32
        for source, (token, mask, idx) in handle.forward.items():
            first, last = np.searchsorted(token, [i * call.block, (i + 1) * call.block])
            rows = int(last - first)
            if handle.want.per_selection and rows:
                rows = self._selections_here(handle, idx[first:last])
            data = np.empty(rows * row, np.uint8)
            used = self.lib.wf_ep_combine_forward(
                self.fabric.pointer, ctypes.addressof(call), source, i, most, stride, int(first),
                int(last), mask.ctypes.data, idx.ctypes.data, data.ctypes.data,
            )  # fmt: skip
            frame = Frame("partial", call.base + i)
            self._to_source[source].put(partial(_send, frame, data[:used]))

    def _selections_here(self, handle: Handle, idx: np.ndarray) -> int:
        El = handle.num_local_experts
        ranks = self.fabric.locals
        return int(((idx >= ranks[0] * El) & (idx < (ranks[-1] + 1) * El)).sum())

    def close(self) -> None:
        """Close all connections, after what is queued has been sent."""
        self._closing = True
        self._ended.set()
        for sender in [*self._to_proxy.values(), *self._to_source.values()]:
            sender.close()
        for thread in self._threads:
            thread.join(5.0)


def _send(frame: Frame, data: Any, channel: comm.Channel) -> None:
    channel.send(frame, data)
