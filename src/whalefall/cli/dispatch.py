"""Dispatches `whalefall ROOM …`, and turns a `WhalefallError` into one line and exit code 2."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from whalefall import __version__
from whalefall.cli.discovery import command_files, summary
from whalefall.errors import ConfigError, MissingError, WhalefallError

__all__ = ["main"]

USAGE = "usage: whalefall [--version] [--help] COMMAND …\n\ncommands (whalefall COMMAND --help):\n"
# Commands of the `cli` room itself, which no room's name covers.
OWN = {
    "bench": "Measure a room against its peers and this machine's limits.",
    "doctor": "Say what this machine has, and what will run on it.",
    "jit": "Compile kernels ahead of time, or empty the cache of compiled kernels.",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv` (default: the process's own) and exit."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        sys.stdout.write(usage())
        raise SystemExit(0)
    if args[0] == "--version":
        sys.stdout.write(f"whalefall {__version__}\n")
        raise SystemExit(0)
    try:
        raise SystemExit(run(args[0], args[1:]))
    except WhalefallError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        raise SystemExit(2) from None
    except ModuleNotFoundError as error:
        name = error.name or ""
        if name.split(".")[0] == "whalefall":
            raise
        sys.stderr.write(f"{extra_hint(name)}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except OSError as error:  # a file or disk of the user's: name it, no traceback
        where = f"{error.filename}: " if error.filename else ""
        sys.stderr.write(f"{type(error).__name__}: {where}{error.strerror or error}\n")
        raise SystemExit(2) from None


def usage() -> str:
    """The text of `whalefall --help`."""
    lines = dict(OWN) | {name: summary(path) for name, path in command_files().items()}
    return USAGE + "".join(f"  {name:10} {text}\n" for name, text in sorted(lines.items()))


def extra_hint(module: str) -> str:
    """Which extra brings a missing third-party module."""
    extras = {"duckdb": "data", "pyarrow": "data", "pandas": "data", "torch": "torch", "ray": "ray"}
    extra = extras.get(module.split(".")[0])
    remedy = f"pip install 'whalefall[{extra}]'" if extra else f"pip install {module}"
    return f"{MissingError.__name__}: the Python package {module} is not installed; {remedy}"


def usage_error(error: Any) -> int:
    """Say in one line what was wrong with the arguments, or show the help where there were none."""
    show = getattr(error, "show", None)
    if show is None:
        raise error
    context = getattr(error, "ctx", None)
    if context is None or type(error).__name__ == "NoArgsIsHelpError":
        show()
    else:
        path = context.command_path
        sys.stderr.write(f"UsageError: {path}: {error.format_message()} ({path} --help)\n")
    return int(getattr(error, "exit_code", 2))


def run(command: str, args: list[str]) -> int:
    """Import the one module that `command` needs and call its typer app; returns the exit code."""
    rooms = command_files()
    if command in OWN:
        module = importlib.import_module(f"whalefall.cli.{command}")
    elif command in rooms:
        module = importlib.import_module(f"whalefall.{command}.commands")
    else:
        known = ", ".join(sorted({*rooms, *OWN}))
        raise ConfigError(f"whalefall: no command {command!r}; there are {known}")
    import typer

    # Not standalone: a WhalefallError must reach `main`, and Ctrl-C must end it cleanly.
    typer_command = typer.main.get_command(module.app)
    try:
        result = typer_command.main(
            args=args, prog_name=f"whalefall {command}", standalone_mode=False
        )
    except Exception as error:  # typer's own usage errors, by duck type: it may vendor click
        return usage_error(error)
    return result if isinstance(result, int) else 0
