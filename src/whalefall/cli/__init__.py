"""The `whalefall` command: a room's sub-commands live in its `commands.py` (`app: typer.Typer`).

Rooms are found by file name and imported only when called, so `whalefall --help` stays fast. The
line that `--help` shows for a room is the first line of its `commands.py`.
"""

from whalefall.cli.dispatch import main

__all__ = ["main"]
