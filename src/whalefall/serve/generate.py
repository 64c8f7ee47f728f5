"""Runs one API request over the engine: collected into one answer, or streamed as events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from whalefall.serve.answers import Answer, usage
from whalefall.serve.failures import ApiError, error_body
from whalefall.serve.forms import ChatForm
from whalefall.serve.logprobs import chat_logprobs, completion_logprobs
from whalefall.serve.metrics import Metrics
from whalefall.serve.split import Piece, Splitter
from whalefall.serve.worker import EngineWorker, RequestStream

if TYPE_CHECKING:
    from whalefall.engine import Delta

__all__ = ["Generation", "Prompt"]


@dataclass(frozen=True)
class Prompt:
    """One prompt of a request and its engine stream; `echo` is sent before the generated text."""

    stream: RequestStream
    first_index: int
    echo: str = ""


@dataclass
class Choice:
    """What has been generated of one choice."""

    splitter: Splitter
    pieces: list[Piece] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    characters: int = 0
    finish_reason: str = ""
    stop_reason: int | str | None = None


class Counts:
    """Tokens of a request as its deltas arrive, and the times that the metrics want."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.prompt: dict[str, tuple[int, int]] = {}
        self.completion = self.reasoning = 0
        self.last: dict[tuple[str, int], float] = {}
        self.start = time.monotonic()

    def see(self, delta: Delta) -> None:
        """Count one delta."""
        now = time.monotonic()
        key = (delta.request_id, delta.index)
        tokens = len(delta.token_ids)
        if delta.request_id not in self.prompt:
            self.prompt[delta.request_id] = (delta.num_prompt_tokens, delta.num_cached_tokens)
            self.metrics.prompt(delta.num_prompt_tokens, delta.num_cached_tokens)
        if key not in self.last:
            self.metrics.first_token(now - self.start)
        elif tokens:
            self.metrics.next_tokens((now - self.last[key]) / tokens, tokens)
        self.last[key] = now
        self.completion += tokens
        self.metrics.output(tokens)

    def usage(self) -> dict[str, Any]:
        """The usage object so far."""
        prompt = sum(p for p, _ in self.prompt.values())
        cached = sum(c for _, c in self.prompt.values())
        return usage(prompt, self.completion, cached, self.reasoning)


