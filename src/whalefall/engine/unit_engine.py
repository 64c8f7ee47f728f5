"""Engine room: the engine of one rank of a unit.

In: jobs (one answer each): prompts to compute and hand over, or pages of a prompt and the tokens
generated after it, to go on from. Out: deltas, and pages. Ranks step together: `round` is
collective where the unit has several, and a rank without work takes part with no tokens.
Determinism: a resumed answer's tokens are computed again in the generated form, as they were.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from whalefall import ep, eplb
from whalefall.engine.answer import Answer
from whalefall.engine.config import EngineConfig
from whalefall.engine.core import Batch
from whalefall.engine.engine import Engine, Request
from whalefall.engine.outputs import Delta
from whalefall.engine.sampling_params import SamplingParams
from whalefall.engine.step_arrays import step_batch
from whalefall.engine.turn import draft
from whalefall.model.expert_parallel import ExpertParallelStep, even_placement

__all__ = ["Round", "UnitEngine"]

_PLACE, _FETCHING = 4, 8  # a rank has a placement to take over, or prompts to read from the disk
_SEEN = 1 << 20  # command numbers are compared modulo this


@dataclass
class Round:
    """What a round brought.

    Attributes:
        deltas: what was added to answers.
        handed: answers whose prompt is computed, with their pages.
        busy: some rank had work.
        idle: none had, and all have seen the same commands.
    """

    deltas: list[Delta]
    handed: list[tuple[str, np.ndarray]]
    busy: bool
    idle: bool


class UnitEngine(Engine):
    """An `Engine` that shares its experts with other ranks, and whose prompts or answers end or
    begin elsewhere.

    Args:
        model_path, config: as `Engine`.
        ranks: this rank's end of the unit's group; None: a unit of one rank.
        hand_over: answers leave with their first token (a prefill unit).
        overlap: dual-batch overlap.
        redundant: replicas of experts beside one of each.
    """

    def __init__(
        self,
        model_path: str | Path,
        config: EngineConfig,
        ranks: ep.Engine | None = None,
        hand_over: bool = False,
        overlap: bool = False,
        redundant: int = 0,
    ) -> None:
        self._ranks, self._hand_over = ranks, hand_over
        self._overlap, self._redundant = overlap, redundant
        self._silent: set[str] = set()
        self._next_placement: eplb.Placement | None = None
        super().__init__(model_path, config)

    def _make_step(self) -> Any:
        if self._ranks is None or not self.model.num_experts:
            return super()._make_step()
        return ExpertParallelStep(
            self.weights,
            self.model,
            self.config.compute,
            self.max_model_len,
            self._ranks,
            even_placement(self.model, self._ranks.num_ranks, self._redundant),
            self._overlap,
        )

    @property
    def num_ranks(self) -> int:
        """Ranks of the unit."""
        return 1 if self._ranks is None else self._ranks.num_ranks

    # ---- answers

    def start(
        self,
        key: str,
        prompt: Items[int],
        params: SamplingParams,
        seed: int,
        index: int = 0,
        priority: int = 0,
        salt: str | None = None,
        silent: bool = False,
    ) -> None:
        """Compute a prompt; `silent`: its first token is known and not reported again.

        Raises: as `Engine.add`.
        """
        self._check(key, prompt, params)
        with self._lock:
            answer = self._alone(key, prompt, params, seed, index, priority, salt)
            if silent:
                self._silent.add(key)
            self._enqueue(answer.seq)

    def resume(
        self,
        key: str,
        prompt: Items[int],
        generated: Items[int],
        pages: np.ndarray,
        params: SamplingParams,
        seed: int,
        index: int = 0,
        priority: int = 0,
        cached: int = 0,
    ) -> None:
        """Go on with an answer.

        Args:
            generated: its tokens so far, at least one.
            pages: [layers, blocks, 64, latent + rope] KV of the prompt, the MTP layer's behind the
                model's where both sides draft.
            cached: tokens of the prompt that came from a cache, to be reported.
        """
        with self._lock:
            answer = self._alone(key, prompt, params, seed, index, priority, None)
            for token in generated:
                answer.push(token)  # text, penalties and limits as they were
            seq = answer.seq
            seq.num_computed, seq.num_cached, seq.swapped = seq.num_prompt, cached, True
            self.runner.cache.put_aside(seq.seq_id, pages)
            self._scheduler.add(seq)

    def _alone(
        self, key: str, prompt: Items[int], params: SamplingParams, seed: int, index: int,
        priority: int, salt: str | None,
    ) -> Answer:  # fmt: skip
        answer = self._answer(key, index, list(prompt), params, seed, priority, salt)
        self._requests[key] = Request([answer], [])
        return answer

    def cancel(self, request_id: str) -> None:
        """End an answer; unknown ones are ignored."""
        self._silent.discard(request_id)
        super().cancel(request_id)

    # ---- steps

    def place(self, placement: eplb.Placement) -> None:
        """Take a placement over as soon as every rank has it."""
        self._next_placement = placement

    def round(self, seen: int) -> Round:
        """Compute one batch together with the other ranks; `seen` commands have been heeded.

        Raises: RankFailure naming a rank that failed.
        """
        with self._lock:
            deltas, self._cancelled = self._cancelled, []
            self._take_fetched()
            batch = self._scheduler.schedule(0 if self._hand_over else self._num_drafts())
            answers = {i.seq.seq_id: self._answer_of[i.seq.seq_id] for i in batch.scheduled}
        bits = sum({1 << item.in_prompt for item in batch.scheduled})
        everybody = self._gather(bits, seen)
        start = time.perf_counter()
        logits = self._run(batch, everybody, answers)
        self._observe_time(batch, time.perf_counter() - start)
        with self._lock:
            deltas += self._commit(batch, logits)
            handed = self._hand_overs(deltas) if self._hand_over else []
        if self._silent:
            deltas = [d for d in deltas if d.request_id not in self._silent or d.finish_reason]
            self._silent -= {key for key, _ in handed}
        busy = bool((everybody & 15).any())
        same = bool((everybody == everybody[0]).all())
        return Round(deltas, handed, busy, not busy and same)

    def _gather(self, bits: int, seen: int) -> np.ndarray:
        """[ranks] what each has: phases, a placement, and the commands seen, from bit 4 on."""
        bits |= _PLACE * (self._next_placement is not None)
        bits |= _FETCHING * (self._disk is not None and self._disk.is_fetching)
        number = seen % _SEEN << 4 | bits
        everybody = np.array([number]) if self._ranks is None else self._ranks.gather(number)
        if self._next_placement is not None and (everybody & _PLACE).all():
            self.runner.step.place(self._next_placement)  # type: ignore[attr-defined]
            self._next_placement = None
        return everybody

    def _run(
        self, batch: Batch, everybody: np.ndarray, answers: dict[str, Answer]
    ) -> dict[str, np.ndarray]:
        runner, found = self.runner, {}
        runner.prepare(batch, partial(draft, answers))
        for in_prompt in (False, True):
            items = [item for item in batch.scheduled if item.in_prompt == in_prompt]
            if items:
                found.update(runner.run_phase(items, in_prompt, batch.drafts))
            elif (everybody >> in_prompt & 1).any():
                none = step_batch([], in_prompt, np.zeros(0, np.int32))
                runner.step(none, runner.cache.array)
        return found

    def _hand_overs(self, deltas: Items[Delta]) -> list[tuple[str, np.ndarray]]:
        """Take the answers that got their first token out of all books, with their pages."""
        handed = []
        for delta in deltas:
            request = self._requests.get(delta.request_id)
            if request is None or delta.finish_reason is not None:
                continue
            answer = request.answers[0]
            if self.runner.drafter is not None:
                self.runner.drafter.catch_up(answer.seq)
            handed.append((delta.request_id, self.runner.cache.pages(answer.seq.blocks)))
            answer.finish_reason = "moved"
            self._forget(answer)
        return handed
