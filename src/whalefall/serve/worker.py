"""The one thread that steps the engine, and the streams that carry its output to requests.

The event loop talks to the thread through a command list under a condition; the thread talks back
with one `call_soon_threadsafe` a step. A client that does not read holds only its own stream, whose
size is bounded by its max_tokens.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from whalefall.errors import ConfigError, WhalefallError
from whalefall.serve.failures import ApiError

if TYPE_CHECKING:
    from whalefall.engine import Delta, Engine, SamplingParams

__all__ = ["EngineWorker", "RequestStream"]

log = logging.getLogger("whalefall.serve")


class RequestStream:
    """The deltas of one request, as an async iterator that ends with the last finish."""

    def __init__(self, request_id: str, choices: int) -> None:
        self.request_id = request_id
        self._left = choices
        self._items: asyncio.Queue[Delta | Exception] = asyncio.Queue()

    def put(self, item: Delta | Exception) -> None:
        """Add a delta, or the error that ends the stream (event loop only)."""
        self._items.put_nowait(item)

    async def next(self, timeout_s: float | None = None) -> Delta | None:
        """The next delta, or None once every choice has finished; TimeoutError after `timeout_s`.

        Raises: ApiError when the engine failed.
        """
        if self._left == 0:
            return None
        async with asyncio.timeout(timeout_s):
            item = await self._items.get()
        if isinstance(item, Exception):
            self._left = 0
            raise item
        if item.finish_reason is not None:
            self._left -= 1
        return item

    async def __aiter__(self) -> AsyncIterator[Delta]:
        while (delta := await self.next()) is not None:
            yield delta


class EngineWorker:
    """Runs an engine on a thread of its own and hands out `RequestStream`s.

    Args:
        engine: the engine; after `start` only the worker's thread calls it.
        max_queue: requests that may wait for their first step.
    """

    def __init__(self, engine: Engine, max_queue: int) -> None:
        if engine.tokenizer is None:
            raise ConfigError(
                "serve: the checkpoint has no tokenizer.json or tiktoken.model; add its tokenizer"
            )
        self.engine = engine
        self.tokenizer = engine.tokenizer
        self.max_queue = max_queue
        self._streams: dict[str, RequestStream] = {}
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = self._ending = False
        # units answer while the thread waits in `step`: let it see the command
        self._rouse: Callable[[], None] | None = getattr(engine, "wake", None)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread; call it from the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End the thread after its current step, and what is open with it."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)
        self.end_open()

    def end_open(self) -> None:
        """Every open request gets a 503 after what it has, and new ones too (event loop only)."""
        self._ending = True
        for stream in list(self._streams.values()):
            self.close(stream)
            stream.put(shutting_down())

    @property
    def open_requests(self) -> int:
        """Requests that have not finished."""
        return len(self._streams)

    def submit(
        self,
        request_id: str,
        prompt: list[int],
        params: SamplingParams,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> RequestStream:
        """Queue a request (event loop only).

        Raises: ApiError 429 when `max_queue` requests wait already, 503 at the end.
        """
        if self._ending:
            raise shutting_down()
        stats = self.engine.stats()
        if max(stats.waiting, len(self._streams) - stats.running) >= self.max_queue:
            raise ApiError(
                429,
                f"{self.max_queue} requests are waiting already; try again in a second",
                code="rate_limit_exceeded",
                retry_after_s=1,
            )
        stream = RequestStream(request_id, params.n)
        self._streams[request_id] = stream

        def add() -> None:
            try:
                self.engine.add(request_id, prompt, params, priority, cache_salt)
            except WhalefallError as error:
                self._post([(stream, ApiError(400, str(error)))])

        self._command(add)
        return stream

    def close(self, stream: RequestStream) -> None:
        """Forget a stream; the engine drops its request if it still runs (event loop only)."""
        if self._streams.pop(stream.request_id, None) is not None and stream._left:
            self._command(lambda: self.engine.cancel(stream.request_id))

    def _command(self, call: Callable[[], None]) -> None:
        with self._wake:
            self._commands.append(call)
            self._wake.notify()
        if self._rouse is not None:
            self._rouse()

    def _post(self, items: list[tuple[RequestStream, Delta | Exception]]) -> None:
        def deliver() -> None:
            for stream, item in items:
                stream.put(item)

        assert self._loop is not None
        self._loop.call_soon_threadsafe(deliver)

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._commands or self._stopping or self.engine.has_work()):
                    self._wake.wait()
                if self._stopping:
                    return
                commands, self._commands = self._commands, deque()
            for call in commands:
                call()
            if self.engine.has_work():
                self._step()

    def _step(self) -> None:
        try:
            deltas = self.engine.step()
        except Exception as error:  # the server must outlive a failed step
            log.exception("engine step failed")
            self._fail_all(error)
            return
        streams = self._streams
        self._post([(streams[d.request_id], _item(d)) for d in deltas if d.request_id in streams])

    def _fail_all(self, error: Exception) -> None:
        failed = list(self._streams.items())
        for request_id, _ in failed:
            self.engine.cancel(request_id)
        failure = ApiError(500, f"the engine failed: {type(error).__name__}: {error}")
        self._post([(stream, failure) for _, stream in failed])


def shutting_down() -> ApiError:
    """What ends an answer that the server has no time left for."""
    return ApiError(503, "the server is shutting down; the answer is cut off", retry_after_s=1)


def _item(delta: Delta) -> Delta | Exception:
    """A delta, or the error that took its place."""
    if delta.finish_reason != "error":
        return delta
    return ApiError(500, f"the answer was lost: {delta.stop_reason}")
