"""The load driver against the real API over a fake engine, and against servers that misbehave."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from tests.serve.conftest import Running, served
from tests.serve.fake import EchoEngine
from whalefall.errors import ConfigError, MissingError
from whalefall.serve import Settings
from whalefall.testing.load import Answer, Server, drive, prompts, summarize


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with served(EchoEngine(), Settings("echo")) as server:
        yield server


def test_a_sweep_counts_what_the_server_says_it_used(running: Running) -> None:
    line = drive(Server(running.url), concurrency=3, requests=7, words=5, max_tokens=6)
    assert (line.answered, line.failed, line.error) == (7, 0, "")
    assert line.output_tokens_s * line.seconds == pytest.approx(7 * 6)
    assert line.input_tokens_s > 0
    assert line.ttft_ms and line.tpot_ms and line.ttft_ms.median <= line.ttft_ms.p99


def test_the_command_drives_a_server_from_anywhere(running: Running, tmp_path: object) -> None:
    command = [sys.executable, "-m", "whalefall", "bench", "serve", "--url", running.url + "/v1"]
    options = ["--concurrency", "1,2", "--requests", "3", "--max-tokens", "4", "--words", "5"]
    done = subprocess.run(
        [*command, *options, "--json"], cwd=str(tmp_path), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [line["concurrency"] for line in found["sweep"]] == [1, 2]
    assert all(line["answered"] == 3 for line in found["sweep"])
    shown = subprocess.run([*command, *options], capture_output=True, text=True, check=True).stdout
    assert "TTFT ms" in shown and len(shown.splitlines()) == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--url", "http://127.0.0.1:1"], "does not answer"),
        (["--url", "ftp://x"], "wanted http://HOST:PORT"),
        (["--url", "http://x:99999999"], "wanted http://HOST:PORT"),
        (["--url", "http://127.0.0.1:1", "--concurrency", "0"], "wanted 1,2,4"),
    ],
)
def test_a_url_that_cannot_be_driven_is_one_line(options: list[str], words: str) -> None:
    command = [sys.executable, "-m", "whalefall", "bench", "serve", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_server_that_hangs_up_in_mid_stream_is_a_failure() -> None:
    listening = socket.create_server(("127.0.0.1", 0))

    def hang_up() -> None:
        with listening.accept()[0] as link:
            while b"hello" not in link.recv(65536):
                pass  # unread bytes would make the end a reset
            chunk = b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n'
            link.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + chunk)

    thread = threading.Thread(target=hang_up)
    thread.start()
    server = Server(f"127.0.0.1:{listening.getsockname()[1]}", model="m")
    assert server.ask("hello", 4).error == "the stream ended without a finish_reason"
    thread.join()
    listening.close()


def test_a_server_that_is_none_is_refused() -> None:
    with pytest.raises(MissingError, match="does not answer"):
        Server("http://127.0.0.1:1")
    with pytest.raises(ConfigError, match="'http://', wanted"):
        Server("http://")


def test_percentiles_are_nearest_rank_and_failures_do_not_count() -> None:
    answers = [Answer(n / 1000, 1.0 + n / 1000, [0.5, 0.5], 10, 3) for n in range(1, 101)]
    line = summarize(4, [*answers, Answer(error="503: full")], 10.0)
    assert (line.answered, line.failed, line.error) == (100, 1, "503: full")
    assert line.ttft_ms is not None and line.tpot_ms is not None and line.itl_ms is not None
    assert (line.ttft_ms.mean, line.ttft_ms.median, line.ttft_ms.p99) == (50.5, 50.5, 99.0)
    assert line.tpot_ms.median == pytest.approx(500)
    assert (line.requests_s, line.input_tokens_s, line.output_tokens_s) == (10, 100, 30)


def test_prompts_share_no_beginning() -> None:
    texts = prompts(20, 8, seed=1) + prompts(20, 8, seed=2)
    assert len({text.split()[0] for text in texts}) == 40
    assert all(len(text.split()) == 8 for text in texts)
