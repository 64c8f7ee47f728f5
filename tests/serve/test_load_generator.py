"""Locust, a load generator from PyPI, against the bundled model: every answer right, none lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.conftest import served
from whalefall.engine import Engine, EngineConfig
from whalefall.serve import Settings
from whalefall.serve.commands import bundled_path

pytest.importorskip("locust", reason="locust is not installed: pip install 'whalefall[clients]'")

SCRIPT = """
import json

from locust import FastHttpUser, constant, task

WANTED = {wanted!r}


class Person(FastHttpUser):
    wait_time = constant(0)

    def ask(self, name, stream):
        body = {{"messages": [{{"role": "user", "content": f"What does {{name}} do?"}}],
                "temperature": 0, "max_tokens": 60, "stream": stream}}
        with self.client.post("/v1/chat/completions", json=body, catch_response=True,
                              name="stream" if stream else "whole") as answer:
            try:
                if stream:
                    lines = [x[6:] for x in answer.text.splitlines() if x.startswith("data: ")]
                    assert lines.pop() == "[DONE]"
                    parts = [c["delta"].get("content") or "" for line in lines
                             for c in json.loads(line)["choices"]]
                    text = "".join(parts)
                else:
                    text = answer.json()["choices"][0]["message"]["content"]
                assert text == WANTED[name], text
            except Exception as error:
                answer.failure(f"{{answer.status_code}} {{error!r}}")

    @task
    def whole(self):
        for name in WANTED:
            self.ask(name, False)

    @task
    def streamed(self):
        for name in WANTED:
            self.ask(name, True)
"""
NAMES = ("tar", "ls", "grep", "chmod")


def test_locust_finds_no_failure(tmp_path: Path) -> None:
    engine = Engine(bundled_path(), EngineConfig(max_sequences=4))
    names = Path(__file__).parents[2] / "recipes" / "bundled" / "names.jsonl"
    lines = [json.loads(line) for line in names.read_text().splitlines()]
    wanted = {line["command"]: line["line"] for line in lines if line["command"] in NAMES}
    assert len(wanted) == len(NAMES)
    script = tmp_path / "locustfile.py"
    script.write_text(SCRIPT.format(wanted=wanted))
    with served(engine, Settings("bundled")) as running:
        options = ["--headless", "-u", "12", "-r", "12", "-t", "4s", "--stop-timeout", "20"]
        report = ["--json", "--only-summary", "--host", running.url, "--loglevel", "ERROR"]
        done = subprocess.run(
            [sys.executable, "-m", "locust", "-f", str(script), *options, *report],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert sum(row["num_requests"] for row in rows.values()) >= 48  # each of 12 asked all once
    assert not any(row["num_failures"] for row in rows.values())
