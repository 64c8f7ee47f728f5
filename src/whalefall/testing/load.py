"""Drives any OpenAI-compatible server with load, and measures what its users would feel.

In: a URL. Out: a `Sweep` line per concurrency: request, input and output throughput; mean, median
and 99th percentile of the time to the first token (TTFT), the time per output token after it
(TPOT) and the gap between chunks (ITL). A closed loop: each of `concurrency` clients sends its next
request when its last one has ended. Only the standard library is used.
Source: the measures that vLLM's `bench serve` and SGLang's `bench_serving` report.
"""

from __future__ import annotations

import http.client
import itertools
import json
import queue
import random
import threading
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from whalefall.errors import ConfigError, MissingError

__all__ = ["Answer", "Server", "Spread", "Sweep", "drive", "summarize"]

WORDS = ("copy", "each", "file", "line", "list", "names", "print", "sort", "time", "user")


@dataclass(frozen=True)
class Answer:
    """What one request took; times in seconds.

    Attributes:
        ttft_s: until the first chunk with text.
        latency_s: until the end.
        gaps_s: between chunks with text.
        input_tokens, output_tokens: as the server's `usage` says; where it says nothing, 0 and
            the number of chunks.
        error: why it failed; "" where it did not.
    """

    ttft_s: float = 0.0
    latency_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    input_tokens: int = 0
    output_tokens: int = 0
    error: str = ""


@dataclass(frozen=True)
class Spread:
    """Mean, median and 99th percentile, in milliseconds."""

    mean: float
    median: float
    p99: float


@dataclass(frozen=True)
class Sweep:
    """One concurrency of a sweep; rates are per second of the whole run."""

    concurrency: int
    answered: int
    failed: int
    seconds: float
    requests_s: float
    input_tokens_s: float
    output_tokens_s: float
    ttft_ms: Spread | None
    tpot_ms: Spread | None
    itl_ms: Spread | None
    error: str = ""


