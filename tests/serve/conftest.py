"""A running application over the echo engine, on a real port of this machine."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import uvicorn

from tests.serve.fake import EchoEngine
from whalefall.serve import Settings, create_app


class Running:
    """A server on its own thread."""

    def __init__(self, engine: Any, settings: Settings) -> None:
        self.engine = engine
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.app = create_app(engine, settings)
        config = uvicorn.Config(self.app, log_level="error", timeout_graceful_shutdown=2)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self._serve, daemon=True)

    def _serve(self) -> None:
        asyncio.run(self.server.serve(sockets=[self.socket]))

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120, **options)


@contextmanager
def served(engine: Any, settings: Settings | None = None) -> Iterator[Running]:
    running = Running(engine, settings or Settings("echo"))
    running.thread.start()
    try:
        with running.client() as client:
            for _ in range(200):
                try:
                    client.get("/health")
                    break
                except httpx.TransportError:
                    threading.Event().wait(0.02)
        yield running
    finally:
        engine_gate = getattr(engine, "gate", None)
        if engine_gate is not None:
            engine_gate.set()
        running.server.should_exit = True
        running.thread.join(10)
        running.socket.close()


@pytest.fixture
def server() -> Iterator[Running]:
    with served(EchoEngine()) as running:
        yield running


@pytest.fixture(scope="session")
def shared_client() -> Iterator[httpx.Client]:
    """One server for all tests that leave nothing behind in it."""
    with served(EchoEngine()) as running, running.client() as client:
        yield client


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client
