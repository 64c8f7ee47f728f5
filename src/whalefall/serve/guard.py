"""What every request passes first: the API key, the size limit, and counting (plain ASGI)."""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from whalefall.serve.failures import ApiError, error_body
from whalefall.serve.metrics import Metrics
from whalefall.serve.settings import Settings

__all__ = ["Guard"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

# Paths that show no answers and cost nothing: probes and the pages themselves.
OPEN = frozenset({"/", "/dashboard", "/health", "/metrics"})


class Guard:
    """ASGI middleware.

    Args:
        app: the application behind it.
        settings: key and size limit.
        metrics: where requests are counted.
    """

    def __init__(self, app: App, settings: Settings, metrics: Metrics) -> None:
        self.app = app
        self.settings = settings
        self.metrics = metrics

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        try:
            self.check_key(scope["path"], headers)
            self.check_length(headers)
            body = await self.whole_body(receive)
        except ApiError as error:
            self.metrics.request("refused", error.status)
            await refuse(send, error)
            return
        if body is not None:
            await self.app(scope, replayed(body, receive), self.counted(scope, send))

    def check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        """401 unless the path is open or the bearer token is the key."""
        if self.settings.api_key is None or path in OPEN:
            return
        given = headers.get(b"authorization", b"").removeprefix(b"Bearer ").strip()
        given = given or headers.get(b"x-api-key", b"")
        if not hmac.compare_digest(given, self.settings.api_key.encode()):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    def check_length(self, headers: dict[bytes, bytes]) -> None:
        """413 for a body that says it is too large."""
        text = headers.get(b"content-length", b"0")
        if text.isdigit() and int(text) > self.settings.max_request_bytes:
            raise self.too_large()

    def too_large(self) -> ApiError:
        """The refusal of an oversized body."""
        return ApiError(413, f"the request is over {self.settings.max_request_bytes} bytes")

    async def whole_body(self, receive: Receive) -> Message | None:
        """The body in one message, however it came; None where the client hung up meanwhile."""
        parts, seen, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            seen += len(parts[-1])
            if seen > self.settings.max_request_bytes:
                raise self.too_large()
            more = message.get("more_body", False)
        return {"type": "http.request", "body": b"".join(parts), "more_body": False}

    def counted(self, scope: MutableMapping[str, Any], send: Send) -> Send:
        """`send` that counts the response's status under its route."""

        async def counted_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                self.metrics.request(getattr(route, "path", "unknown"), message["status"])
            await send(message)

        return counted_send


def replayed(body: Message, receive: Receive) -> Receive:
    """`receive` that gives a body already read, and then what the client does next."""
    waiting = [body]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay


async def refuse(send: Send, error: ApiError) -> None:
    """Send an error without the application."""
    body = json.dumps(error_body(error.status, error.message, error.param, error.code)).encode()
    headers = {"content-type": "application/json", **error.headers}
    start = {
        "type": "http.response.start",
        "status": error.status,
        "headers": [(k.lower().encode(), v.encode()) for k, v in headers.items()],
    }
    await send(start)
    await send({"type": "http.response.body", "body": body})