class Server:
    """An OpenAI-compatible server at `url` (with or without the trailing /v1).

    Raises: ConfigError for a URL that is none, MissingError where nothing answers or the server
        names no model.
    """

    def __init__(
        self, url: str, api_key: str = "", model: str = "", timeout_s: float = 600
    ) -> None:
        self._url = urllib.parse.urlsplit(url if "//" in url else f"http://{url}")
        try:
            usable = self._url.scheme in ("http", "https") and self._url.hostname
            _ = self._url.port
        except ValueError:
            usable = False
        if not usable:
            raise ConfigError(f"bench serve: --url is {url!r}, wanted http://HOST:PORT")
        self._base = self._url.path.rstrip("/").removesuffix("/v1")
        self._timeout_s = timeout_s
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self.model = model or self._first_model()

    def _connection(self) -> http.client.HTTPConnection:
        secure = self._url.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        return kind(self._url.hostname or "", self._url.port, timeout=self._timeout_s)

    def _first_model(self) -> str:
        link = self._connection()
        address = f"{self._url.netloc}{self._base}/v1/models"
        try:
            link.request("GET", f"{self._base}/v1/models", headers=self._headers)
            with link.getresponse() as answer:
                status, body = answer.status, answer.read(1 << 20)
            if status != 200:
                said = body[:200].decode("utf-8", "replace")
                raise MissingError(f"bench serve: {address} says {status}: {said}")
            return str(json.loads(body)["data"][0]["id"])
        except (OSError, http.client.HTTPException) as error:
            raise MissingError(f"bench serve: {address} does not answer ({error})") from None
        except (ValueError, LookupError, TypeError):
            raise MissingError(
                f"bench serve: {address} names no model; is it an OpenAI server? --model-name says "
                "which to ask"
            ) from None
        finally:
            link.close()

    def ask(self, text: str, max_tokens: int, ignore_eos: bool = False) -> Answer:
        """One streamed chat completion at temperature 0; a failure is an Answer with `error`."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if ignore_eos:
            body["ignore_eos"] = True
        link = self._connection()
        start = time.perf_counter()
        try:
            path = f"{self._base}/v1/chat/completions"
            link.request("POST", path, json.dumps(body), self._headers)
            with link.getresponse() as reply:
                if reply.status != 200:
                    said = reply.read(300).decode("utf-8", "replace")
                    return Answer(error=f"{reply.status}: {said}")
                return _measure(reply, start)
        except (OSError, http.client.HTTPException, ValueError) as error:
            return Answer(error=f"{type(error).__name__}: {error}")
        finally:
            link.close()


def _events(reply: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in reply:
        if line.startswith(b"data:"):
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            yield json.loads(data)


def _measure(reply: http.client.HTTPResponse, start: float) -> Answer:
    times: list[float] = []
    usage: dict[str, Any] = {}
    ended = False
    for event in _events(reply):
        if "error" in event:
            return Answer(error=str(event["error"])[:300])
        usage = event.get("usage") or usage
        for choice in event.get("choices") or []:
            delta = choice.get("delta") or {}
            if any(delta.get(k) for k in ("content", "reasoning", "reasoning_content")):
                times.append(time.perf_counter())
            ended = ended or bool(choice.get("finish_reason"))
    end = time.perf_counter()
    if not ended:
        return Answer(error="the stream ended without a finish_reason")
    first = times[0] if times else end
    return Answer(
        first - start,
        end - start,
        [late - early for early, late in itertools.pairwise(times)],
        int(usage.get("prompt_tokens") or 0),
        int(usage.get("completion_tokens") or len(times)),
    )


def prompts(number: int, words: int, seed: int) -> list[str]:
    """`number` texts of `words` words that share no beginning, so that no prefix cache helps."""
    chance = random.Random(seed)
    lead = [f"{seed}.{i}" for i in range(number)]
    return [" ".join([lead[i], *chance.choices(WORDS, k=max(0, words - 1))]) for i in range(number)]


def drive(
    server: Server,
    concurrency: int,
    requests: int,
    words: int = 64,
    max_tokens: int = 64,
    ignore_eos: bool = False,
    seed: int = 0,
) -> Sweep:
    """Send `requests` prompts of `words` words, at most `concurrency` at a time."""
    if min(concurrency, requests, words, max_tokens) < 1:
        raise ConfigError(
            f"bench serve: concurrency {concurrency}, {requests} requests, {words} words, "
            f"{max_tokens} tokens; wanted 1 or more of each"
        )
    todo: queue.SimpleQueue[str] = queue.SimpleQueue()
    for text in prompts(requests, words, seed):
        todo.put(text)
    answers: list[Answer] = []

    def client() -> None:
        while True:
            try:
                text = todo.get_nowait()
            except queue.Empty:
                return
            answers.append(server.ask(text, max_tokens, ignore_eos))

    clients = [threading.Thread(target=client, daemon=True) for _ in range(concurrency)]
    start = time.perf_counter()
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    return summarize(concurrency, answers, time.perf_counter() - start)


def summarize(concurrency: int, answers: Sequence[Answer], seconds: float) -> Sweep:
    """The line of one run."""
    good = [a for a in answers if not a.error]
    bad = [a.error for a in answers if a.error]
    tpot = [(a.latency_s - a.ttft_s) / (a.output_tokens - 1) for a in good if a.output_tokens > 1]
    return Sweep(
        concurrency,
        len(good),
        len(bad),
        seconds,
        len(good) / seconds,
        sum(a.input_tokens for a in good) / seconds,
        sum(a.output_tokens for a in good) / seconds,
        _spread([a.ttft_s for a in good]),
        _spread(tpot),
        _spread([gap for a in good for gap in a.gaps_s]),
        bad[0] if bad else "",
    )


def _spread(values_s: Sequence[float]) -> Spread | None:
    """Nearest-rank percentiles; None of no values."""
    if not values_s:
        return None
    ordered = sorted(1e3 * value for value in values_s)
    ninety_nine = ordered[max(0, -(-99 * len(ordered) // 100) - 1)]
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return Spread(sum(ordered) / len(ordered), median, ninety_nine)
