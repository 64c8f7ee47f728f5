"""The `whalefall` command: fast, found by name, one line for an error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


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
