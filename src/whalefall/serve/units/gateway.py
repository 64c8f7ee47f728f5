"""The gateway: to the API an engine, behind it units of processes.

In: requests, as `Engine.add` takes them. Out: their deltas, in order, none twice, whatever dies.
Seeds are fixed here, so that an answer can be resumed; the rest is `Control`'s.
"""

from __future__ import annotations

import contextlib
import queue
import secrets
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from whalefall.engine import Delta, EngineStats, SamplingParams
from whalefall.engine.request_check import check_request
from whalefall.engine.structured import Grammars
from whalefall.errors import MissingError
from whalefall.model import load_config, load_tokenizer
from whalefall.serve.core import Place
from whalefall.serve.units import messages as m
from whalefall.serve.units.control import TICK_S, Control
from whalefall.serve.units.layout import UnitsConfig

__all__ = ["Gateway"]


class Gateway:
    """The engine's interface (`add`, `cancel`, `step`, `stats`) over units of processes.

    Args:
        model_path: checkpoint folder.
        config: units and their settings.
        on_failure: called once if units cannot be kept up any more.
    Attributes:
        model, tokenizer, grammars, max_model_len: as an `Engine`'s.
        fleet, router, experts: the units, the books over their answers, the expert balancer.
    Raises: RankFailure where the units do not come up.
    """

    def __init__(
        self,
        model_path: str | Path,
        config: UnitsConfig,
        on_failure: Callable[[], None] | None = None,
    ) -> None:
        self.model = load_config(model_path)
        try:
            self.tokenizer = load_tokenizer(Path(model_path), self.model.vocab_size)
        except MissingError:
            self.tokenizer = None  # type: ignore[assignment]
        self.grammars = Grammars(self.tokenizer, self.model.vocab_size, self.model.eos_token_ids)
        self._on_failure: Callable[[], None] | None = None
        self._open: dict[str, int] = {}
        self._lock = threading.Lock()
        self._outbox: queue.SimpleQueue[Delta | None] = queue.SimpleQueue()
        self._control = Control(str(model_path), self.model, config, self._deliver)
        self.fleet, self.router = self._control.fleet, self._control.router
        self.experts = self._control.experts
        self._control.ready.wait()
        if self._control.failure is not None:
            self.close()
            raise self._control.failure
        self._on_failure = on_failure  # until here a failure is raised
        if self._control.failure is not None and on_failure is not None:
            on_failure()  # it failed just now
        self.max_model_len = self._control.max_model_len

    def _deliver(self, delta: Delta | None) -> None:
        self._outbox.put(delta)
        if delta is None and self._on_failure is not None:  # the thread has failed
            self._on_failure()
        if delta is not None and delta.finish_reason is not None:
            with self._lock:
                self._open[delta.request_id] -= 1
                if not self._open[delta.request_id]:
                    del self._open[delta.request_id]

    def add(
        self,
        request_id: str,
        prompt: list[int],
        params: SamplingParams,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> None:
        """Queue a request. Raises: as `Engine.add`; RankFailure once units cannot be kept up."""
        if self._control.failure is not None:
            raise self._control.failure
        check_request(request_id, prompt, params, self.max_model_len, self.model.vocab_size)
        if params.structured_outputs is not None:
            self.grammars.matcher(params.structured_outputs)  # refuse here what no rank can compile
        seed = params.seed if params.seed is not None else secrets.randbits(62)
        with self._lock:
            self._open[request_id] = params.n
        own, salt = list(prompt), cache_salt or ""
        self._control.post(lambda: self._control.add(request_id, own, params, seed, priority, salt))

    def cancel(self, request_id: str) -> None:
        """End a request; unknown ids are ignored."""
        self._control.post(lambda: self._control.cancel(request_id))

    def has_work(self) -> bool:
        """Whether `step` has something to wait for."""
        return bool(self._open) or not self._outbox.empty()

    def step(self) -> list[Delta]:
        """What came in since the last call; waits for something, but not long."""
        if self._control.failure is not None:
            with self._lock:
                self._open.clear()
            raise self._control.failure
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
        with self._control.lock:
            states = [a.state for a in list(self.router.answers.values())]
            waiting = sum(state in ("waiting", "ready") for state in states)
            every = [self._control.gone, *self._control.stats.values()]
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
            spec_drafted=total["spec_drafted"],
            spec_accepted=total["spec_accepted"],
            communication_s=total["communication_s"],
            overlapped_s=total["overlapped_s"],
            expert_load=np.zeros(shape, np.int64) if load is None else load,
        )

    @property
    def failure(self) -> Exception | None:
        """Why no unit can be kept up any more, if so."""
        return self._control.failure

    def unit_stats(self) -> dict[Place, m.Stats]:
        """The last counters of each rank that lives."""
        with self._control.lock:
            return dict(self._control.stats)

    def close(self) -> None:
        """End all units; safe to repeat."""
        self._control.close()
