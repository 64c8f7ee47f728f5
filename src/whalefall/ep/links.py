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
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import msgspec
import numpy as np

from whalefall import comm
from whalefall.comm.library import address
from whalefall.ep.fabric import Fabric
from whalefall.ep.handle import Handle
from whalefall.ep.library import CombineCall, DispatchCall, library
from whalefall.errors import RankFailure

__all__ = ["HostLinks", "Links"]

QUEUE = 4  # blocks on their way between two threads


class Frame(msgspec.Struct, array_like=True):
    """A message between hosts: "header", "block" (down to the proxy) or "partial" (back)."""

    kind: str
    number: int  # of the header, or the tick


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

    def __init__(self, channel: comm.Channel, name: str, failed: Callable[[], None]) -> None:
        self.channel, self._failed = channel, failed
        self.broken = False
        self._calls: queue.Queue[Callable[[comm.Channel], None] | None] = queue.Queue(QUEUE)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, call: Callable[[comm.Channel], None]) -> None:
        """Queue a call that sends."""
        self._calls.put(call)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            if self.broken:
                continue
            try:
                call(self.channel)
            except (OSError, comm.CommError):
                self.broken = True
                self._failed()

    def close(self) -> None:
        """End after what is queued."""
        self._calls.put(None)
        self._thread.join(5.0)


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
        self._partials: dict[int, queue.Queue[tuple[int, Any] | None]] = {
            h: queue.Queue(QUEUE) for h in up
        }
        self._proxy = {h: fabric.topology.proxy(fabric.rank, h) for h in up}
        self._to_proxy = {
            h: _Sender(c, f"ep up {h}", partial(self._host_gone, h)) for h, c in up.items()
        }
        self._to_source = {
            s: _Sender(c, f"ep down {s}", partial(self._source_gone, s)) for s, c in down.items()
        }
        self._threads = [
            threading.Thread(target=self._receive_partials, args=(h, c), daemon=True)
            for h, c in up.items()
        ]
        self._threads += [
            threading.Thread(target=self._receive_stream, args=(s, c), daemon=True)
            for s, c in down.items()
        ]
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
        done = threading.Semaphore(0)

        def send_all(ranks: np.ndarray, keep: list[Any], channel: comm.Channel) -> None:
            rows = min(call.block, call.tokens)
            row = -(-(call.x_bytes + call.scale_bytes + 3 + 8 * call.top_k) // 64) * 64
            room = np.empty(256 + rows * (row + 16), np.uint8)
            try:
                for i in range(call.ticks):
                    begin = min(i * call.block, call.tokens)
                    used = self.lib.wf_ep_pack(
                        self.fabric.pointer, ctypes.addressof(call), begin,
                        min(begin + call.block, call.tokens), ranks.ctypes.data, len(ranks),
                        room.ctypes.data,
                    )  # fmt: skip
                    channel.send(Frame("block", call.base + i), room[:used])
            finally:
                done.release()

        held = list(keep)  # the caller's arrays live until the last byte has left
        for host, sender in self._to_proxy.items():
            ranks = np.array(self.fabric.topology.hosts[host], np.int32)
            sender.put(partial(send_all, ranks, held))

        def wait() -> None:
            for host, sender in self._to_proxy.items():
                while not done.acquire(timeout=0.05):
                    if sender.broken:
                        raise self._failure(host)

        return wait

    def _receive_partials(self, host: int, channel: comm.Channel) -> None:
        try:
            while True:
                frame, payload = channel.recv(Frame)
                self._partials[host].put((frame.number, payload.obj))
        except (OSError, comm.CommError):
            self._host_gone(host)

    def _host_gone(self, host: int) -> None:
        if not self._closing:
            with contextlib.suppress(queue.Full):
                self._partials[host].put_nowait(None)

    @contextlib.contextmanager
    def partials(self, call: CombineCall, i: int) -> Iterator[None]:
        """Have the other hosts' partial results of block i at hand."""
        blocks: dict[int, Any] = {}
        table = np.zeros(len(self.fabric.topology.hosts), np.uint64)
        for host, arriving in self._partials.items():
            try:
                item = arriving.get(timeout=self.fabric.plan.timeout_s)
            except queue.Empty:
                raise RankFailure(
                    f"ep: combine: rank {self._proxy[host]} was silent for "
                    f"{self.fabric.plan.timeout_s} s"
                ) from None
            if item is None:
                arriving.put(None)
                raise self._failure(host)
            number, blocks[host] = item
            if number != call.base + i:
                raise RankFailure(
                    f"ep: combine: rank {self._proxy[host]} is at tick {number}, we at "
                    f"{call.base + i}; ranks must call the same collectives in the same order"
                )
            if blocks[host]:
                table[host] = address(blocks[host])
        call.remote = table.ctypes.data
        yield
        call.remote = None

    def _failure(self, host: int) -> RankFailure:
        return RankFailure(f"ep: rank {self._proxy[host]} is dead: its connection broke")

    # ---- as a proxy

    def _receive_stream(self, source: int, channel: comm.Channel) -> None:
        fabric = self.fabric

        def target(frame: Frame, nbytes: int) -> Any:
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

        try:
            while True:
                frame, _ = channel.recv(Frame, into=target)
                post = self.lib.wf_ep_posted if frame.kind == "header" else self.lib.wf_ep_staged
                post(fabric.pointer, source, frame.number)
        except (OSError, comm.CommError, RankFailure):
            self._source_gone(source)

    def _source_gone(self, source: int) -> None:
        if not self._closing:
            self.lib.wf_ep_failed(self.fabric.pointer, source, source)

    def send_partials(
        self, call: CombineCall, handle: Handle, i: int, most: int, stride: int
    ) -> None:
        """As a proxy: send what this host has for the ranks that it serves, for block i."""
        row = -(-call.hidden * (4 if call.fp32 else 2) // 4) * 4
        row = -(-(row + (4 * call.top_k if call.row_weights else 0)) // 64) * 64
        for source, (token, mask, idx) in handle.forward.items():
            first, last = np.searchsorted(token, [i * call.block, (i + 1) * call.block])
            rows = int(last - first)
            if handle.want.per_selection and rows:
                rows = self._selections_here(handle, idx[first:last])
            data = np.empty(rows * row, np.uint8)
            self.lib.wf_ep_combine_forward(
                self.fabric.pointer, ctypes.addressof(call), source, i, most, stride, int(first),
                int(last), mask.ctypes.data, idx.ctypes.data, data.ctypes.data,
            )  # fmt: skip
            frame = Frame("partial", call.base + i)
            self._to_source[source].put(partial(_send, frame, data))

    def _selections_here(self, handle: Handle, idx: np.ndarray) -> int:
        El = handle.num_local_experts
        ranks = self.fabric.locals
        return int(((idx >= ranks[0] * El) & (idx < (ranks[-1] + 1) * El)).sum())

    def close(self) -> None:
        """Close all connections, after what is queued has been sent."""
        self._closing = True
        for sender in [*self._to_proxy.values(), *self._to_source.values()]:
            sender.close()
        for channel in [*self._up.values(), *self._down.values()]:
            channel.close()
        for thread in self._threads:
            thread.join(5.0)


def _send(frame: Frame, data: Any, channel: comm.Channel) -> None:
    channel.send(frame, data)
