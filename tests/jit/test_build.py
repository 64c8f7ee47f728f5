"""Compile, cache, load: what the key covers, what a broken source says."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from whalefall import jit
from whalefall.errors import ConfigError, MissingError
from whalefall.jit import compile as build_module

SOURCE = """
#include "answer.h"
extern "C" __attribute__((visibility("default"))) int answer() { return ANSWER; }
"""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WHALEFALL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "answer.h").write_text("#define ANSWER 42\n")
    path = tmp_path / "answer.cpp"
    path.write_text(SOURCE)
    return path


def compiled(tmp_path: Path) -> list[str]:
    return sorted(p.name for p in (tmp_path / "cache" / "jit").iterdir())


def test_a_source_is_compiled_once(source: Path, tmp_path: Path) -> None:
    assert jit.build(source, level="any").answer() == 42
    first = compiled(tmp_path)
    build_module._build.cache_clear()
    assert jit.build(source, level="any").answer() == 42
    assert compiled(tmp_path) == first
    assert len(first) == 1


@pytest.mark.parametrize("change", ["header", "define", "cpu"])
def test_the_key_covers(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    jit.build(source, level="any")
    build_module._build.cache_clear()
    defines = {}
    if change == "header":
        (tmp_path / "answer.h").write_text("#define ANSWER 43\n")
    elif change == "define":
        defines = {"UNUSED": 1}
    else:
        monkeypatch.setattr(build_module.isa, "cpu_features", lambda: frozenset({"other"}))
    library = jit.build(source, defines, level="any")
    assert library.answer() == (43 if change == "header" else 42)
    assert len(compiled(tmp_path)) == 2


def test_a_broken_source_says_what_the_compiler_said(source: Path, tmp_path: Path) -> None:
    source.write_text("int broken( { }\n")
    with pytest.raises(build_module.CompileError, match=r"refused answer\.cpp"):
        jit.build(source, level="any")
    assert compiled(tmp_path) == []


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"no source .*nowhere\.cpp"):
        jit.build(tmp_path / "nowhere.cpp")


def test_an_unknown_level_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHALEFALL_ISA", "sse9")
    with pytest.raises(ConfigError, match="'sse9', wanted one of any, avx2"):
        jit.best_level()


def _build_in_child(source: Path, results: multiprocessing.Queue) -> None:
    build_module._build.cache_clear()
    compiles = []
    real = build_module._compile
    build_module._compile = lambda *args: (compiles.append(1), time.sleep(0.3), real(*args))
    results.put((jit.build(source, level="any").answer(), len(compiles)))


def test_of_processes_that_need_the_same_thing_one_compiles(source: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    children = [context.Process(target=_build_in_child, args=(source, results)) for _ in range(3)]
    for child in children:
        child.start()
    found = [results.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert [answer for answer, _ in found] == [42] * 3
    assert sum(compiles for _, compiles in found) == 1
    assert len(compiled(tmp_path)) == 1


def test_what_a_killed_compiler_left_is_swept(source: Path, tmp_path: Path) -> None:
    target = jit.build(source, level="any").path
    left = target.with_name(f"{target.stem}abc.tmp")
    left.write_bytes(b"half")
    os.utime(left, (1, 1))
    target.unlink()
    build_module._build.cache_clear()
    jit.build(source, level="any")
    assert compiled(tmp_path) == [target.name]


def test_where_the_headers_lie_is_not_in_the_key(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jit.build(source, level="any")
    build_module._build.cache_clear()
    monkeypatch.setattr(build_module, "INCLUDE", tmp_path / "another checkout")
    jit.build(source, level="any")
    assert len(compiled(tmp_path)) == 1
