"""The dashboard: its figures, its charts, and the page in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import httpx
import numpy as np
import pytest

from tests.model.forms import FORMS
from tests.serve.conftest import Running, served
from tests.serve.fake import EchoEngine
from whalefall.model import load_config
from whalefall.model.expert_parallel import even_placement
from whalefall.model.synth import synth
from whalefall.serve import Settings
from whalefall.serve.core import ExpertBalance, ExpertRule
from whalefall.serve.dashboard import _experts, _narrow, _rank_loads
from whalefall.serve.history import History
from whalefall.serve.metrics import Metrics

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


def test_a_point_is_what_happened_since_the_one_before() -> None:
    engine = EchoEngine()
    metrics = Metrics(engine, 0.1)  # type: ignore[arg-type]
    history = History(engine, metrics)  # type: ignore[arg-type]
    for _ in range(2):  # the fake's own counters stand still: no prompt, no draft
        start = metrics.start if not history.points else metrics.start + 2
        metrics.output(40)
        metrics.first_token(0.25)
        metrics.first_token(0.75)
        point = history.sample(start + 2)
        assert point.tokens_s == pytest.approx(20)
        assert point.ttft_s == pytest.approx(0.5)
        assert (point.prefix_hits, point.spec_accepted, point.kv_use) == (None, None, 0.25)
    assert history.sample(metrics.start + 6).ttft_s is None
    assert [p.age_s for p in history.points] == pytest.approx([2, 4, 6])


def charts(client: httpx.Client) -> str:
    answer = client.get("/dashboard/charts")
    assert answer.status_code == 200, answer.text
    return answer.text


def test_the_fragment_shows_the_figures(client: httpx.Client, server: Running) -> None:
    empty = charts(client)
    assert "nothing yet" in empty
    body = {"messages": [{"role": "user", "content": "hello"}]}
    for _ in range(3):
        client.post("/v1/chat/completions", json=body)
    time.sleep(2.5)
    text = charts(client)
    # drafts accepted, prefix hits, KV in use, overlap
    for figure in ("75.0 %", "50.0 %", "25.0 %", "90.0 %"):
        assert f"<dd>{figure}</dd>" in text
    assert "<th>output tokens</th><td>15</td>" in text
    assert "expert 1: 1.50 x mean" in text
    parts = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(parts) == 6
    for part in parts:
        ElementTree.fromstring(part)
    assert re.search(r"tokens/s</dt><dd>\d", text)


def test_a_heat_map_of_many_experts_is_drawn_with_some_taken_together() -> None:
    load = np.arange(64 * 600, dtype=float).reshape(64, 600)
    narrow = _narrow(load)
    assert narrow.size <= 64 * 256
    np.testing.assert_allclose(narrow.sum(axis=1), load.sum(axis=1))


def test_ranks_of_units_are_shown_before_and_after_balancing(tmp_path: Path) -> None:
    model = load_config(synth(tmp_path, FORMS["v3"]))
    placement = even_placement(model, 2)
    weight = np.full((2, model.num_experts), 1000.0)
    first = placement.phy2log[:, : placement.phy2log.shape[1] // 2]  # the first rank's
    np.put_along_axis(weight, first, 3000.0, axis=1)
    balance = ExpertBalance(placement, ExpertRule(balance=0.99, max_moves=100))
    assert _rank_loads(balance) == []  # nothing was seen
    balance.look(weight, 0.0)
    engine = SimpleNamespace(model=model, experts=SimpleNamespace(units={"decode-0": balance}))
    (_, before), (_, now) = _rank_loads(balance)
    np.testing.assert_allclose(before[:, 0] / before[:, 1], 3)
    np.testing.assert_allclose(now[:, 0], now[:, 1])
    text = _experts(engine, np.zeros((3, 8)))
    assert "decode-0: load of each rank, before balancing" in text
    assert "rank 0: 1.50 x mean" in text
    assert "rank 1: 1.00 x mean" in text


def test_pages_are_open_and_figures_want_the_key() -> None:
    with served(EchoEngine(), Settings("echo", api_key="secret")) as server:
        with server.client() as client:
            assert client.get("/dashboard").status_code == 200
            assert client.get("/dashboard/charts").status_code == 401
        with server.client(headers={"Authorization": "Bearer secret"}) as client:
            assert client.get("/dashboard/charts").status_code == 200


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
def test_the_page_in_a_browser_draws_itself_and_asks_no_other_host(
    server: Running, client: httpx.Client, tmp_path: Path
) -> None:
    assert 'href="/dashboard"' in client.get("/").text
    body = {"messages": [{"role": "user", "content": "hello"}]}
    client.post("/v1/chat/completions", json=body)
    log = tmp_path / "net.json"
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=6000",
        "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1", f"--log-net-log={log}",
        "--disable-background-networking", "--disable-component-update", "--no-first-run",
        "--disable-sync", "--disable-default-apps", "--dump-dom", f"{server.url}/dashboard",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "Tokens per second" in done.stdout, done.stderr[-2000:]
    assert "<th>output tokens</th><td>5</td>" in done.stdout
    assert done.stdout.count("<svg") == 6
    page = client.get("/dashboard").text + charts(client)
    hosts = set(re.findall(r"(?:src|href)=[\"'](?:https?:)?//([^/\"']+)", page))
    assert not hosts
    assert "@import" not in page
    assert "url(http" not in page
