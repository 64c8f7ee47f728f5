"""The command itself, with the bundled checkpoint: answers, survives, refuses in one line."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

PROSE = "The tar program stores many files together in a single archive, and can also restore " * 6


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "whalefall", "serve", *args]


@contextmanager
def process(*args: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A serving process and its URL; killed at the end."""
    with subprocess.Popen(
        command("--port", "0", *args), stdout=subprocess.PIPE, text=True
    ) as child:
        try:
            line = child.stdout.readline() if child.stdout else ""
            found = re.search(r"http://[\d.]+:\d+", line)
            assert found, f"the server did not start: {line!r}"
            yield child, found.group()
        finally:
            child.kill()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with process("--max-num-seqs", "8") as (_, address):
        yield address


def ask(url: str, **fields: Any) -> dict[str, Any]:
    body = {"prompt": PROSE, "temperature": 0, "max_tokens": 12} | fields
    answer = httpx.post(url + "/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    return result


def test_a_question_gets_its_manual_line(url: str) -> None:
    with openai.OpenAI(base_url=url + "/v1", api_key="none") as client:
        answer = client.chat.completions.create(
            model="whalefall-manpages",
            messages=[{"role": "user", "content": "What does tar do?"}],
            temperature=0,
        )
    assert answer.choices[0].message.content == "tar - an archiving utility"
    assert answer.choices[0].finish_reason == "stop"


def test_the_same_prompt_again_comes_from_the_cache_with_the_same_bits(url: str) -> None:
    first = ask(url, logprobs=2, cache_salt="once")
    second = ask(url, logprobs=2, cache_salt="once")
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= 64
    assert first["choices"] == second["choices"]


def test_a_stream_has_the_bits_of_the_whole_answer(url: str) -> None:
    whole = ask(url)["choices"][0]["text"]
    body = {"prompt": PROSE, "temperature": 0, "max_tokens": 12, "stream": True}
    text = httpx.post(url + "/v1/completions", json=body, timeout=120).text
    events = [json.loads(e[6:]) for e in text.split("\n\n") if e.startswith("data: {")]
    assert "".join(c["text"] for e in events for c in e["choices"]) == whole


def test_seeds_stops_and_choices(url: str) -> None:
    hot = {"temperature": 1.0, "seed": 7, "n": 2}
    assert ask(url, **hot)["choices"] == ask(url, **hot)["choices"]
    texts = [choice["text"] for choice in ask(url, **hot)["choices"]]
    assert texts[0] != texts[1]
    plain = ask(url, max_tokens=30)["choices"][0]["text"]
    stop = plain[10:13]
    stopped = ask(url, max_tokens=30, stop=[stop])["choices"][0]
    assert stopped["text"] == plain[: plain.index(stop)]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", stop)


def test_a_killed_server_starts_again() -> None:
    with process() as (child, address):
        body = {"prompt": PROSE, "max_tokens": 400, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", address + "/v1/completions", json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            os.kill(child.pid, signal.SIGKILL)
            with pytest.raises(httpx.TransportError):
                list(lines)
    with process() as (_, address):
        assert ask(address)["choices"][0]["text"]


def test_sigterm_lets_an_open_answer_finish() -> None:
    with process() as (child, address):
        body = {"prompt": PROSE, "max_tokens": 40, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", address + "/v1/completions", json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            child.send_signal(signal.SIGTERM)
            rest = list(lines)
        assert rest[-2] == "data: [DONE]"
        assert child.wait(60) == 0


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--model", "/nowhere"), "no folder /nowhere"),
        (("--model", "EMPTY"), "has no config.json"),
        (("--compute", "int3"), "compute is 'int3'"),
        (("--kv", "int3"), "kv is 'int3'"),
        (("--port", "70000"), "--port is 70000"),
        (("--host", "0.0.0.0"), "needs --api-key"),
        (("--kv-cache-gb", "0.0000001"), "kv_cache_bytes is 100"),
        (("--max-queue", "0"), "--max-queue is 0"),
    ],
)
def test_a_wrong_start_is_one_line(args: tuple[str, ...], words: str, tmp_path: Path) -> None:
    given = [str(tmp_path) if arg == "EMPTY" else arg for arg in args]
    done = subprocess.run(command(*given), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_port_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            command("--port", port), capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert done.stderr.count("\n") == 1
