"""Bf16 dots are used where a measurement, kept on disk, says so."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from whalefall import jit
from whalefall.jit import compile as compiling
from whalefall.jit import machine

needs_bf16 = pytest.mark.skipif("avx512bf16" not in jit.levels(), reason="needs avx512_bf16")


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    machine.dot_is_fast.cache_clear()
    yield
    machine.dot_is_fast.cache_clear()


@pytest.mark.parametrize("level", ["any", "avx2", "avx512"])
def test_levels_without_the_instruction_never_use_it(level: str) -> None:
    assert not machine.dot_is_fast(level)
    assert "-DWF_DOT" not in compiling._measured_options(level)


@needs_bf16
@pytest.mark.parametrize(("ratio", "wanted"), [(0.5, False), (2.0, True)])
def test_the_kept_answer_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ratio: float, wanted: bool
) -> None:
    monkeypatch.setenv("WHALEFALL_CACHE", str(tmp_path))
    key = f"{machine.cpu_model()}|avx512bf16|dot"
    (tmp_path / "machine.json").write_text(json.dumps({key: {"dot_over_fma": ratio}}))
    assert machine.dot_is_fast("avx512bf16") == wanted
    assert ("-DWF_DOT" in compiling._measured_options("avx512bf16")) == wanted


@needs_bf16
def test_a_measurement_iskept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHALEFALL_CACHE", str(tmp_path))
    machine.dot_is_fast("avx512bf16")
    (found,) = json.loads((tmp_path / "machine.json").read_text()).values()
    assert 0.1 < found["dot_over_fma"] < 10


def test_neighbours_do_not_change_the_ratio() -> None:
    """Times that a crowded machine lengthens in nine of ten samples, by up to forty times."""
    for seed in range(20):
        random.seed(seed)

        def sample(true: float) -> float:
            return true * (1 + (random.random() < 0.9) * random.random() * 40)

        dot, fma = machine.undisturbed(lambda: sample(1.0), lambda: sample(2.0))
        assert fma / dot == pytest.approx(2.0, rel=0.03)


def test_quiet_machines_measure_a_few_times() -> None:
    calls = []
    machine.undisturbed(lambda: calls.append(0) or 1.0, lambda: 2.0)
    assert len(calls) == 9


ASKS = """
import sys
from whalefall.jit import machine
print(machine.kept("coin", lambda: {"side": float(sys.argv[1])})["side"])
print(machine.kept(f"own {sys.argv[1]}", lambda: {"side": 0.0})["side"])
"""


def test_processes_that_start_together_get_one_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WHALEFALL_CACHE", str(tmp_path))
    children = [
        subprocess.Popen([sys.executable, "-c", ASKS, str(i)], stdout=subprocess.PIPE, text=True)
        for i in range(6)
    ]
    said = [child.communicate(timeout=120)[0].split() for child in children]
    assert len({first for first, _ in said}) == 1
    kept = json.loads((tmp_path / "machine.json").read_text())
    assert len(kept) == 7  # nobody's entry was lost


def test_a_unit_started_by_a_server_takes_the_kept_answer_however_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WHALEFALL_CACHE", str(tmp_path))
    kept = {f"{machine.cpu_model()}|denormals": {"subnormal_over_normal": 99.0}}
    (tmp_path / "machine.json").write_text(json.dumps(kept))
    machine.denormals_are_slow.cache_clear()
    try:
        assert "-DWF_SLOW_DENORMALS" in compiling._measured_options("any")
    finally:
        machine.denormals_are_slow.cache_clear()
