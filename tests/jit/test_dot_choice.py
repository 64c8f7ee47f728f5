"""Bf16 dots are used where a measurement, kept on disk, says so."""

from __future__ import annotations

import json
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
def test_a_measurement_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHALEFALL_CACHE", str(tmp_path))
    machine.dot_is_fast("avx512bf16")
    (found,) = json.loads((tmp_path / "machine.json").read_text()).values()
    assert 0.1 < found["dot_over_fma"] < 10
