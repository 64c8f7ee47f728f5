"""Units behind the real API: streams over HTTP, floods, signals, restarts."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.serve.conftest import served
from tests.serve.units.conftest import units
from tests.serve.units.test_units import kill_one
from whalefall.serve import Settings
from whalefall.serve.core import ExpertRule

pytestmark = pytest.mark.ranks
PROMPT = [5 + 3 * i % 240 for i in range(200)]


def body(tokens: int = 60, **more: Any) -> dict[str, Any]:
    return {
        "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "logprobs": 1,
        **more,
    }  # fmt: skip


def stream(client: httpx.Client, **more: Any) -> Iterator[dict[str, Any]]:
    with client.stream("POST", "/v1/completions", json=body(stream=True, **more)) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line[6:])


def read(events: Iterator[dict[str, Any]]) -> tuple[str, list[float]]:
    text, logprobs = "", []
    for event in events:
        for choice in event["choices"]:
            text += choice["text"]
            logprobs += (choice["logprobs"] or {}).get("token_logprobs", [])
    return text, logprobs


def test_a_stream_survives_kill_9_of_both_kinds_of_unit(model) -> None:
    with units(model, "1x2", "1x2") as gateway, served(gateway, Settings("tiny")) as running:
        with httpx.Client(base_url=running.url, timeout=90) as client:
            whole = client.post("/v1/completions", json=body(160)).json()["choices"][0]
            events, seen = stream(client, tokens=160), []
            for event in events:
                seen.append(event)
                if len(seen) == 30:
                    kill_one(gateway, "decode")
                if len(seen) == 80:
                    kill_one(gateway, "prefill")
                    kill_one(gateway, "decode")
            text, logprobs = read(iter(seen))
            metrics = client.get("/metrics").text
    assert text == whole["text"]
    assert logprobs == whole["logprobs"]["token_logprobs"]
    assert float(re.search(r"\nwhalefall_unit_restarts_total (\S+)", metrics)[1]) >= 2


def test_metrics_show_each_rank_and_no_prompt_token_on_decode(model) -> None:
    with units(model, "1x1", "1x2") as gateway, served(gateway, Settings("tiny")) as running:
        with httpx.Client(base_url=running.url, timeout=90) as client:
            client.post("/v1/completions", json=body(n=2))
            time.sleep(0.3)
            metrics = client.get("/metrics").text
    found = dict(re.findall(r"whalefall_unit_prompt_tokens_total(\{.*?\}) (\S+)", metrics))
    assert found == {
        '{rank="0",unit="prefill-0"}': "208.0",  # the second answer's last, unfinished block again
        '{rank="0",unit="decode-1"}': "0.0",
        '{rank="1",unit="decode-1"}': "0.0",
    }
    assert re.search(r'whalefall_overlap_ratio\{unit="decode-1"\} 0\.', metrics)
    assert 'whalefall_units{kind="decode"} 1.0' in metrics


def test_the_dashboard_shows_the_ranks_loads(model) -> None:
    rule = ExpertRule(interval_s=0.05, min_selections=0.1)
    with (
        units(model, "1x1", "1x2", experts=rule) as gateway,
        served(gateway, Settings("tiny")) as running,
        httpx.Client(base_url=running.url, timeout=90) as client,
    ):
        client.post("/v1/completions", json=body(n=4))
        deadline = time.monotonic() + 30
        while not gateway.experts.units["decode-1"].judged and time.monotonic() < deadline:
            time.sleep(0.05)
        page = client.get("/dashboard/charts")
    assert page.status_code == 200
    assert "decode-1: load of each rank, before balancing" in page.text
    assert "decode-1: load of each rank, now" in page.text


def test_a_flood_gets_429_and_the_rest_its_answers(model) -> None:
    settings = Settings("tiny", max_queue=4)
    with units(model, "1x1", "1x1") as gateway, served(gateway, settings) as running:
        codes, texts = [], set()

        def ask() -> None:
            with httpx.Client(base_url=running.url, timeout=90) as client:
                answer = client.post("/v1/completions", json=body(100))
                codes.append(answer.status_code)
                if answer.status_code == 200:
                    texts.add(answer.json()["choices"][0]["text"])
                else:
                    assert answer.headers["retry-after"] == "1"

        threads = [threading.Thread(target=ask) for _ in range(40)]
        for thread in threads:
            thread.start()
        most = 0
        while any(thread.is_alive() for thread in threads):
            most = max(most, len(gateway.router.answers))
            time.sleep(0.01)
    assert set(codes) == {200, 429} and len(texts) == 1
    assert most <= 4 + 4 + 4  # running, ahead of them, and the queue


def test_a_prefix_survives_a_restart_of_all_units(model, tmp_path) -> None:
    found = []
    for _ in range(2):
        with (
            units(model, "2x1", "1x1", engine={"prefix_cache": str(tmp_path)}) as gateway,
            served(gateway, Settings("tiny")) as running,
            httpx.Client(base_url=running.url, timeout=90) as client,
        ):
            answer = client.post("/v1/completions", json=body()).json()
            ledger = client.get("/ledger").json()
            cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert ledger["hit_tokens"] == cached
            found.append((answer["choices"][0]["text"], cached))
            wait_for_files(tmp_path)
    assert found[0][0] == found[1][0]
    assert [cached for _, cached in found] == [0, 192]


def test_a_damaged_block_is_on_the_page_of_metrics_and_in_the_log(model, tmp_path, caplog) -> None:
    answers = []
    for failures in ("0.0", "1.0"):
        with (
            units(model, "1x1", "1x1", engine={"prefix_cache": str(tmp_path)}) as gateway,
            served(gateway, Settings("tiny")) as running,
            httpx.Client(base_url=running.url, timeout=90) as client,
        ):
            answers.append(client.post("/v1/completions", json=body()).json()["choices"][0]["text"])
            wait_for_files(tmp_path)
            time.sleep(0.3)  # the rank's report
            assert (
                f"\nwhalefall_disk_cache_failures_total {failures}" in client.get("/metrics").text
            )
        for path in tmp_path.rglob("*.kv"):
            data = bytearray(path.read_bytes())
            data[-1000] ^= 1
            path.write_bytes(data)
    assert answers[0] == answers[1]
    said = [r.getMessage() for r in caplog.records if r.name == "whalefall.engine"]
    assert [line.partition(" failed")[0] for line in said] == [
        "prefill-0 rank 0: kv cache: reading"
    ]


def wait_for_files(folder) -> None:
    deadline = time.monotonic() + 10
    while not list(folder.rglob("*.kv")) and time.monotonic() < deadline:
        time.sleep(0.02)


@contextmanager
def command(model: str, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`whalefall serve` as a user starts it, and its address."""
    arguments = [sys.executable, "-m", "whalefall", "serve", "--model", model, "--port", "0"]
    limits = ["--kv-cache-gb", "0.01", "--max-model-len", "2000"]
    process = subprocess.Popen(
        [*arguments, *limits, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        line = next(line for line in process.stdout if "http://" in line)  # after warnings
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


@pytest.mark.parametrize("whole_group", [False, True])
def test_sigterm_lets_an_open_answer_finish_and_ends_every_process(model, whole_group) -> None:
    with command(model, "--prefill", "1x1", "--decode", "1x2") as (process, url):
        with httpx.Client(base_url=url, timeout=90) as client:
            events = stream(client, tokens=60)
            first = next(events)
            children = children_of(process.pid)
            assert len(children) == 3
            if whole_group:  # as a service manager does
                os.killpg(process.pid, signal.SIGTERM)
            else:
                process.send_signal(signal.SIGTERM)
            _, logprobs = read(events)
        assert process.wait(60) == 0
        assert process.stdout is not None
        assert "died" not in process.stdout.read()  # no unit had to be started again
    assert first["choices"] and len(logprobs) + len(read(iter([first]))[1]) == 60
    for pid in children:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def children_of(pid: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def test_kill_9_of_the_server_leaves_no_unit(model) -> None:
    with command(model, "--prefill", "1x1", "--decode", "1x2") as (process, _):
        children = children_of(process.pid)
        process.kill()
        process.wait()
        deadline = time.monotonic() + 5
        while any(alive(pid) for pid in children) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not any(alive(pid) for pid in children)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split(")")[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_server_whose_units_cannot_start_again_ends_and_says_why(model, tmp_path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    with command(str(folder), "--prefill", "1x1", "--decode", "1x1") as (process, _):
        (folder / "config.json").write_text("{}")
        os.kill(max(children_of(process.pid)), signal.SIGKILL)
        assert process.wait(90) == 2
        assert process.stdout is not None
        assert "units do not start" in process.stdout.read()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prefill", "1x2"], "--decode is None; wanted both"),
        (["--trace-units", "/tmp"], "--trace-units /tmp is for --prefill and --decode"),
        (["--max-model-len", "99999"], "99999, this model knows 4096 positions"),
        (["--prefill", "2", "--decode", "1x1"], "--prefill is '2', wanted UNITSxRANKS"),
        (["--prefill", "1x1", "--decode", "3-2x1"], "--decode is '3-2x1'"),
        (["--prefill", "1x1", "--decode", "1x1", "--kv-transfer", "rdma"], "wanted shm or tcp"),
        (["--prefill", "1x1", "--decode", "1x1", "--kv", "fp8"], "rows hold 576 columns"),
        (["--prefill", "1x1", "--decode", "1x1", "--trace-units", "/proc/none"], "/proc/none: No"),
    ],
)
def test_bad_layouts_get_one_line_and_status_2(options, words) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "whalefall", "serve", "--port", "0", *options],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert words in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(("ConfigError", "RankFailure", "FileNotFound"))
