"""Finds the rooms' `commands.py` files without importing them."""

from __future__ import annotations

from pathlib import Path

import whalefall

__all__ = ["command_files", "summary"]


def command_files() -> dict[str, Path]:
    """Room name → its `commands.py`, for every room that has one, sorted by name."""
    root = Path(whalefall.__file__).parent
    return {path.parent.name: path for path in sorted(root.glob("*/commands.py"))}


def summary(path: Path) -> str:
    """The first line of a `commands.py` docstring, read as text."""
    with path.open(encoding="utf-8") as file:
        return file.readline().strip().strip('"').strip()
