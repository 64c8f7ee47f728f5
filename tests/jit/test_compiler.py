"""Which compiler is taken: one that compiles, for the levels it knows."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from whalefall import jit
from whalefall.errors import UnsupportedError
from whalefall.jit import compile as build_module
from whalefall.jit import compiler, isa

REAL = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
pytestmark = pytest.mark.skipif(REAL is None, reason="needs a system compiler to stand behind")
BROKEN = 'echo "x.cpp:1: fatal error: cstdint: No such file or directory" >&2; exit 1'
OLD = """for a in "$@"; do
  [ "$a" = -mavx2 ] && { echo "c++: error: unrecognized option '-mavx2'" >&2; exit 1; }
done"""
COUNTED = 'echo "$@" >> "$0.calls"'
needs_avx2 = pytest.mark.skipif("avx2" not in isa.cpu_levels(), reason="needs avx2")
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Puts a compiler on an otherwise empty PATH: the real one, behind some lines of shell."""

    path_before = os.environ["PATH"]

    def made(name: str, lines: str, version: str = "a compiler 1") -> Path:
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        asked = f'[ "$1" = --version ] && {{ echo "{version}"; exit 0; }}'
        path.write_text(f'#!/bin/sh\n{asked}\n{lines}\nPATH={path_before} exec {REAL} "$@"\n')
        path.chmod(0o755)
        return path

    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: None)  # no ziglang
    monkeypatch.setenv("WHALEFALL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    anew()
    yield made
    anew()


def anew() -> None:
    """As in a process that just began."""
    for cached in (compiler._search, isa.levels, isa._level, build_module._build):
        cached.cache_clear()


def test_one_that_cannot_compile_is_passed_over(make: Make) -> None:
    make("c++", BROKEN)
    works = make("g++", "")
    found = compiler.find_compiler()
    assert found and found.command == (str(works),)
    assert jit.levels() == isa.cpu_levels()


def test_where_none_compiles_the_refusal_says_why(make: Make) -> None:
    broken = make("c++", BROKEN)
    assert compiler.find_compiler() is None
    with pytest.raises(jit.NoCompilerError) as refusal:
        compiler.compiler()
    assert f"({broken}: cannot compile: x.cpp:1: fatal error: cstdint" in str(refusal.value)
    assert "pip install ziglang" in str(refusal.value) and "\n" not in str(refusal.value)
    assert compiler.without().startswith(f"none ({broken}: cannot compile")
    assert jit.levels() == isa.cpu_levels()


@pytest.mark.parametrize(
    ("command", "why"), [("g++-99", "No such file"), ("/bin/false -O2", "gives no --version")]
)
def test_a_variable_that_names_none_is_named(
    make: Make, monkeypatch: pytest.MonkeyPatch, command: str, why: str
) -> None:
    make("c++", "")
    monkeypatch.setenv("WHALEFALL_CXX", command)
    with pytest.raises(jit.NoCompilerError) as refusal:
        compiler.compiler()
    assert f"WHALEFALL_CXX is '{command}' ({command}: {why}" in str(refusal.value)
    assert "correct it, or unset it" in str(refusal.value)


@needs_avx2
def test_an_old_one_lowers_the_levels_and_says_so(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make("c++", OLD)
    for _ in range(2):  # found out, then remembered
        with pytest.warns(UserWarning, match="unrecognized option '-mavx2'.*kernels are for any"):
            assert jit.levels() == ("any",)
        assert jit.best_level() == "any"
        monkeypatch.setenv("WHALEFALL_ISA", "avx2")
        with pytest.raises(UnsupportedError, match="cannot compile for it, wanted one of any;"):
            jit.best_level()
        monkeypatch.delenv("WHALEFALL_ISA")
        anew()
    source = tmp_path / "answer.cpp"
    source.write_text('extern "C" __attribute__((visibility("default"))) int answer() {return 4;}')
    with pytest.warns(UserWarning, match="slower"):
        assert jit.build(source).answer() == 4


def test_each_is_tried_once_until_it_changes_or_refuses_a_source(
    make: Make, tmp_path: Path
) -> None:
    def tried() -> int:
        anew()
        calls = tmp_path / "bin" / "c++.calls"
        calls.unlink(missing_ok=True)
        assert compiler.find_compiler()
        return len(calls.read_text().splitlines()) if calls.exists() else 0

    make("c++", COUNTED)
    assert [tried(), tried()] == [1, 0]
    make("c++", COUNTED, "a compiler 2")
    assert [tried(), tried()] == [1, 0]
    broken = tmp_path / "broken.cpp"
    broken.write_text("int broken( { }\n")
    with pytest.raises(build_module.CompileError):
        jit.build(broken, level="any")
    assert [tried(), tried()] == [1, 0]
    build_module.clear()
    assert [tried(), tried()] == [1, 0]


def test_a_folder_that_cannot_be_written_is_no_reason_to_find_none(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make("c++", "")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WHALEFALL_CACHE", str(tmp_path / "file"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiler.find_compiler()


def test_doctor_speaks_of_a_machine_whose_compiler_broke(make: Make, tmp_path: Path) -> None:
    path = make("c++", "")
    assert compiler.find_compiler()  # and remembered as one that compiles
    stat, text = path.stat(), path.read_text()
    broken = text.replace("PATH=", "exit 1;  # ", 1)
    path.write_text(broken.ljust(len(text))[: len(text)])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    command = [sys.executable, "-m", "whalefall", "doctor", "--json"]
    for expected in ("none: jit: ", "none: models, gemm"):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["kernels"].startswith(expected), done.stdout
