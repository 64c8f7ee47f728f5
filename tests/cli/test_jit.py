"""`whalefall jit`: what is compiled ahead of time is what serving loads."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from whalefall.cli import jit as commands
from whalefall.model.config import load_config
from whalefall.serve.commands import bundled_path

# Each in a process of its own, which prints the names of the compiled files that it loaded.
LOADED = """
import json, sys
from whalefall.jit.compile import ON_LOAD
names = []
ON_LOAD.append(lambda library: names.append(library.path.name))
from whalefall.serve.commands import bundled_path
{}
print(json.dumps(names))
"""
WARM = """
from whalefall.cli.jit import warm
warm(None)
"""
ANSWER = """
from whalefall.engine import LLM, SamplingParams
llm = LLM(bundled_path(), num_blocks=64, **json.loads(sys.argv[1]))
for temperature in (0.0, 0.7):
    llm.generate(["The whale"], SamplingParams(max_tokens=3, temperature=temperature))
"""


def loaded(code: str, *args: str) -> set[str]:
    command = [sys.executable, "-c", LOADED.format(code), *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def warmed() -> set[str]:
    return loaded(WARM)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compute": "w8a8", "prefix_cache": "disk"},
        {"compute": "fp32"},
        {"compute": "fp32", "kv": "bf16"},
    ],
    ids=str,
)
def test_after_warm_an_answer_compiles_nothing(
    warmed: set[str], tmp_path: Path, options: dict[str, str]
) -> None:
    if "prefix_cache" in options:
        options = options | {"prefix_cache": str(tmp_path / "disk")}
    used = loaded(ANSWER, json.dumps(options))
    assert {name.split("-")[0] for name in used} >= {"step", "linear", "mla_paged", "sampling"}
    assert used <= warmed


def test_clear_deletes_compiled_files_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WHALEFALL_CACHE", str(tmp_path))
    (tmp_path / "jit").mkdir()
    for name in ("a.so", "b.so", "note"):
        (tmp_path / "jit" / name).write_text("")
    commands.clear()
    assert os.listdir(tmp_path / "jit") == ["note"]
    assert capsys.readouterr().out == "deleted 2 compiled kernels\n"


def test_warm_looks_at_the_heads_of_the_model_named() -> None:
    assert load_config(bundled_path()).num_heads == 4
    names = [name for name, _ in commands.units(4)]
    assert "attention of 4 heads" in names
    assert "attention of 128 heads" in names


def test_clear_deletes_what_ended_compilations_left_and_nothing_of_running_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WHALEFALL_CACHE", str(tmp_path))
    folder = tmp_path / "jit"
    folder.mkdir()
    for name in ("ended.lock", "endedx1.tmp", "orphan.tmp", "running.lock", "runningy2.tmp"):
        (folder / name).write_text("")
    with (folder / "running.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        commands.clear()
        assert sorted(os.listdir(folder)) == ["running.lock", "runningy2.tmp"]
        assert "0 compiled kernels and 3 files" in capsys.readouterr().out
    commands.clear()
    assert os.listdir(folder) == []
