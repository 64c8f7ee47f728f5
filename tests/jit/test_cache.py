"""A cache folder that is damaged, read-only, or no folder at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from whalefall import env, jit
from whalefall.errors import ConfigError
from whalefall.jit import compile as build_module
from whalefall.jit import compiler, machine

SOURCE = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'
# In a process of its own: a library once loaded stays mapped, and a bad one may kill the process.
ANSWER = (
    "import sys; from whalefall import jit; print(jit.build(sys.argv[1], level='any').answer())"
)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WHALEFALL_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "answer.cpp"
    path.write_text(SOURCE)
    return path


def answer(source: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", ANSWER, str(source)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("harm", ["page", "half", "empty", "random", "bit"])
def test_a_damaged_library_is_compiled_anew_and_says_so_once(source: Path, harm: str) -> None:
    assert answer(source).stdout == "42\n"
    (target,) = env.cache_dir("jit").glob("answer-*.so")
    whole = target.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    target.write_bytes(
        {
            "page": whole[:4096],
            "half": whole[: len(whole) // 2],
            "empty": b"",
            "random": bytes(range(256)) * 64,
            "bit": bytes(flipped),
        }[harm]
    )
    healed = answer(source)
    assert (healed.returncode, healed.stdout) == (0, "42\n")
    assert healed.stderr.count("is damaged; compiling it anew") == 1
    again = answer(source)
    assert (again.stdout, again.stderr) == ("42\n", "")


@pytest.mark.parametrize(
    "text",
    [
        *("[]", "null", '"text"', "{", '{"some|key": 3}', '{"some|key": {}}'),
        '{"some|key": {"seconds": "2"}}',
    ],
)
def test_a_file_of_measurements_that_makes_no_sense_counts_as_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("WHALEFALL_CACHE", str(tmp_path))
    (tmp_path / "machine.json").write_text(text)
    assert machine.kept("some|key", lambda: {"seconds": 2.0}) == {"seconds": 2.0}
    assert json.loads((tmp_path / "machine.json").read_text()) == {"some|key": {"seconds": 2.0}}


@pytest.mark.parametrize("place", ["file", "file/under", "~nobody-of-that-name/cache", "/proc/x"])
def test_a_cache_folder_that_cannot_be_is_named(
    source: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (source.parent / "file").write_text("")
    path = str(source.parent / place) if place.startswith("file") else place
    monkeypatch.setenv("WHALEFALL_CACHE", path)
    for use in (lambda: jit.build(source, level="any"), lambda: machine.kept("some|key", dict)):
        build_module._build.cache_clear()
        with pytest.raises(ConfigError, match="set WHALEFALL_CACHE to a folder that") as refusal:
            use()
        assert f"cache folder {path}: " in str(refusal.value)
        assert "\n" not in str(refusal.value)


def test_a_folder_without_permission_to_write_is_named_and_a_warm_one_is_used(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    jit.build(source, level="any")
    build_module._build.cache_clear()
    # not by chmod: root, who runs tests in containers, may write everywhere
    with monkeypatch.context() as patch:
        patch.setattr(build_module.tempfile, "mkstemp", refuse)
        assert jit.build(source, level="any").answer() == 42
        with pytest.raises(ConfigError, match=r"cache folder .*: Permission denied; set WHALEFALL"):
            jit.build(source, {"OTHER": 1}, level="any")


def test_a_compiler_that_no_shell_would_take_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHALEFALL_CXX", "g++ '-O2")
    compiler._search.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"WHALEFALL_CXX is \"g\+\+ '-O2\", wanted a command"):
            compiler.compiler()
    finally:
        compiler._search.cache_clear()


def test_an_empty_variable_counts_as_unset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WHALEFALL_CACHE", "")
    assert env.cache_dir("jit") == tmp_path / ".cache/whalefall/jit"
    monkeypatch.setenv("WHALEFALL_EP_TIMEOUT", "")
    assert env.get("WHALEFALL_EP_TIMEOUT") == "10"
    monkeypatch.setenv("WHALEFALL_ISA", "")
    assert jit.best_level() == jit.levels()[-1]
