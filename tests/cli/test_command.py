"""The `whalefall` command: fast, found by name, one line for an error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def whalefall(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "whalefall", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_help_lists_every_room_that_has_commands() -> None:
    from whalefall.cli.discovery import command_files

    done = whalefall("--help")
    assert done.returncode == 0
    for name in (*command_files(), "bench", "doctor"):
        assert f"\n  {name} " in done.stdout


def test_help_imports_no_heavy_module() -> None:
    code = (
        "import sys, whalefall.cli.dispatch as m\n"
        "text = m.usage()\n"
        "print([n for n in ('numpy', 'typer', 'torch', 'duckdb', 'fastapi') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_unknown_command_is_one_line_and_exit_code_2() -> None:
    done = whalefall("frobnicate")
    assert done.returncode == 2
    assert done.stderr.startswith("ConfigError: whalefall: no command 'frobnicate'")
    assert done.stderr.count("\n") == 1


def test_a_file_that_cannot_be_written_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    missing = tmp_path / "none" / "records"
    command = [sys.executable, "-m", "whalefall", "data", "gensort", "10", str(missing)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "No such file" in done.stderr and "none" in done.stderr


def test_help_of_every_command_and_subcommand_works() -> None:
    import importlib

    import typer
    from typer.testing import CliRunner

    from whalefall.cli.discovery import command_files
    from whalefall.cli.dispatch import OWN

    modules = [f"whalefall.cli.{name}" for name in OWN]
    modules += [f"whalefall.{name}.commands" for name in command_files()]
    seen, failed = 0, []
    for module in modules:
        app = importlib.import_module(module).app
        waiting: list[tuple[object, tuple[str, ...]]] = [(typer.main.get_command(app), ())]
        while waiting:
            command, path = waiting.pop()
            done = CliRunner().invoke(app, [*path, "--help"])
            seen += 1
            if done.exit_code != 0 or "Usage" not in done.output:
                failed.append((module, *path, repr(done.exception)))
            below = getattr(command, "commands", {})
            waiting += [(child, (*path, name)) for name, child in below.items()]
    assert failed == []
    assert seen > 40


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--help",), ["Measure a room", "{room}"]),
        (("plan", "--help"), ["usage: whalefall bench plan"]),
        (("serve", "--help"), ["--concurrency", "usage: whalefall bench serve", "--engines"]),
        (("serve", "--url", "http://x", "--help"), ["--concurrency"]),
    ],
)
def test_help_after_a_room_is_the_rooms(args: tuple[str, ...], words: list[str]) -> None:
    done = whalefall("bench", *args)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in words), done.stdout
