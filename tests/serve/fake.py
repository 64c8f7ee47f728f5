"""An engine without a model, for what a real one cannot do on demand: block, fail, be full.

It answers with the prompt's own tokens, one a step, so that every request's right answer is known.
"""

from __future__ import annotations

import codecs
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from whalefall.engine import Delta, EngineStats, SamplingParams, TokenLogprobs


class FakeTokenizer:
    """One token a byte; `template_source` says which family's tags it knows."""

    def __init__(self, template_source: str = "", opens: str = "") -> None:
        self.template_source = template_source
        self.opens = opens  # what the template ends a prompt with
        self.shown: dict[str, Any] = {}

    def id_of(self, token: str) -> int | None:
        return ord(token) if len(token) == 1 else None

    def is_added(self, token_id: int) -> bool:
        return False

    def is_special(self, token_id: int) -> bool:
        return False

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        return bytes(ids).decode("utf-8", "replace")

    def token(self, token_id: int) -> str:
        return chr(token_id)

    def apply_chat_template(self, messages: list[dict[str, Any]], **shown: Any) -> list[int]:
        self.shown = {"messages": messages, **shown}
        return self.encode(messages[-1]["content"] + self.opens)


@dataclass
class Running:
    prompt: list[int]
    params: SamplingParams
    done: dict[int, int] = field(default_factory=dict)
    texts: dict[int, codecs.IncrementalDecoder] = field(
        default_factory=lambda: defaultdict(codecs.getincrementaldecoder("utf-8"))
    )


class EchoEngine:
    """Implements the engine's interface as the server uses it."""

    model = SimpleNamespace(vocab_size=256)
    max_model_len = 64

    def __init__(self, batch: int = 4, tokenizer: FakeTokenizer | None = None) -> None:
        self.tokenizer = tokenizer or FakeTokenizer()
        self.batch = batch
        self.requests: dict[str, Running] = {}
        self.cancelled: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.fail_next = False

    def add(self, request_id: str, prompt: list[int], params: SamplingParams,
            priority: int = 0, cache_salt: str | None = None) -> None:  # fmt: skip
        self.requests[request_id] = Running(prompt, params, dict.fromkeys(range(params.n), 0))

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)
        self.requests.pop(request_id, None)

    def has_work(self) -> bool:
        return bool(self.requests)

    def step(self) -> list[Delta]:
        self.gate.wait(30)
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("out of ink")
        deltas = []
        for request_id in list(self.requests)[: self.batch]:
            deltas += self._advance(request_id, self.requests[request_id])
        return deltas

    def _advance(self, request_id: str, running: Running) -> list[Delta]:
        deltas = []
        for index, position in list(running.done.items()):
            token = running.prompt[position % len(running.prompt)]
            last = position + 1 == min(running.params.max_tokens, len(running.prompt))
            wanted = running.params.logprobs is not None
            delta = Delta(
                request_id=request_id, index=index, token_ids=[token],
                text=running.texts[index].decode(bytes([token]), last),
                logprobs=[TokenLogprobs(token, -0.5, 1, ((token, -0.5),))] if wanted else None,
                finish_reason=("length" if last else None), stop_reason=None,
                num_prompt_tokens=len(running.prompt), num_cached_tokens=1,
            )  # fmt: skip
            deltas.append(delta)
            running.done[index] = position + 1
            if last:
                del running.done[index]
        if not running.done:
            self.requests.pop(request_id, None)
        return deltas

    def stats(self) -> EngineStats:
        running = min(len(self.requests), self.batch)
        return SimpleNamespace(
            running=running, waiting=len(self.requests) - running, kv_used=1, kv_total=4,
            prefix_queries=10, prefix_hits=5, prompt_tokens=0, generated_tokens=0, preemptions=0,
            expert_load=np.array([[1, 3], [1, 3]]), spec_drafted=8, spec_accepted=6,
            communication_s=2.0, overlapped_s=1.8,
        )  # type: ignore[return-value]  # fmt: skip
