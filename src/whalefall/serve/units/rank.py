"""The process of one rank of a unit: commands in, steps with the other ranks, reports out.

A thread reads the gateway's commands; the main thread heeds them between steps. Where no rank has
work, all sleep until the next command, which every rank of the unit gets.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from whalefall import comm, ep, eplb, jit, trace
from whalefall.engine import EngineConfig
from whalefall.engine.core.sequence import BLOCK_SIZE
from whalefall.engine.outputs import Delta
from whalefall.engine.unit_engine import UnitEngine
from whalefall.errors import MissingError, WhalefallError
from whalefall.serve.units import messages as m
from whalefall.serve.units.handover import Outbox, fetch
from whalefall.serve.units.words import speak

__all__ = ["main"]

EP_TIMEOUT_S = 120.0  # how long a living rank may compute; a dead one is seen at once
HANG_UP_S = 2.0  # within which all ranks of a unit hear that the gateway is gone
BEHIND_S = 0.001  # a command that another rank has seen is on its way
LOADS_S = 1.0  # between reports of expert loads


def main(
    unit: str, rank: int, size: int, kind: str, model: str, folder: str, port: int,
    engine: dict[str, Any], transfer: str, overlap: bool, redundant: int, threads: int,
    trace_folder: str = "",
) -> None:  # fmt: skip
    """Run until the gateway hangs up; once it knows us, SIGTERM is for the gateway to heed.

    Args:
        unit, rank, size, kind: who this is.
        model: checkpoint folder.
        folder: this unit's own; its parent holds the token.
        port: the gateway's.
        engine, transfer, overlap, redundant: as `UnitsConfig`.
        threads: of the kernel pool.
        trace_folder: where to write a trace at the end, if anywhere.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's: the gateway tells us
    speak()
    jit.set_num_threads(threads)
    if trace_folder:
        trace.start(f"{unit} rank {rank}", rank=rank)
    token = comm.read_token(Path(folder).parent / "token")
    group = None
    if size > 1:
        meeting = ep.FileGroup(folder, rank, size, timeout_s=120.0)
        group = ep.Engine(meeting, timeout_s=EP_TIMEOUT_S, chunk_bytes=1 << 20)
    config = EngineConfig(**engine)
    own = UnitEngine(model, config, group, kind == "prefill", overlap, redundant)
    outbox = Outbox(f"kv-{os.getpid()}", config.kv_dtype, token, transfer == "shm")
    channel = comm.connect("127.0.0.1", port, token)
    # A whole process group may be told to end; open answers are finished first.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Rank(unit, rank, own, outbox, channel, token).run()
    if trace_folder:
        with contextlib.suppress(WhalefallError):
            trace.stop(Path(trace_folder) / f"{unit}-{rank}.json.gz")
    os._exit(0)  # threads of sockets may still wait


