"""Engine room: `LLM`, for scripts: prompts in, finished answers out.

In: texts or token ids. Out: `RequestOutput`s, logits. Thin over `Engine`; vLLM's habit.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

import numpy as np

from whalefall.arguments import shown
from whalefall.engine.config import EngineConfig
from whalefall.engine.core import Scheduled, Sequence
from whalefall.engine.core.sequence import BLOCK_SIZE
from whalefall.engine.engine import Engine
from whalefall.engine.kv_cache import KVCache
from whalefall.engine.outputs import Completion, Delta, RequestOutput
from whalefall.engine.sampling_params import SamplingParams
from whalefall.engine.step_arrays import step_batch
from whalefall.errors import ConfigError, LimitError

__all__ = ["LLM"]


class LLM:
    """A checkpoint ready to answer.

    Attributes:
        engine: what does the work.
        tokenizer: the checkpoint's.
    """

    def __init__(self, model: str | Path, **settings: Any) -> None:
        """Load a checkpoint; `settings` are those of `EngineConfig` (compute, kv, …)."""
        self.engine = Engine(model, EngineConfig(**settings))
        self.tokenizer = self.engine.tokenizer

    def generate(
        self,
        prompts: str | Items[str] | Items[Items[int]],
        params: SamplingParams | Items[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answer prompts, all at once.

        Args:
            prompts: texts, or lists of token ids.
            params: for all of them, or one for each.
        Returns: one output a prompt, in order.
        Raises: ConfigError where prompts and params are of different numbers.
        """
        items: Items[Any] = [prompts] if isinstance(prompts, str) else prompts
        each = _one_each(params, len(items))
        outputs = [self._output(i, *pair) for i, pair in enumerate(zip(items, each, strict=True))]
        by_id = {output.request_id: output for output in outputs}
        added: list[str] = []
        try:
            for output, wanted in zip(outputs, each, strict=True):
                self.engine.add(output.request_id, output.prompt_token_ids, wanted)
                added.append(output.request_id)
            while self.engine.has_work():
                for delta in self.engine.step():
                    _take(by_id[delta.request_id], delta)
        except BaseException:
            for request_id in added:
                self.engine.cancel(request_id)
            self.engine.step()
            raise
        return outputs

    def chat(
        self, messages: Items[dict[str, Any]], params: SamplingParams | None = None, **kwargs: Any
    ) -> RequestOutput:
        """Answer a conversation through the checkpoint's chat template."""
        if self.tokenizer is None:
            raise ConfigError("chat: this checkpoint has no tokenizer")
        return self.generate([self.tokenizer.apply_chat_template(messages, **kwargs)], params)[0]

    def _output(
        self, index: int, prompt: str | Items[int], params: SamplingParams
    ) -> RequestOutput:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ConfigError("generate: this checkpoint has no tokenizer; pass token ids")
            prompt = self.tokenizer.encode(prompt)
        answers = [
            Completion(n, logprobs=None if params.logprobs is None else []) for n in range(params.n)
        ]
        return RequestOutput(f"llm-{index}", list(prompt), answers)

    def logits(self, tokens: Items[int], chunk: int | None = None) -> np.ndarray:
        """Logits [len, vocab] fp32 of every position, computed as one prompt.

        Args:
            tokens: token ids, at most the context.
            chunk: tokens of a step; None: all at once. The result does not depend on it.
        """
        engine = self.engine
        if not 0 < len(tokens) <= engine.model.max_position_embeddings:
            raise LimitError(f"logits: got {len(tokens)} tokens")
        blocks = -(-len(tokens) // BLOCK_SIZE)
        cache = KVCache(
            engine.model.num_layers, blocks, engine.model.latent_dim, engine.config.kv_dtype
        )
        seq = Sequence("logits", list(tokens), len(tokens), blocks=list(range(blocks)))
        parts = []
        for start in range(0, len(tokens), chunk or len(tokens)):
            count = min(chunk or len(tokens), len(tokens) - start)
            item = Scheduled(seq, start, count, True)
            parts.append(
                engine.runner.step(step_batch([item], True, np.arange(count)), cache.array)
            )
        return np.concatenate(parts)


def _one_each(given: Any, count: int) -> Items[SamplingParams]:
    if given is None or isinstance(given, SamplingParams):
        return [given or SamplingParams()] * count
    if not isinstance(given, Items) or not all(isinstance(one, SamplingParams) for one in given):
        raise ConfigError(
            f"generate: params is {shown(given)}, wanted SamplingParams; pass one, or one a prompt"
        )
    if len(given) != count:
        raise ConfigError(
            f"generate: {len(given)} params for {count} prompts; pass one, or one a prompt"
        )
    return given


def _take(output: RequestOutput, delta: Delta) -> None:
    answer = output.outputs[delta.index]
    answer.text += delta.text
    answer.token_ids += delta.token_ids
    if answer.logprobs is not None and delta.logprobs:
        answer.logprobs += delta.logprobs
    answer.finish_reason, answer.stop_reason = delta.finish_reason, delta.stop_reason
    if delta.index == 0:
        output.num_cached_tokens = delta.num_cached_tokens
