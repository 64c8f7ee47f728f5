"""Ep room: connections between hosts — a token crosses to a host once, and comes back once.

For each other host a rank has one connection, to the rank that stands for it there (its proxy).
Over it go the rank's headers and packed blocks; the proxy receives them straight into the shared
memory of its host, as the rank's stream. Back come, for each block of tokens, what the proxy's host
has for this rank. Every queue is bounded, so a slow reader slows the writer and nothing piles up.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import msgspec
import numpy as np

from whalefall import comm
from whalefall.comm.library import address
from whalefall.ep.fabric import Fabric, kind_and_rank
from whalefall.ep.handle import Handle
from whalefall.ep.library import KDEAD, KMISCOUNTED, KSILENT, CombineCall, DispatchCall, library
from whalefall.ep.partials import Partials
from whalefall.ep.sender import LOOK_S, QUEUE, Sender
from whalefall.errors import ConfigError, RankFailure

__all__ = ["HostLinks", "Links"]

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

    def close(self) -> bool:
        """Close all connections; whether every thread has ended that uses the fabric's memory."""
        return True


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
        self._partials = {h: Partials(QUEUE, fabric.plan.slots) for h in up}
        self._lost: dict[int, int] = {}  # host: the status that its proxy ended with
        self._proxy = {h: fabric.topology.proxy(fabric.rank, h) for h in up}
        self._to_proxy = {
            h: Sender(c, f"ep up {h}", fabric.plan.timeout_s, partial(self._host_gone, h))
            for h, c in up.items()
        }
        self._to_source = {
            s: Sender(c, f"ep down {s}", fabric.plan.timeout_s, partial(self._source_gone, s))
            for s, c in down.items()
        }
        fabric.tell = self._tell
        self._threads = [
            threading.Thread(target=self._receive_partials, args=(h, c), name=f"ep from host {h}")
            for h, c in up.items()
        ]
        self._threads += [
            threading.Thread(target=self._receive_stream, args=(s, c), name=f"ep from rank {s}")
            for s, c in down.items()
        ]
        self._ended = threading.Event()
        self._threads.append(threading.Thread(target=self._tell_whom_it_awaits, name="ep tell"))
        for thread in self._threads:
            thread.daemon = True
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
        done, sent = {host: threading.Event() for host in self._to_proxy}, [0]

        def send_all(host: int, keep: list[Any], channel: comm.Channel) -> None:
            ranks = np.array(self.fabric.topology.hosts[host], np.int32)
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
                done[host].set()

        held = list(keep)  # the caller's arrays live until the last byte has left
        for host, sender in self._to_proxy.items():
            sender.put(partial(send_all, host, held))

        def wait() -> None:
            for host in self._to_proxy:
                seen, end = sent[0], self._deadline()
                with self._awaiting(host) as say:
                    while not done[host].is_set() and self._goes_on_with(host, end, "dispatch"):
                        say()
                        done[host].wait(LOOK_S)
                        if sent[0] != seen:  # it moves
                            seen, end = sent[0], self._deadline()

        return wait

    def _deadline(self) -> float:
        return time.monotonic() + self.fabric.plan.timeout_s * PATIENCE + 1

    def _goes_on_with(self, host: int, end: float, where: str) -> bool:
        """Whether the wait for a host goes on; with shrink it ends once all its ranks are gone.

        Raises: RankFailure if its proxy has failed, or the time is up.
        """
        fabric, proxy = self.fabric, self._proxy[host]
        status = self._lost.get(host, 0)
        if not status and time.monotonic() > end:
            status = self.lib.wf_ep_silence(fabric.pointer, proxy)
        if status and fabric.plan.shrink and kind_and_rank(status)[1] == proxy:
            self._lost.setdefault(host, status)
            fabric.masked[proxy] = 1
            if where == "dispatch" or self._is_gone(host):  # combine looks at its other ranks
                return False
        fabric.check(status, where)
        return True

    def _is_gone(self, host: int) -> bool:
        """Whether no rank of a host takes part any more."""
        return all(self.fabric.masked[r] for r in self.fabric.topology.hosts[host])

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
                    self._partials[host].put(frame.number, payload.obj)
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

    def _next_partial(self, host: int, wanted: int) -> Any:
        """The block of a tick from a host; None: the host is gone."""
        end, arrived = self._deadline(), self._partials[host]
        with self._awaiting(host) as say:
            while not self._is_gone(host):
                block = arrived.take(wanted, LOOK_S)
                if block is not None:
                    return block
                say()
                self._goes_on_with(host, end, "combine")
        arrived.clear()
        return None

    @contextlib.contextmanager
    def partials(self, call: CombineCall, i: int) -> Iterator[None]:
        """Have the other hosts' partial results of block i at hand; none of a host that is gone."""
        blocks: dict[int, Any] = {}
        table = np.zeros(len(self.fabric.topology.hosts), np.uint64)
        for host in self._partials:
            blocks[host] = self._next_partial(host, call.base + i)
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
            frame, sender = Frame("partial", call.base + i), self._to_source[source]
            if used == KMISCOUNTED:  # this host went on without it: it hears so instead
                frame, used = Frame("failed", -(KSILENT + source)), 0
            self.fabric.check(used, "combine")
            send = partial(_send, frame, data[:used])
            if self.fabric.masked[source]:  # nobody waits for whether it takes what it gets
                sender.put_if_room(send)
            else:
                sender.put(send)

    def _selections_here(self, handle: Handle, idx: np.ndarray) -> int:
        El = handle.num_local_experts
        ranks = self.fabric.locals
        return int(((idx >= ranks[0] * El) & (idx < (ranks[-1] + 1) * El)).sum())

    def close(self) -> bool:
        """Close all connections, after what is queued has been sent."""
        self._closing = True
        self._ended.set()
        for sender in [*self._to_proxy.values(), *self._to_source.values()]:
            sender.close()
        self.fabric.end_waits()
        for arrived in self._partials.values():
            arrived.close()
        for thread in self._threads:
            thread.join(5.0)
        return not any(thread.is_alive() for thread in self._threads)


def _send(frame: Frame, data: Any, channel: comm.Channel) -> None:
    channel.send(frame, data)
