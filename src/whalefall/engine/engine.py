"""Engine room: requests in, deltas out, one step at a time.

In: a checkpoint folder, requests (`add`, `cancel`). Out: `step()` computes one batch and returns
what it added to each answer. One thread calls `step`; `add` and `cancel` may come from others.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from whalefall.engine.answer import Answer
from whalefall.engine.config import EngineConfig
from whalefall.engine.core import Batch, BlockManager, DraftPolicy, Scheduler, Sequence
from whalefall.engine.core.sequence import BLOCK_SIZE
from whalefall.engine.disk_prefix import DiskPrefix, fingerprint
from whalefall.engine.draft_costs import step_costs
from whalefall.engine.drafter import Drafter
from whalefall.engine.kv_cache import KVCache
from whalefall.engine.model_runner import ModelRunner
from whalefall.engine.outputs import Delta, EngineStats
from whalefall.engine.request_check import check_request
from whalefall.engine.sampling import TokenLogprobs, sample
from whalefall.engine.sampling_params import SamplingParams
from whalefall.engine.structured import Grammars
from whalefall.engine.turn import Turn, draft
from whalefall.errors import ConfigError, MissingError
from whalefall.model import Checkpoint, Tokenizer, load_config, load_tokenizer, load_weights
from whalefall.model.step import Step, make_step

__all__ = ["Engine", "Request"]

_DEFAULT_KV_BYTES = 1 << 30
_DISK_WAIT_S = 0.005  # a step without other work looks for cancellations so often
_CACHED_BYTES = 64 << 20  # what a step may read without waiting for memory
_LOAD_STEPS = 256  # steps between looks at the experts' load


@dataclass
class Request:
    """The answers of one request; those after the first wait until the prompt is computed."""

    answers: list[Answer]
    held_back: list[Answer]


class Engine:
    """Serves requests on one checkpoint.

    Attributes:
        config: the settings, with what was left open filled in.
        model: the checkpoint's `ModelConfig`.
        grammars: compiles the forms that answers must have.
        tokenizer: None where the checkpoint has none (token ids only).
        max_model_len: longest prompt and answer together.
    """

    def __init__(self, model_path: str | Path, config: EngineConfig | None = None) -> None:
        """Map the checkpoint and the KV cache; weights are read in the background."""
        self.config = config or EngineConfig()
        self.model = load_config(model_path)
        checkpoint = Checkpoint(model_path)
        self.weights = load_weights(checkpoint, self.model)
        self.tokenizer = _tokenizer(Path(model_path), self.model.vocab_size)
        self._speculative = self._wants_drafts()
        self.grammars = Grammars(self.tokenizer, self.model.vocab_size, self.model.eos_token_ids)
        wanted, longest = self.config.max_model_len, self.model.max_position_embeddings
        if wanted is not None and wanted > longest:
            raise ConfigError(f"max_model_len is {wanted}, this model knows {longest} positions")
        num_blocks = self._num_blocks()
        self.max_model_len = min(
            self.config.max_model_len or longest,
            num_blocks * BLOCK_SIZE,
        )
        kv_dtype = self.config.kv_dtype
        cache = KVCache(self._kv_layers, num_blocks, self.model.latent_dim, kv_dtype)
        step = self._make_step()
        self.runner = ModelRunner(step, cache, Drafter(step, cache) if self._speculative else None)
        max_drafts = self.config.draft_tokens if self._speculative else 0
        self._policy = DraftPolicy(step_costs(self.weights, self.model), max_drafts)
        self._steps = 0
        self._blocks = BlockManager(num_blocks, self.config.strict_prefix)
        self._scheduler = Scheduler(
            self._blocks, self.config.max_batch_tokens, self.config.max_sequences
        )
        self._disk: DiskPrefix | None = None
        if self.config.prefix_cache:
            name = fingerprint(model_path, self.config.compute, kv_dtype, cache.array.shape[0])
            size = self.config.prefix_cache_bytes
            self._disk = DiskPrefix(self.config.prefix_cache, name, cache.array, size)
        self._requests: dict[str, Request] = {}
        self._answer_of: dict[str, Answer] = {}
        self._cancelled: list[Delta] = []
        self._arrivals = 0
        self._prompt_tokens = self._generated_tokens = 0
        self._lock = threading.Lock()
        checkpoint.populate()

    def _wants_drafts(self) -> bool:
        if self.config.speculative and not self.weights.mtp:
            raise ConfigError("speculative: the checkpoint has no MTP layer to draft with")
        if self.config.speculative is None:
            costs = step_costs(self.weights, self.model)
            return bool(self.weights.mtp) and costs.step + costs.expert >= _CACHED_BYTES
        return self.config.speculative

    @property
    def _kv_layers(self) -> int:
        return self.model.num_layers + self._speculative

    def _make_step(self) -> Step:
        return make_step(self.weights, self.model, self.config.compute, self.max_model_len)

    def _num_blocks(self) -> int:
        block = KVCache.block_bytes(self._kv_layers, self.model.latent_dim, self.config.kv_dtype)
        if self.config.num_blocks is not None:
            return self.config.num_blocks
        if self.config.kv_cache_bytes is not None:
            if self.config.kv_cache_bytes < block:
                raise ConfigError(
                    f"kv_cache_bytes is {self.config.kv_cache_bytes}, one block takes {block}"
                )
            return self.config.kv_cache_bytes // block
        wanted = -(-(self.config.max_model_len or 1) // BLOCK_SIZE)
        return max(wanted, _DEFAULT_KV_BYTES // block)

    def add(
        self,
        request_id: str,
        prompt: Items[int],
        params: SamplingParams,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> None:
        """Queue a request.

        Args:
            request_id: the caller's name for it; must not be in use.
            prompt: token ids.
            params: sampling and stopping.
            priority: lower runs earlier.
            cache_salt: only requests with the same salt share cached prefixes.
        Raises: LimitError for a prompt that leaves no room for an answer, ConfigError for ids or
            settings that make no sense.
        """
        self._check(request_id, prompt, params)
        seed = params.seed if params.seed is not None else secrets.randbits(63)
        with self._lock:
            if request_id in self._requests:
                raise ConfigError(f"add: request {request_id!r} is running already")
            answers = [
                self._answer(request_id, index, list(prompt), params, seed, priority, cache_salt)
                for index in range(params.n)
            ]
            self._requests[request_id] = Request(answers, answers[1:])
            self._enqueue(answers[0].seq)

    def _enqueue(self, seq: Sequence) -> None:
        """Let a sequence wait: first for the disk, where that may have more of its prompt."""
        if self._disk is None or not self._disk.fetch(seq, self._blocks):
            self._scheduler.add(seq)

    def _take_fetched(self) -> None:
        """Queue the sequences that the disk is done with; wait for one if nothing else is to do."""
        if self._disk is not None and self._disk.is_fetching:
            busy = self._scheduler.running or self._scheduler.waiting
            for seq in self._disk.arrived(self._blocks, 0.0 if busy else _DISK_WAIT_S):
                self._scheduler.add(seq)

    def _check(self, request_id: str, prompt: Items[int], params: SamplingParams) -> None:
        check_request(request_id, prompt, params, self.max_model_len, self.model.vocab_size)

    def _answer(
        self,
        request_id: str,
        index: int,
        prompt: list[int],
        params: SamplingParams,
        seed: int,
        priority: int,
        salt: str | None,
    ) -> Answer:
        wanted = params.structured_outputs
        matcher = self.grammars.matcher(wanted) if wanted is not None else None
        seq_id = f"{index}/{request_id}"
        seq = Sequence(seq_id, prompt, len(prompt), salt or "", priority, self._arrivals)
        self._arrivals += 1
        answer = Answer(
            request_id,
            index,
            seq,
            params,
            seed,
            self.tokenizer,
            self.model.eos_token_ids,
            self.max_model_len,
            matcher,
        )
        self._answer_of[seq_id] = answer
        return answer

    def cancel(self, request_id: str) -> None:
        """End a request; its last deltas come with the next step. Unknown ids are ignored."""
        with self._lock:
            request = self._requests.get(request_id)
            if request is None:
                return
            for answer in request.answers:
                if answer.finish_reason is None:
                    self._cancelled.append(answer.cancel())
                    self._forget(answer)

    def _forget(self, answer: Answer) -> None:
        """Take a finished answer out of all books."""
        request = self._requests[answer.request_id]
        if answer in request.held_back:
            request.held_back.remove(answer)
        elif self._disk is None or not self._disk.forget(answer.seq):
            self._scheduler.remove(answer.seq)
            self.runner.forget(answer.seq.seq_id)
        del self._answer_of[answer.seq.seq_id]
        if not any(each.seq.seq_id in self._answer_of for each in request.answers):
            del self._requests[answer.request_id]

    def has_work(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._requests or self._cancelled)

    def step(self) -> list[Delta]:
        """Compute one batch. Returns: what it added, answer by answer."""
        with self._lock:
            deltas, self._cancelled = self._cancelled, []
            self._take_fetched()
            batch = self._scheduler.schedule(self._num_drafts())
            answers = {i.seq.seq_id: self._answer_of[i.seq.seq_id] for i in batch.scheduled}
        if not batch.scheduled:
            return deltas
        start = time.perf_counter()
        logits = self.runner.run(batch, partial(draft, answers))
        self._observe_time(batch, time.perf_counter() - start)
        with self._lock:
            return deltas + self._commit(batch, logits)

    def _observe_time(self, batch: Batch, seconds: float) -> None:
        """Time steps that only generate, all sequences with equally many drafts."""
        counts = {len(batch.drafts.get(item.seq.seq_id, ())) for item in batch.scheduled}
        if self._speculative and len(counts) == 1 and not any(i.in_prompt for i in batch.scheduled):
            self._policy.observe_step(len(batch.scheduled), counts.pop(), seconds)

    def _num_drafts(self) -> int:
        """Drafts for each generating sequence of the next step."""
        if not self._speculative:
            return 0
        if self._steps % _LOAD_STEPS == 0:
            routed = [self.model.is_moe(layer) for layer in range(self.model.num_layers)]
            self._policy.set_loads(self.runner.step.expert_load[routed].tolist())
        self._steps += 1
        count = self._policy.num_drafts(sum(not s.in_prompt for s in self._scheduler.running))
        assert self.runner.drafter is not None
        self.runner.drafter.keep_up = self._policy.is_on
        return count

    def _commit(self, batch: Batch, logits: dict[str, np.ndarray]) -> list[Delta]:
        # sequences cancelled while the step ran are gone from the books
        batch.scheduled = [i for i in batch.scheduled if i.seq.seq_id in self._answer_of]
        self._scheduler.commit(batch)
        for item in batch.scheduled:
            self._prompt_tokens += item.count if item.in_prompt else 0
            if self._disk is not None and item.in_prompt and not item.seq.in_prompt:
                self._disk.keep(item.seq)
        ids = [i.seq.seq_id for i in batch.scheduled if i.seq.seq_id in logits]
        turns = [Turn(self._answer_of[i], logits[i], batch.drafts.get(i, ())) for i in ids]
        going = turns
        while going:
            chosen = sample([turn.answer.sample_row(turn.next_logits) for turn in going])
            going = [
                turn for turn, found in zip(going, chosen, strict=True) if self._take(turn, *found)
            ]
        return [self._finish(turn) for turn in turns]

    def _take(self, turn: Turn, token: int, logprobs: TokenLogprobs | None) -> bool:
        """Add a sampled token; True if it is the next draft, whose own logits are there too."""
        answer, place = turn.answer, len(turn.tokens)
        turn.tokens.append(token)
        turn.text += answer.push(token)
        if logprobs is not None:
            turn.logprobs.append(logprobs)
        self._generated_tokens += 1
        if place == len(turn.drafts) or token != turn.drafts[place]:
            return False
        turn.num_accepted += 1
        if answer.finish_reason is not None:
            return False
        self._scheduler.accept(answer.seq)
        return True

    def _finish(self, turn: Turn) -> Delta:
        answer = turn.answer
        if turn.drafts:
            self._policy.observe(len(turn.drafts), turn.num_accepted)
        self._release_siblings(answer)
        if answer.finish_reason is not None:
            self._forget(answer)
        return answer.delta(turn.tokens, turn.text, turn.logprobs or None)

    def _release_siblings(self, answer: Answer) -> None:
        """Start the other answers of a request, whose prompt is in the prefix cache now."""
        request = self._requests[answer.request_id]
        for sibling in request.held_back:
            self._scheduler.add(sibling.seq)
        request.held_back.clear()

    def stats(self) -> EngineStats:
        """Counters and present load."""
        with self._lock:
            return EngineStats(
                running=len(self._scheduler.running),
                waiting=len(self._scheduler.waiting),
                kv_used=self._blocks.num_used,
                kv_total=self._blocks.num_blocks,
                prefix_queries=self._blocks.query_tokens,
                prefix_hits=self._blocks.hit_tokens,
                prompt_tokens=self._prompt_tokens,
                generated_tokens=self._generated_tokens,
                preemptions=self._scheduler.num_preemptions,
                expert_load=self.runner.step.expert_load.copy(),
                spec_drafted=self._policy.num_drafted,
                spec_accepted=self._policy.num_accepted,
                disk_hits=self._disk.hit_tokens if self._disk else 0,
                disk_failures=self._disk.failures if self._disk else 0,
            )


def _tokenizer(folder: Path, vocab_size: int) -> Tokenizer | None:
    try:
        return load_tokenizer(folder, vocab_size)
    except MissingError:
        return None
