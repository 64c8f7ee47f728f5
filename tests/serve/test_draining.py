"""How the server ends: an answer that cannot finish says so, the exit code is 0, twice is quick."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest

from tests.serve.test_bundled import PROSE, command, process

LONG = {"prompt": PROSE, "max_tokens": 1500, "ignore_eos": True}
UNITS = ("--prefill", "1x1", "--decode", "1x1")
BOTH = pytest.mark.parametrize("units", [(), pytest.param(UNITS, marks=pytest.mark.ranks)])


@contextmanager
def streaming(address: str) -> Iterator[Iterator[str]]:
    """A long answer's lines, of which the first has come."""
    with httpx.stream(
        "POST", address + "/v1/completions", json=LONG | {"stream": True}, timeout=60
    ) as stream:
        lines = stream.iter_lines()
        next(lines)
        yield lines


def events(lines: Iterator[str]) -> list[dict[str, Any]]:
    texts = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert "[DONE]" not in texts
    return [json.loads(text) for text in texts]


def check_cut(found: list[dict[str, Any]]) -> None:
    *chunks, last = found
    assert last["error"]["type"] == "server_error"
    assert "shutting down" in last["error"]["message"]
    assert len(chunks) < 1499
    assert all(choice["finish_reason"] is None for each in chunks for choice in each["choices"])


@BOTH
def test_a_stream_that_the_drain_cuts_ends_with_an_error(units: tuple[str, ...]) -> None:
    with process("--drain-seconds", "0.1", *units) as (child, address):
        with streaming(address) as lines:
            child.send_signal(signal.SIGTERM)
            check_cut(events(lines))
        assert child.wait(60) == 0


def test_an_openai_client_is_told_of_the_cut() -> None:
    with process("--drain-seconds", "0.1") as (child, address):
        client = openai.OpenAI(base_url=address + "/v1", api_key="none", max_retries=0)
        stream = client.completions.create(
            model="whalefall-manpages", prompt=PROSE, max_tokens=1500, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        next(stream)
        child.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        assert child.wait(60) == 0


def test_a_whole_answer_that_the_drain_cuts_is_a_503() -> None:
    with process("--drain-seconds", "0.1") as (child, address):
        with socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1]))) as client:
            body = json.dumps(LONG).encode()
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n" % len(body) + body
            )
            wait_until_busy(address)
            child.send_signal(signal.SIGTERM)
            answer = client.makefile("rb").read().decode()
        assert child.wait(60) == 0
    assert answer.startswith("HTTP/1.1 503")
    assert "retry-after: 1" in answer.lower()
    assert "shutting down" in answer


def wait_until_busy(address: str) -> None:
    deadline = time.monotonic() + 60
    while httpx.get(address + "/health").json()["requests"] == 0:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@BOTH
@pytest.mark.parametrize("signals", [(signal.SIGTERM,) * 2, (signal.SIGINT,) * 2])
def test_a_second_signal_cuts_at_once(
    units: tuple[str, ...], signals: tuple[signal.Signals, ...]
) -> None:
    with process("--drain-seconds", "600", *units) as (child, address):
        with streaming(address) as lines:
            for each in signals:
                child.send_signal(each)
                time.sleep(0.1)
            check_cut(events(lines))
        assert child.wait(60) == 0


def test_a_client_that_reads_nothing_does_not_keep_the_server() -> None:
    with process("--drain-seconds", "0.1", "--max-num-seqs", "4") as (child, address):
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.connect(("127.0.0.1", int(address.rsplit(":", 1)[1])))
            body = json.dumps(LONG | {"stream": True, "n": 4, "logprobs": 5}).encode()
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n" % len(body) + body
            )
            wait_until_busy(address)
            child.send_signal(signal.SIGTERM)
            assert child.wait(60) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_ends_with_0_and_says_nothing(number: signal.Signals) -> None:
    with subprocess.Popen(
        command("--port", "0"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None and child.stderr is not None
        assert "http://" in child.stdout.readline()
        child.send_signal(number)
        assert child.wait(60) == 0
        assert child.stderr.read() == ""
