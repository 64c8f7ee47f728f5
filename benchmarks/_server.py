"""The server on the mid shape as a user meets it: start, first token, a prompt twice, memory."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from whalefall.testing.benchmark import Row

PROMPT = 2048


def prompt(seed: int, count: int) -> list[int]:
    """Random ids of the mid shape's vocabulary."""
    return random.Random(seed).choices(range(300, 32000), k=count)


class Server:
    """A running `whalefall serve`."""

    def __init__(self, model: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self.model = f"http://127.0.0.1:{port}", ""
        command = [sys.executable, "-m", "whalefall", "serve"]
        self.process = subprocess.Popen(
            [*command, "--model", str(model), "--port", str(port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def wait(self) -> None:
        """Return when it answers."""
        while self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/v1/models", timeout=1) as models:
                    self.model = json.load(models)["data"][0]["id"]
                return
            except OSError:
                time.sleep(0.01)
        raise SystemExit("bench serve: the server ended at its start")

    def ask(self, ids: list[int], count: int = 1) -> tuple[float, dict[str, Any]]:
        """Seconds to the first token of a streamed answer, and its usage."""
        body = {"model": self.model, "prompt": ids, "max_tokens": count, "temperature": 0}
        body |= {"stream": True, "ignore_eos": True, "stream_options": {"include_usage": True}}
        request = urllib.request.Request(
            f"{self.url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        start, first, usage = time.perf_counter(), 0.0, {}
        with urllib.request.urlopen(request, timeout=300) as lines:
            for line in lines:
                if line.startswith(b"data: {"):
                    first = first or time.perf_counter() - start
                    usage = json.loads(line[6:]).get("usage") or usage
        return first, usage

    def private_bytes(self) -> int:
        """Memory that is this process's alone and no file's: what a second one would take again."""
        text = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text()
        fields = dict(line.split(":") for line in text.splitlines() if line.endswith("kB"))
        return int(fields["Private_Dirty"].split()[0]) * 1024


@contextmanager
def running(model: Path) -> Iterator[tuple[Server, float]]:
    """A server, and the seconds from its start to its first token."""
    start = time.perf_counter()
    server = Server(model)
    try:
        server.wait()
        server.ask(prompt(0, 8))
        yield server, time.perf_counter() - start
    finally:
        server.process.terminate()
        server.process.wait(timeout=60)


def rows(model: Path, kv_token_bytes: int) -> list[Row]:
    """The table's lines; files and compiled kernels are warm after the first start."""
    with running(model):
        pass
    with running(model) as (server, first_s):
        computed, _ = server.ask(prompt(1, PROMPT))
        again, usage = server.ask(prompt(1, PROMPT))
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda seed: server.ask(prompt(seed, 200), 64), range(2, 10)))
        private = server.private_bytes() / 1e6
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    kv = kv_token_bytes * (PROMPT + 8 + 8 * 264) / 1e6
    what = "mid shape, server"
    return [
        Row(f"{what}, first token of a {PROMPT}-token prompt, second time ({cached} cached)",
            "first time", ">= 5x", again, computed, "s", computed / again,
            cached > 0 and computed / again >= 5),
        Row(f"{what}, private memory after 8 streams", "KV + 300 MB", "<= 1x", private, kv + 300,
            "MB", (kv + 300) / private, private <= kv + 300),
        Row(f"{what}, start to first token, warm", "2 s", "<= 2 s", first_s, 2.0, "s",
            2.0 / first_s, first_s <= 2),
    ]  # fmt: skip
