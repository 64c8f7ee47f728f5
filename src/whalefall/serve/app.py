"""The application: routes, and errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from importlib import resources
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from whalefall import __version__
from whalefall.serve.dashboard import fragment
from whalefall.serve.failures import ApiError, error_body
from whalefall.serve.guard import Guard
from whalefall.serve.history import History
from whalefall.serve.metrics import Metrics
from whalefall.serve.prompts import chat_prompt
from whalefall.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from whalefall.serve.service import Service
from whalefall.serve.settings import Settings
from whalefall.serve.units import Gateway
from whalefall.serve.units.metrics import UnitsCollector
from whalefall.serve.worker import EngineWorker

if TYPE_CHECKING:
    from whalefall.engine import Engine

__all__ = ["create_app"]

T = TypeVar("T")


def create_app(engine: Engine, settings: Settings) -> FastAPI:
    """The ASGI application that serves one engine.

    Args:
        engine: a loaded engine (or the gateway to units, which acts as one); the application's
            worker thread owns it from start-up on.
        settings: name, key and limits.
    """
    metrics = Metrics(engine, settings.node_hour)
    if isinstance(engine, Gateway):
        metrics.registry.register(UnitsCollector(engine))
    worker = EngineWorker(engine, settings.max_queue)
    service = Service(worker, metrics, settings)
    history = History(engine, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        sampling = asyncio.create_task(history.run())
        yield
        sampling.cancel()
        await worker.stop()

    # No /docs: FastAPI's page loads its scripts from another host.
    app = FastAPI(
        title="whalefall", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state.worker = worker
    app.add_middleware(Guard, settings=settings, metrics=metrics)  # type: ignore[arg-type]
    add_error_handlers(app)
    add_openai_routes(app, service)
    add_operator_routes(app, service)
    add_pages(app, service, history)
    return app


class EventStream(StreamingResponse):
    """A stream of events that lets go of its request even if the client left before it began."""

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


def json_response(body: dict[str, Any]) -> Response:
    """A JSON answer, encoded once."""
    return Response(msgspec.json.encode(body), media_type="application/json")


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, cancelling it as soon as the client hangs up."""
    task = asyncio.create_task(work)

    async def watch() -> None:
        while not task.done():
            if (await request.receive())["type"] == "http.disconnect":
                task.cancel()
                return

    watcher = asyncio.create_task(watch())
    try:
        return await task
    finally:
        watcher.cancel()


def add_openai_routes(app: FastAPI, service: Service) -> None:
    """The endpoints that OpenAI's clients call."""

    async def respond(http: Request, request: ChatRequest | CompletionRequest) -> Response:
        generation = service.generation(request)
        if not request.stream:
            try:
                return json_response(await unless_disconnected(http, generation.collect()))
            except asyncio.CancelledError:
                return Response(status_code=499)
        options = request.stream_options or {}
        events = generation.events(
            bool(options.get("include_usage")), bool(options.get("continuous_usage_stats"))
        )
        return EventStream(events, generation.close)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(http: Request, request: ChatRequest) -> Response:
        return await respond(http, request)

    @app.post("/v1/completions", response_model=None)
    async def completions(http: Request, request: CompletionRequest) -> Response:
        return await respond(http, request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.model_card()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return service.model_card()


def add_operator_routes(app: FastAPI, service: Service) -> None:
    """Tokens, health, metrics and the ledger."""
    engine = service.worker.engine

    @app.post("/tokenize")
    async def tokenize(request: TokenizeRequest) -> dict[str, Any]:
        if (request.prompt is None) == (request.messages is None):
            raise ApiError(400, "send either prompt or messages", "prompt")
        if request.prompt is None:
            ids = chat_prompt(service.worker.tokenizer, request)
        else:
            ids = service.worker.tokenizer.encode(request.prompt)
        return {"tokens": ids, "count": len(ids), "max_model_len": engine.max_model_len}

    @app.post("/detokenize")
    async def detokenize(request: DetokenizeRequest) -> dict[str, Any]:
        worst = max(request.tokens, default=0)
        if worst >= engine.model.vocab_size:
            raise ApiError(
                400,
                f"token id {worst} is outside the vocabulary of {engine.model.vocab_size}",
                "tokens",
            )
        return {"prompt": service.worker.tokenizer.decode(request.tokens, skip_special=False)}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "requests": service.worker.open_requests}

    @app.get("/metrics")
    async def metrics() -> Response:
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return Response(service.metrics.page(), media_type=kind)

    @app.get("/ledger")
    async def ledger() -> dict[str, float]:
        return service.metrics.ledger()


def add_pages(app: FastAPI, service: Service, history: History) -> None:
    """The chat page, and the dashboard with the fragment that it fetches again and again."""

    def static(name: str) -> str:
        return resources.files(__package__).joinpath(f"static/{name}").read_text("utf-8")

    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return static("index.html")

    @app.get("/dashboard", response_class=HTMLResponse)
    async def dashboard() -> str:
        return static("dashboard.html")

    @app.get("/dashboard/charts", response_class=HTMLResponse)
    def charts() -> str:  # drawn on a thread: streams go on meanwhile
        return fragment(service.worker.engine, service.metrics, history)


def add_error_handlers(app: FastAPI) -> None:
    """Every failure leaves as {"error": …}."""

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> JSONResponse:
        body = error_body(error.status, error.message, error.param, error.code)
        return JSONResponse(body, error.status, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        kind = request.headers.get("content-type", "")
        if isinstance(first.get("input"), bytes) and "json" not in kind:
            message = f"Content-Type is {kind or 'missing'}, wanted application/json"
            return JSONResponse(error_body(400, message), 400)
        place = [str(part) for part in first["loc"] if part != "body"]
        if first["type"] == "json_invalid":
            place, message = [], f"the body is not JSON: {first['ctx']['error']}"
        else:
            got = str(first.get("input"))[:80].encode("utf-8", "backslashreplace").decode()
            message = f"{'.'.join(place) or 'body'}: {first['msg']}, got {got}"
        return JSONResponse(error_body(400, message, place[0] if place else None), 400)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(error_body(error.status_code, message), error.status_code)

    @app.exception_handler(Exception)
    async def crash(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_body(500, f"{type(error).__name__}: {error}"), 500)