class Rank:
    """Heeds commands, steps the engine, reports."""

    def __init__(
        self,
        unit: str,
        rank: int,
        engine: UnitEngine,
        outbox: Outbox,
        channel: comm.Channel,
        token: bytes,
    ) -> None:
        self.engine, self.outbox, self.channel, self.token = engine, outbox, channel, token
        self.seen = self.rounds = self.placement = 0
        self.events: list[m.Event] = []
        self._inbox: queue.SimpleQueue[m.Command | None] = queue.SimpleQueue()
        self._hung_up = threading.Event()
        self._loads_at = 0.0
        kv_tokens = engine.stats().kv_total * BLOCK_SIZE
        hello = m.Hello(unit, rank, os.getpid(), engine.max_model_len, kv_tokens)
        channel.send(hello)
        threading.Thread(target=self._read, name="commands", daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(WhalefallError, OSError):
            while True:
                command, _ = self.channel.recv(m.Command)
                self._inbox.put(command)
        self._hung_up.set()
        self._inbox.put(None)

    def run(self) -> None:
        """Until the gateway is gone.

        Raises: RankFailure where another rank failed before that.
        """
        try:
            self._run()
        except (WhalefallError, OSError):
            # ranks that heard it first have left the step that we wait in, or our report
            if not self._hung_up.wait(HANG_UP_S):
                raise

    def _run(self) -> None:
        idle, behind = True, False
        while True:
            if not self._heed(idle, behind):
                return
            found = self.engine.round(self.seen)
            self.rounds += 1
            idle = found.idle
            behind = not found.busy
            self.events += [_tokens(delta) for delta in found.deltas]
            for key, pages in found.handed:
                self.events.append(m.Prefilled(key, self.outbox.put(key, pages)))
            self._report(idle)

    def _heed(self, idle: bool, behind: bool) -> bool:
        """Take all commands that are there, waiting for one if there is nothing to do."""
        wait_s = None if idle else BEHIND_S if behind else 0.0
        while True:
            try:
                command = self._inbox.get(wait_s is None or wait_s > 0, wait_s)
            except queue.Empty:
                return True
            if command is None:
                return False
            self.seen, wait_s = command.number, 0.0
            if command.body is not None:
                self._do(command.body)

    def _do(self, body: m.Body) -> None:
        try:
            if isinstance(body, m.Prefill):
                job = body.job
                self.engine.start(
                    job.key, job.prompt, job.params, job.seed, job.index, job.priority, job.salt,
                    body.silent,
                )  # fmt: skip
            elif isinstance(body, m.Decode):
                self._decode(body)
            elif isinstance(body, m.Cancel):
                self.engine.cancel(body.key)
            elif isinstance(body, m.Release):
                self.outbox.release(body.key)
            else:
                self._place(body)
        except WhalefallError as error:
            key = body.job.key if isinstance(body, m.Prefill | m.Decode) else ""
            self.events.append(m.Refused(key, str(error)))

    def _decode(self, body: m.Decode) -> None:
        job = body.job
        try:
            pages = fetch(body.transfer, self.token)
        except MissingError:
            self.events.append(m.Lost(job.key))
            return
        self.engine.resume(
            job.key, job.prompt, body.generated, pages, job.params, job.seed, job.index,
            job.priority, body.cached,
        )  # fmt: skip
        self.events.append(m.Admitted(job.key))

    def _place(self, body: m.Placed) -> None:
        slots = np.array(body.phy2log, np.int64)
        loads = np.ones((len(slots), self.engine.model.num_experts))
        ranks = self.engine.num_ranks
        self.engine.place(
            eplb.rebalance(loads, slots.shape[1], 1, 1, ranks, previous=slots, max_moves=0)
        )
        self.placement = body.version

    def _report(self, idle: bool) -> None:
        loads, now = None, time.monotonic()
        if now - self._loads_at > LOADS_S or (idle and self._loads_at):
            loads, self._loads_at = self.engine.stats().expert_load.tolist(), 0.0 if idle else now
        if not (self.events or idle or loads is not None):
            return
        self.channel.send(m.Report(self.events, self._stats(), loads))
        self.events = []

    def _stats(self) -> m.Stats:
        stats = self.engine.stats()
        clock = getattr(self.engine.runner.step, "clock", None)
        return m.Stats(
            running=stats.running,
            waiting=stats.waiting,
            kv_used=stats.kv_used,
            kv_total=stats.kv_total,
            prefix_queries=stats.prefix_queries,
            prefix_hits=stats.prefix_hits,
            prompt_tokens=stats.prompt_tokens,
            generated_tokens=stats.generated_tokens,
            preemptions=stats.preemptions,
            rounds=self.rounds,
            placement=self.placement,
            communication_s=clock.communication_s if clock else 0.0,
            overlapped_s=clock.overlapped_s if clock else 0.0,
            disk_hits=stats.disk_hits,
            disk_failures=stats.disk_failures,
            spec_drafted=stats.spec_drafted,
            spec_accepted=stats.spec_accepted,
        )


def _tokens(delta: Delta) -> m.Tokens:
    return m.Tokens(
        delta.request_id, delta.token_ids, delta.text, delta.logprobs, delta.finish_reason,
        delta.stop_reason, delta.num_cached_tokens,
    )  # fmt: skip
