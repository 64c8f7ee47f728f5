"""What smallpond's callers write is accepted: names, order and defaults of its arguments.

`signatures.json` is the part of smallpond's recorded signatures that whalefall keeps: ours may
take more arguments, after the original's or by keyword.
"""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import pytest

import whalefall.compat
from whalefall.data.runtime import WITHOUT_EFFECT

MODULES = json.loads((Path(__file__).parent / "signatures.json").read_text())["modules"]
CASES = [(module, name) for module, names in MODULES.items() for name in names]


def find(module: str, name: str) -> Any:
    """The object that compat gives for `module.name`."""
    target = importlib.import_module(whalefall.compat.MODULES[module])
    for part in name.split("."):
        target = getattr(target, part)
    return target


def differences(function: Any, wanted: list[dict[str, Any]]) -> list[str]:
    """How a signature falls short of the original's."""
    ours = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    by_name = {p.name: p for p in ours}
    taken = {p.name for p in ours if p.kind is p.VAR_KEYWORD}
    order = [p.name for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
    found = []
    place = 0
    for argument in wanted:
        name = argument["name"]
        if not argument.get("keyword"):
            if order[place : place + 1] != [name] and not (place >= len(order) and taken):
                found.append(f"{name} is not argument {place}")
            place += 1
        if name not in by_name:
            if not taken or (taken == {"without_effect"} and name not in WITHOUT_EFFECT):
                found.append(f"no {name}")
        elif "default" in argument and plain(by_name[name].default) != argument["default"]:
            found.append(f"{name}={by_name[name].default!r}, wanted {argument['default']!r}")
    return found


def plain(value: Any) -> Any:
    """A default as JSON can hold it."""
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize(("module", "name"), CASES, ids=lambda item: str(item))
def test_the_originals_arguments_are_taken(module: str, name: str) -> None:
    assert differences(find(module, name), MODULES[module][name]) == []


def test_the_comparison_finds_what_differs() -> None:
    def ours(a: int, b: int = 1) -> None: ...

    wanted = [{"name": "b", "default": 2}, {"name": "c", "required": True, "keyword": True}]
    assert differences(ours, wanted) == ["b is not argument 0", "b=1, wanted 2", "no c"]