class Generation:
    """One request under way.

    Args:
        answer: the response's identity.
        prompts: its prompts, already submitted.
        worker, metrics: the server's.
        choices: choices in all (n for each prompt).
        form: how answers are taken apart; None: they are plain text.
        keep_alive_s: silence after which a stream sends a comment.
    """

    def __init__(
        self,
        answer: Answer,
        prompts: list[Prompt],
        worker: EngineWorker,
        metrics: Metrics,
        choices: int,
        keep_alive_s: float,
        form: ChatForm | None = None,
    ) -> None:
        self.answer = answer
        self.prompts = prompts
        self.worker = worker
        self.metrics = metrics
        self.counts = Counts(metrics)
        self.form = form
        make = form.splitter if form is not None else Splitter
        self.choices = [Choice(make()) for _ in range(choices)]
        self.keep_alive_s = keep_alive_s

    def close(self) -> None:
        """Let go of the engine's streams; what still runs is cancelled."""
        for prompt in self.prompts:
            self.worker.close(prompt.stream)

    def logprobs(self, index: int, tokens: list[Any], before: int) -> dict[str, Any] | None:
        """The logprobs object of some tokens of a choice."""
        if not tokens:
            return None
        piece = self.worker.tokenizer.token
        if self.answer.chat:
            return chat_logprobs(tokens, piece)
        return completion_logprobs(tokens, piece, before)

    async def collect(self) -> dict[str, Any]:
        """Wait for everything and return the whole response."""
        try:
            await asyncio.gather(*(self._collect_one(prompt) for prompt in self.prompts))
        finally:
            self.close()
        choices = []
        for index, choice in enumerate(self.choices):
            logprobs = self.logprobs(index, choice.logprobs, 0)
            choices.append(
                self.answer.whole_choice(
                    index,
                    choice.pieces,
                    logprobs,
                    choice.finish_reason,
                    choice.stop_reason,
                )
            )
        body = self.answer.envelope(choices, chunk=False)
        body["usage"] = self.counts.usage()
        return body

    async def _collect_one(self, prompt: Prompt) -> None:
        for choice in self._choices_of(prompt):
            choice.pieces.append(Piece("content", prompt.echo))
        async for delta in prompt.stream:
            self.counts.see(delta)
            choice = self.choices[prompt.first_index + delta.index]
            choice.pieces += self._pieces(choice, delta)
            choice.logprobs += delta.logprobs or []
            if delta.finish_reason is not None:
                choice.finish_reason = self._reason(choice, delta.finish_reason)
                choice.stop_reason = delta.stop_reason

    def _pieces(self, choice: Choice, delta: Delta) -> list[Piece]:
        """What a delta adds to a choice, taken apart."""
        if choice.splitter.reasoning:
            self.counts.reasoning += len(delta.token_ids)
        pieces = choice.splitter.feed(delta.text)
        return pieces if delta.finish_reason is None else pieces + choice.splitter.end()

    def _reason(self, choice: Choice, reason: str) -> str:
        """The finish_reason that the API gives."""
        if reason == "stop" and choice.splitter.num_calls and self.form is not None:
            return self.form.calls_end_as
        return reason

    def _choices_of(self, prompt: Prompt) -> list[Choice]:
        each = len(self.choices) // len(self.prompts)
        return self.choices[prompt.first_index : prompt.first_index + each]

    async def events(self, include_usage: bool, continuous_usage: bool) -> AsyncIterator[bytes]:
        """The server-sent events of the response, [DONE] last.

        An error after the first byte becomes an `error` event, since the status is gone.
        """
        try:
            for index in range(len(self.choices)):
                if self.answer.chat:
                    yield self._event([self.answer.first_choice(index)], continuous_usage)
            for prompt in self.prompts:
                async for event in self._prompt_events(prompt, continuous_usage):
                    yield event
            if include_usage:
                body = self.answer.envelope([], chunk=True)
                body["usage"] = self.counts.usage()
                yield sse(body)
            yield b"data: [DONE]\n\n"
        except ApiError as error:
            yield sse(error_body(error.status, error.message, error.param, error.code))
        finally:
            self.close()

    async def _prompt_events(self, prompt: Prompt, usage_too: bool) -> AsyncIterator[bytes]:
        if prompt.echo:
            for offset in range(len(self._choices_of(prompt))):
                choice = self.answer.chunk_choice(
                    prompt.first_index + offset, Piece("content", prompt.echo), None, None
                )
                yield self._event([choice], usage_too)
        while True:
            try:
                delta = await prompt.stream.next(self.keep_alive_s)
            except TimeoutError:
                yield b": keep-alive\n\n"
                continue
            if delta is None:
                return
            self.counts.see(delta)
            for choice in self._chunks(prompt, delta):
                yield self._event([choice], usage_too)

    def _chunks(self, prompt: Prompt, delta: Delta) -> list[dict[str, Any]]:
        """A delta as chunks: one a piece; the last one carries log-probabilities and the end."""
        index = prompt.first_index + delta.index
        choice = self.choices[index]
        logprobs = self.logprobs(index, list(delta.logprobs or []), choice.characters)
        choice.characters += len(delta.text)
        pieces: list[Piece | None] = [*self._pieces(choice, delta)]
        reason = delta.finish_reason
        if not pieces and (logprobs or reason is not None):
            pieces = [None]
        if reason is not None:
            reason = self._reason(choice, reason)
        chunk = self.answer.chunk_choice
        last = len(pieces) - 1
        return [
            chunk(index, piece, logprobs, reason, delta.stop_reason)
            if number == last
            else chunk(index, piece, None, None)
            for number, piece in enumerate(pieces)
        ]

    def _event(self, choices: list[dict[str, Any]], usage_too: bool) -> bytes:
        body = self.answer.envelope(choices, chunk=True)
        if usage_too:
            body["usage"] = self.counts.usage()
        return sse(body)


def sse(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(body) + b"\n\n"
