"""The thread behind the gateway: carries out what the router decides.

In: requests and cancellations (as calls that other threads post), reports of ranks, time. Out:
deltas to `deliver`, commands to ranks; units are started, watched, started again and drained.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np

from whalefall import comm
from whalefall.engine import Delta, SamplingParams
from whalefall.engine.core.block_manager import block_hash
from whalefall.errors import WhalefallError
from whalefall.model import ModelConfig
from whalefall.serve.core import Effect, Kind, Place, Router
from whalefall.serve.units import messages as m
from whalefall.serve.units.experts import ExpertBalancer
from whalefall.serve.units.fleet import Fleet, Unit
from whalefall.serve.units.layout import UnitsConfig
from whalefall.serve.units.scaling import Scaler

__all__ = ["BLOCK", "TICK_S", "Control"]

log = logging.getLogger("whalefall.serve")
TICK_S = 0.1
RESERVE = 1024  # tokens of an answer that room is kept for, at most
BLOCK = 64


@dataclass
class _Answer:
    """What the gateway knows of one answer.

    Attributes:
        generated: tokens that were delivered.
        transfer: where its KV lies, between prefill and decode.
    """

    request_id: str
    job: m.Job
    generated: list[int] = field(default_factory=list)
    transfer: m.Transfer | None = None
    cached: int | None = None


class Control:
    """Units, answers, and the thread that keeps them going.

    Args:
        model_path: checkpoint folder.
        model: its config.
        config: units and their settings.
        deliver: called with each delta, in the thread.
    Attributes:
        ready: set once all units are up, or the thread has failed.
        failure: why the thread ended, if it did.
        max_model_len: as the ranks' engines say; 0 before the first is up.
        lock: held while the router's or the ranks' books change.
    """

    def __init__(
        self,
        model_path: str,
        model: ModelConfig,
        config: UnitsConfig,
        deliver: Callable[[Delta | None], None],
    ) -> None:
        self.model, self.config, self.deliver = model, config, deliver
        self.max_model_len = 0
        self.fleet = Fleet(model_path, config)
        self.router = Router(config.ahead)
        self.experts = ExpertBalancer(config)
        self.scaler = Scaler(config)
        self.stats: dict[Place, m.Stats] = {}
        self.gone = m.Stats()  # counters of ranks that ended
        self.lock = threading.Lock()
        self.ready = threading.Event()
        self.failure: Exception | None = None
        self._answers: dict[str, _Answer] = {}
        self._arrivals = 0
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._closing = False
        self._selector = selectors.DefaultSelector()
        self._listener = comm.listen()
        self._bell, self._ear = socket.socketpair()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._selector.register(self._ear, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._run, name="gateway", daemon=True)
        self._thread.start()

    def post(self, call: Callable[[], None]) -> None:
        """Let the thread call something soon."""
        self._inbox.put(call)
        self._bell.send(b"!")

    def close(self) -> None:
        """End all units; safe to repeat."""
        if self._closing:
            return
        self._closing = True
        self._bell.send(b"!")
        self._thread.join(30)
        self.fleet.close()
        self._selector.close()
        for each in (self._listener, self._bell, self._ear):
            each.close()

    # ---- the thread

    def _run(self) -> None:
        try:
            for kind, layout in (("prefill", self.config.prefill), ("decode", self.config.decode)):
                for _ in range(layout.units):
                    self._start(kind)  # type: ignore[arg-type]
            look = 0.0
            while not self._closing:
                for key, _ in self._selector.select(TICK_S):
                    self._readable(key.fileobj, key.data)
                while not self._inbox.empty():
                    self._inbox.get()()
                if time.monotonic() >= look:
                    look = time.monotonic() + TICK_S
                    self._look()
        except Exception as error:
            if not isinstance(error, WhalefallError):  # those are raised again, as one line
                log.exception("the gateway failed")
            self.failure = error
            self.ready.set()
            self.deliver(None)

    def _start(self, kind: Kind) -> None:
        self.fleet.start(kind, self._listener.getsockname()[1])

    def _readable(self, what: Any, data: Any) -> None:
        if what is self._ear:
            self._ear.recv(4096)
        elif what is self._listener:
            self._welcome()
        else:
            self._read(*data)

    def _welcome(self) -> None:
        try:
            channel = comm.accept(self._listener, self.fleet.token)
            channel.settimeout(30.0)
            hello, _ = channel.recv(m.Hello)
        except (WhalefallError, OSError):
            return  # a stranger, or a rank that died at once
        unit = self.fleet.units.get(hello.unit)
        if unit is None:
            channel.close()
            return
        unit.channels[hello.rank] = channel
        place = Place(unit.name, hello.rank)
        self._selector.register(channel.socket, selectors.EVENT_READ, (unit, place, channel))
        self.max_model_len = hello.max_model_len
        if len(unit.channels) == unit.ranks:
            unit.up = True
            sequences = self.config.engine.get("max_sequences", 128)
            effects = self.router.unit_up(
                unit.name, unit.kind, unit.ranks, hello.kv_tokens, sequences
            )
            self.experts.unit_up(unit.name, unit.ranks, self.model)
            self._perform(effects)
            if all(u.up for u in self.fleet.units.values()):
                self.ready.set()

    def _read(self, unit: Unit, place: Place, channel: comm.Channel) -> None:
        try:
            report, _ = channel.recv(m.Report)
        except (WhalefallError, OSError) as error:
            self._lose(unit, f"rank {place.rank}'s connection broke: {error}")
            return
        with self.lock:
            self.stats[place] = report.stats
        if report.expert_load is not None:
            self.experts.see(place, np.array(report.expert_load, np.int64))
        for event in report.events:
            self._take(event)

    def _look(self) -> None:
        for unit in self.fleet.dead():
            self._lose(unit, "a process ended")
        now = time.monotonic()
        for unit in list(self.fleet.units.values()):
            if not unit.up and now - unit.began_s > self.config.ready_s:
                self._lose(unit, f"not ready after {self.config.ready_s:.0f} s")
            elif unit.draining and self.router.is_empty(unit.name):
                self._perform(self._remove(unit, failed=False))
        for name, placed in self.experts.look(now):
            if name in self.router.units:
                self._send(self.fleet.units[name], 0, placed, everyone=True)
        if self.ready.is_set():
            self._scale(now)

    def _scale(self, now: float) -> None:
        for kind in ("prefill", "decode"):
            units = [u for u in self.fleet.units.values() if u.kind == kind and not u.draining]
            for _ in range(self.scaler.missing(kind, len(units), now)):
                self._start(kind)
            for unit in units[: max(0, self.scaler.spare(kind, len(units)))]:
                unit.draining = True
                if unit.up:
                    self.router.drain(unit.name)

    def _lose(self, unit: Unit, seen: str) -> None:
        if unit.name not in self.fleet.units:
            return
        wanted = not unit.draining
        effects = self._remove(unit, failed=True, seen=seen)
        log.warning("%s died: %s", unit.name, self.fleet.failures[-1])
        if wanted:
            self._start(unit.kind)
        self._perform(effects)

    def _remove(self, unit: Unit, failed: bool, seen: str = "") -> list[Effect]:
        for channel in unit.channels.values():
            self._selector.unregister(channel.socket)
        with self.lock:
            for place in [p for p in self.stats if p.unit == unit.name]:
                self.gone = _kept(self.gone, self.stats.pop(place))
        self.experts.unit_down(unit.name)
        self.fleet.remove(unit, failed, seen)
        return self.router.unit_down(unit.name)

    # ---- answers

    def add(
        self, request_id: str, prompt: list[int], params: SamplingParams, seed: int, priority: int,
        salt: str,
    ) -> None:  # fmt: skip
        """Take a request in (in the thread)."""
        hashes: list[bytes] = []
        for start in range(0, len(prompt) - BLOCK, BLOCK):
            previous = hashes[-1] if hashes else b""
            hashes.append(block_hash(previous, prompt[start : start + BLOCK], salt))
        reserve = min(params.max_tokens or RESERVE, RESERVE, self.max_model_len - len(prompt))
        single = replace(params, n=1)
        for index in range(params.n):
            key = f"{index}/{request_id}"
            job = m.Job(key, prompt, single, seed, index, priority, salt)
            self._answers[key] = _Answer(request_id, job)
            self._arrivals += 1
            after = f"0/{request_id}" if index else None
            with self.lock:
                effects = self.router.add(
                    key, len(prompt), reserve, (priority, self._arrivals), hashes, after
                )
            self._perform(effects)
        self.scaler.prompt(len(prompt))

    def cancel(self, request_id: str) -> None:
        """Let go of a request (in the thread); unknown ids are ignored."""
        for key in [k for k, a in self._answers.items() if a.request_id == request_id]:
            answer = self._answers[key]
            with self.lock:
                effects = self.router.cancel(key)
            self._perform(effects)
            self._deliver(answer, m.Tokens(key, [], "", None, "cancelled", None, 0))

    def _take(self, event: m.Event) -> None:
        event.key, _, attempt = event.key.rpartition("#")
        answer, known = self._answers.get(event.key), self.router.answers.get(event.key)
        if answer is None or known is None or attempt != str(known.restarts):
            return  # of a rank that lost it meanwhile
        effects: list[Effect] = []
        with self.lock:
            if isinstance(event, m.Tokens):
                if event.finish_reason is not None:
                    effects = self.router.finished(event.key)
            elif isinstance(event, m.Prefilled):
                answer.transfer = event.transfer
                effects = self.router.prefilled(event.key)
            elif isinstance(event, m.Admitted):
                answer.transfer = None
                effects = self.router.admitted(event.key)
            elif isinstance(event, m.Lost):
                effects = self.router.lost(event.key)
            else:
                effects = self.router.finished(event.key)
        if isinstance(event, m.Tokens):
            self._deliver(answer, event)
        elif isinstance(event, m.Refused):
            log.warning("%s was refused: %s", event.key, event.message)
            self._deliver(answer, m.Tokens(event.key, [], "", None, "error", event.message, 0))
        self._perform(effects)

    def _deliver(self, answer: _Answer, event: m.Tokens) -> None:
        """Hand an event on to the API (its key without the attempt)."""
        answer.generated += event.token_ids
        self.scaler.output(len(event.token_ids))
        if answer.cached is None:
            answer.cached = event.cached
        self.deliver(
            Delta(
                request_id=answer.request_id,
                index=answer.job.index,
                token_ids=event.token_ids,
                text=event.text,
                logprobs=event.logprobs,
                finish_reason=event.finish_reason,
                stop_reason=event.stop_reason,
                num_prompt_tokens=len(answer.job.prompt),
                num_cached_tokens=answer.cached,
            )
        )
        if event.finish_reason is not None:
            del self._answers[event.key]

    # ---- effects

    def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            answer = self._answers.get(effect.key)
            if effect.kind == "fail":
                if answer is not None:
                    text = "its units died again and again"
                    self._deliver(answer, m.Tokens(effect.key, [], "", None, "error", text, 0))
                continue
            assert effect.place is not None
            unit = self.fleet.units.get(effect.place.unit)
            body = self._body(effect, answer)
            if unit is not None and body is not None:
                self._send(unit, effect.place.rank, body)

    def _body(self, effect: Effect, answer: _Answer | None) -> m.Body | None:
        if effect.kind == "release":
            return m.Release(f"{effect.key}#{effect.attempt}")
        if effect.kind == "cancel":
            return m.Cancel(f"{effect.key}#{effect.attempt}")
        if answer is None:
            return None
        job = msgspec.structs.replace(answer.job, key=f"{effect.key}#{effect.attempt}")
        if effect.kind == "prefill":
            return m.Prefill(job, bool(answer.generated))
        assert answer.transfer is not None
        return m.Decode(job, answer.generated, answer.cached or 0, answer.transfer)

    def _send(self, unit: Unit, rank: int, body: m.Body, everyone: bool = False) -> None:
        """Give a rank a command, and all ranks of its unit its number."""
        unit.number += 1
        for number, channel in unit.channels.items():
            own = body if everyone or number == rank else None
            with contextlib.suppress(WhalefallError, OSError):  # its death is noticed elsewhere
                channel.send(m.Command(unit.number, own))


def _kept(total: m.Stats, last: m.Stats) -> m.Stats:
    """Counters of ranks that ended, without their load."""
    load = ("running", "waiting", "kv_used", "kv_total", "placement")
    return m.Stats(
        **{
            name: 0 if name in load else getattr(total, name) + getattr(last, name)
            for name in m.Stats.__struct_fields__
        }
    )
