"""The gateway: to the API an engine, behind it units of processes.

In: requests, as `Engine.add` takes them. Out: their deltas, in order, none twice, whatever dies. A
thread of its own carries out what the pure router (`serve/core/router.py`) decides, reads the
ranks' reports, and starts units again. Seeds are fixed here, so that an answer can be resumed.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from whalefall import comm
from whalefall.engine import Delta, EngineStats, SamplingParams
from whalefall.engine.core.block_manager import block_hash
from whalefall.engine.structured import Grammars
from whalefall.errors import LimitError, MissingError, WhalefallError
from whalefall.model import load_config, load_tokenizer
from whalefall.serve.core import Effect, Kind, Place, Router
from whalefall.serve.units import messages as m
from whalefall.serve.units.experts import ExpertBalancer
from whalefall.serve.units.fleet import Fleet, Unit
from whalefall.serve.units.layout import UnitsConfig
from whalefall.serve.units.scaling import Scaler

__all__ = ["Gateway"]

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


class Gateway:
    """The engine's interface (`add`, `cancel`, `step`, `stats`) over units of processes.

    Args:
        model_path: checkpoint folder.
        config: units and their settings.
    Attributes:
        model, tokenizer, grammars, max_model_len: as an `Engine`'s.
    Raises: RankFailure where the units do not come up.
    """

    def __init__(self, model_path: str | Path, config: UnitsConfig) -> None:
        self.config = config
        self.model = load_config(model_path)
        try:
            self.tokenizer = load_tokenizer(Path(model_path), self.model.vocab_size)
        except MissingError:
            self.tokenizer = None  # type: ignore[assignment]
        self.grammars = Grammars(self.tokenizer, self.model.vocab_size, self.model.eos_token_ids)
        self.max_model_len = 0
        self.fleet = Fleet(str(model_path), config)
        self.router = Router(config.ahead)
        self.experts = ExpertBalancer(config)
        self.scaler = Scaler(config)
        self._stats: dict[Place, m.Stats] = {}
        self._gone = m.Stats()  # counters of ranks that ended
        self._answers: dict[str, _Answer] = {}
        self._open: dict[str, int] = {}
        self._arrivals = 0
        self._lock = threading.Lock()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[Delta | None] = queue.SimpleQueue()
        self._failure: Exception | None = None
        self._closing = False
        self._selector = selectors.DefaultSelector()
        self._listener = comm.listen()
        self._bell, self._ear = socket.socketpair()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._selector.register(self._ear, selectors.EVENT_READ, None)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gateway", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            self.close()
            raise self._failure

    # ---- the engine's interface

    def add(
        self,
        request_id: str,
        prompt: list[int],
        params: SamplingParams,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> None:
        """Queue a request. Raises: LimitError for a prompt that leaves no room for an answer."""
        if not 0 < len(prompt) < self.max_model_len:
            raise LimitError(
                f"the prompt has {len(prompt)} tokens, the context holds {self.max_model_len} with "
                "the answer; shorten it"
            )
        seed = params.seed if params.seed is not None else secrets.randbits(62)
        with self._lock:
            self._open[request_id] = params.n
        self._call(
            lambda: self._add(request_id, list(prompt), params, seed, priority, cache_salt or "")
        )

    def cancel(self, request_id: str) -> None:
        """End a request; unknown ids are ignored."""
        self._call(lambda: self._cancel(request_id))

    def has_work(self) -> bool:
        """Whether `step` has something to wait for."""
        return bool(self._open) or not self._outbox.empty()

    def step(self) -> list[Delta]:
        """What came in since the last call; waits for something, but not long."""
        if self._failure is not None:
            raise self._failure
        deltas = []
        with contextlib.suppress(queue.Empty):
            deltas.append(self._outbox.get(timeout=TICK_S))
            while True:
                deltas.append(self._outbox.get_nowait())
        return [delta for delta in deltas if delta is not None]

    def wake(self) -> None:
        """Let a waiting `step` return."""
        self._outbox.put(None)

    def stats(self) -> EngineStats:
        """Counters since the start and present load, over all ranks."""
        with self._lock:
            states = [a.state for a in list(self.router.answers.values())]
            waiting = sum(state in ("waiting", "ready") for state in states)
            every = [self._gone, *self._stats.values()]
        total = {name: sum(getattr(s, name) for s in every) for name in m.Stats.__struct_fields__}
        shape = (self.model.num_layers, max(self.model.num_experts, 1))
        load = self.experts.total()
        return EngineStats(
            running=len(states) - waiting,
            waiting=waiting,
            kv_used=total["kv_used"],
            kv_total=total["kv_total"],
            prefix_queries=total["prefix_queries"],
            prefix_hits=total["prefix_hits"],
            prompt_tokens=total["prompt_tokens"],
            generated_tokens=total["generated_tokens"],
            preemptions=total["preemptions"],
            disk_hits=total["disk_hits"],
            disk_failures=total["disk_failures"],
            expert_load=np.zeros(shape, np.int64) if load is None else load,
        )

    def unit_stats(self) -> dict[Place, m.Stats]:
        """The last counters of each rank that lives."""
        with self._lock:
            return dict(self._stats)

    def close(self) -> None:
        """End all units; safe to repeat."""
        if not self._closing:
            self._closing = True
            self._bell.send(b"!")
            self._thread.join(30)
            self.fleet.close()
            self._selector.close()
            for each in (self._listener, self._bell, self._ear):
                each.close()

    # ---- the thread

    def _call(self, call: Callable[[], None]) -> None:
        self._inbox.put(call)
        self._bell.send(b"!")

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
            log.exception("the gateway failed")
            self._failure = error
            self._ready.set()
            self.wake()

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
                self._ready.set()

    def _read(self, unit: Unit, place: Place, channel: comm.Channel) -> None:
        try:
            report, _ = channel.recv(m.Report)
        except (WhalefallError, OSError):
            self._lose(unit)
            return
        with self._lock:
            self._stats[place] = report.stats
        if report.expert_load is not None:
            self.experts.see(place, np.array(report.expert_load, np.int64))
        for event in report.events:
            self._take(event)

    def _look(self) -> None:
        for unit in self.fleet.dead():
            self._lose(unit)
        now = time.monotonic()
        for unit in list(self.fleet.units.values()):
            if not unit.up and now - unit.began_s > self.config.ready_s:
                log.warning("%s was not ready after %.0f s", unit.name, self.config.ready_s)
                self._lose(unit)
            elif unit.draining and self.router.is_empty(unit.name):
                self._perform(self._remove(unit, failed=False))
        for name, placed in self.experts.look(now):
            if name in self.router.units:
                self._send(self.fleet.units[name], 0, placed, everyone=True)
        if self._ready.is_set():
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

    def _lose(self, unit: Unit) -> None:
        if unit.name not in self.fleet.units:
            return
        wanted = not unit.draining
        effects = self._remove(unit, failed=True)
        log.warning("%s died: %s", unit.name, self.fleet.failures[-1])
        if wanted:
            self._start(unit.kind)
        self._perform(effects)

    def _remove(self, unit: Unit, failed: bool) -> list[Effect]:
        for channel in unit.channels.values():
            self._selector.unregister(channel.socket)
        with self._lock:
            for place in [p for p in self._stats if p.unit == unit.name]:
                self._gone = _kept(self._gone, self._stats.pop(place))
        self.experts.unit_down(unit.name)
        self.fleet.remove(unit, failed)
        return self.router.unit_down(unit.name)

    # ---- answers

    def _add(
        self, request_id: str, prompt: list[int], params: SamplingParams, seed: int, priority: int,
        salt: str,
    ) -> None:  # fmt: skip
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
            with self._lock:
                effects = self.router.add(
                    key, len(prompt), reserve, (priority, self._arrivals), hashes, after
                )
            self._perform(effects)
        self.scaler.prompt(len(prompt))

    def _cancel(self, request_id: str) -> None:
        for key in [k for k, a in self._answers.items() if a.request_id == request_id]:
            answer = self._answers[key]
            with self._lock:
                effects = self.router.cancel(key)
            self._perform(effects)
            self._deliver(answer, m.Tokens(key, [], "", None, "cancelled", None, 0))

    def _take(self, event: m.Event) -> None:
        event.key, _, attempt = event.key.rpartition("#")
        answer, known = self._answers.get(event.key), self.router.answers.get(event.key)
        if answer is None or known is None or attempt != str(known.restarts):
            return  # of a rank that lost it meanwhile
        effects: list[Effect] = []
        with self._lock:
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
        self._outbox.put(
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
            with self._lock:
                self._open[answer.request_id] -= 1
                if not self._open[answer.request_id]:
                    del self._open[answer.request_id]

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
