"""Full queues, clients that leave or do not read, an engine that fails: nobody else notices."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx

from tests.serve.conftest import Running, served
from tests.serve.fake import EchoEngine
from whalefall.serve import Settings

HELLO = {"messages": [{"role": "user", "content": "hello"}]}


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def post(server: Running, **fields: object) -> httpx.Response:
    with server.client() as client:
        return client.post("/v1/chat/completions", json=HELLO | fields)


def test_a_full_queue_answers_429_and_recovers() -> None:
    engine = EchoEngine(batch=1)
    with served(engine, Settings("echo", max_queue=2)) as server:
        engine.gate.clear()
        with ThreadPoolExecutor(8) as pool:
            worker = server.app.state.worker
            answers = [pool.submit(post, server)]
            wait_for(lambda: len(engine.requests) == 1)  # it runs, so two may wait
            answers += [pool.submit(post, server) for _ in range(2)]
            wait_for(lambda: worker.open_requests == 3)
            refused = post(server)
            assert refused.status_code == 429
            assert refused.headers["Retry-After"] == "1"
            engine.gate.set()
            assert [a.result().status_code for a in answers] == [200, 200, 200]
        assert post(server).status_code == 200


def test_a_client_that_hangs_up_is_cancelled(server: Running) -> None:
    server.engine.gate.clear()
    for stream in (True, False):
        try:
            with server.client() as client:
                client.post("/v1/chat/completions", json=HELLO | {"stream": stream}, timeout=0.3)
        except httpx.TimeoutException:
            pass
    wait_for(lambda: server.app.state.worker.open_requests == 0)
    server.engine.gate.set()
    wait_for(lambda: len(server.engine.cancelled) == 2)
    assert post(server).json()["choices"][0]["message"]["content"] == "hello"


def test_a_client_that_stops_reading_blocks_nobody(server: Running) -> None:
    body = json.dumps(HELLO | {"stream": True}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    port = int(server.url.rsplit(":", 1)[1])
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(8)]
    for sock in silent:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        sock.sendall(head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    start = time.monotonic()
    assert post(server).status_code == 200
    assert time.monotonic() - start < 5
    for sock in silent:
        sock.close()


def test_a_failed_step_is_a_500_and_the_next_request_works(server: Running) -> None:
    server.engine.fail_next = True
    failed = post(server)
    assert failed.status_code == 500
    assert failed.json()["error"]["message"] == "the engine failed: RuntimeError: out of ink"
    server.engine.fail_next = True
    streamed = post(server, stream=True)
    assert streamed.status_code == 200
    assert '"the engine failed' in streamed.text
    assert post(server).status_code == 200


def test_silence_is_filled_with_comments() -> None:
    engine = EchoEngine()
    with served(engine, Settings("echo", keep_alive_s=0.05)) as server:
        engine.gate.clear()
        threading.Timer(0.4, engine.gate.set).start()
        assert ": keep-alive\n\n" in post(server, stream=True).text


def test_many_at_once_each_get_their_own_answer(server: Running) -> None:
    def ask(number: int) -> str:
        message = {"messages": [{"role": "user", "content": f"number {number}"}]}
        with server.client() as client:
            body = client.post("/v1/chat/completions", json=message).json()
        return str(body["choices"][0]["message"]["content"])

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(64))) == [f"number {n}" for n in range(64)]
    assert server.app.state.worker.open_requests == 0
