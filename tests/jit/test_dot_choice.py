"""Bf16 dots, and AMX's tiles, are used where a measurement, kept on disk, says so."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from whalefall import jit
from whalefall.errors import UnsupportedError
from whalefall.jit import compile as compiling
from whalefall.jit import isa, machine

needs_tiles = pytest.mark.skipif("amx" not in jit.levels(), reason="needs AMX")
needs_bf16 = pytest.mark.skipif("avx512bf16" not in jit.levels(), reason="needs avx512_bf16")


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    for asked in (machine.dot_is_fast, machine.tile_is_fast):
        asked.cache_clear()
    yield
    for asked in (machine.dot_is_fast, machine.tile_is_fast):
        asked.cache_clear()


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


@needs_tiles
@pytest.mark.parametrize(("ratio", "wanted"), [(0.9, False), (16.0, True)])
def test_the_kept_answer_on_tiles_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ratio: float, wanted: bool
) -> None:
    monkeypatch.setenv("WHALEFALL_CACHE", str(tmp_path))
    name = machine.cpu_model()
    kept = {f"{name}|amx|tile": {"tile_over_fma": ratio}, f"{name}|amx|dot": {"dot_over_fma": 2.0}}
    (tmp_path / "machine.json").write_text(json.dumps(kept))
    options = compiling._measured_options("amx")
    assert ("-DWF_TILE" in options, "-DWF_DOT" in options) == (wanted, not wanted)
    assert machine.halves_are_fast("amx")
    assert "-DWF_TILE" not in compiling._measured_options("avx512")


@needs_tiles
def test_a_measurement_of_tiles_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHALEFALL_CACHE", str(tmp_path))
    machine.tile_is_fast("amx")
    found = json.loads((tmp_path / "machine.json").read_text())
    assert 0.5 < found[f"{machine.cpu_model()}|amx|tile"]["tile_over_fma"] < 64


def test_tiles_that_the_system_keeps_are_no_level(monkeypatch: pytest.MonkeyPatch) -> None:
    every = frozenset().union(*(level.needs for level in isa.LEVELS.values()))
    monkeypatch.setattr(isa, "cpu_features", lambda: every)
    monkeypatch.setattr(isa, "_may_use_tiles", lambda: False)
    assert isa.cpu_levels() == ("any", "avx2", "avx512", "avx512bf16")
    monkeypatch.setattr(isa, "_may_use_tiles", lambda: True)
    assert isa.cpu_levels()[-1] == "amx"


def test_a_forced_level_that_the_system_keeps_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    every = frozenset().union(*(level.needs for level in isa.LEVELS.values()))
    monkeypatch.setattr(isa, "cpu_features", lambda: every)
    monkeypatch.setattr(isa, "_may_use_tiles", lambda: False)
    monkeypatch.setattr(isa, "levels", isa.cpu_levels)
    isa._level.cache_clear()
    with pytest.raises(UnsupportedError, match="the system keeps its tiles from this process"):
        isa._level(b"amx")


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
from whalefall.jit import isa, machine
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
