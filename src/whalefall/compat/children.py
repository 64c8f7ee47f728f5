"""Compat room: processes that a script starts with `multiprocessing` or `torch.multiprocessing`
(start method "spawn") see the stand-ins too: `follow` puts `begin` before what they run.
"""

from __future__ import annotations

from multiprocessing import spawn
from typing import Any

from whalefall.compat import install

__all__ = ["begin", "follow"]


def begin(device: str | None) -> None:
    """Install the stand-ins in this process, and CUDA's names where `device` is cpu."""
    install()
    if device == "cpu":
        from whalefall.compat.cuda import emulate

        emulate()
    follow(device)


def follow(device: str | None) -> None:
    """Have the children of this process begin the same way."""
    plain = spawn.get_command_line

    def get_command_line(**kwargs: Any) -> list[str]:
        command = plain(**kwargs)
        if "-c" in command:
            at = command.index("-c") + 1
            first = f"from whalefall.compat.children import begin; begin({device!r}); "
            command[at] = first + command[at]
        return command

    if plain.__module__ != __name__:  # once is enough
        spawn.get_command_line = get_command_line
